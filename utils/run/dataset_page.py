"""An HTML page that shows a dataset as training sees it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import printable, without_controls

PAGE_NAME = "dataset.html"
CLIPS = (".mp4",)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fafafa }}
input {{ font: inherit; width: 30rem; max-width: 100%; padding: .35rem .6rem; margin: .6rem 0 1.2rem }}
.sample {{ background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: .8rem; margin-bottom: 1rem }}
.media {{ display: flex; flex-wrap: wrap; gap: .8rem }}
figure {{ margin: 0 }} figcaption {{ color: #777; font-size: .85em }}
img, video {{ max-width: 20rem; max-height: 20rem; image-rendering: auto; background: #eee }}
.facts {{ color: #555; font-size: .88em; margin-top: .4rem }} .caption {{ margin-top: .5rem; white-space: pre-wrap }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
<input type="search" placeholder="find in captions, files and buckets" aria-label="find">
{samples}
<script>
const found = document.querySelector("input");
found.addEventListener("input", () => {{
  for (const sample of document.querySelectorAll(".sample"))
    sample.hidden = !sample.textContent.toLowerCase().includes(found.value.toLowerCase());
}});
</script></body></html>
"""


@dataclass(frozen=True)
class PageEntry:
    """A sample on the page: its pictures by role (files beside the page), its caption, and further facts."""

    caption: str
    pictures: Mapping[str, str]
    facts: Mapping[str, str] = field(default_factory=dict)


def write_page(folder: Path, title: str, summary: str, samples: Sequence[PageEntry]) -> Path:
    """Writes the page into the folder."""
    path = folder / PAGE_NAME
    shown = "\n".join(map(_sample, samples))
    page = PAGE.format(title=html.escape(title), summary=html.escape(summary), samples=shown)
    path.write_text(without_controls(page), encoding="utf-8")
    return path


def _sample(seen: PageEntry) -> str:
    figures = "".join(_figure(what, file) for what, file in seen.pictures.items())
    facts = " &middot; ".join(
        f"{html.escape(name)} {html.escape(printable(value))}" for name, value in seen.facts.items()
    )
    caption = html.escape(seen.caption) if seen.caption else "<i>no caption</i>"
    return (
        f'<div class="sample"><div class="media">{figures}</div><div class="caption">{caption}</div>'
        f'<div class="facts">{facts}</div></div>'
    )


def _figure(what: str, file: str) -> str:
    source = html.escape(file, quote=True)
    is_clip = file.endswith(CLIPS)
    picture = (
        f'<video src="{source}" controls loop muted preload="metadata"></video>'
        if is_clip
        else f'<img src="{source}" loading="lazy" alt="{html.escape(what, quote=True)}">'
    )
    return f"<figure>{picture}<figcaption>{html.escape(what)}</figcaption></figure>"
