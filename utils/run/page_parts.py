"""The parts of the page of a run as HTML: its state, warnings, charts, samples, data and settings."""

from __future__ import annotations

import base64
import html
import io
import re
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from utils.errors import printable
from utils.run.charts import ORDERED, Line, heat_map, line_chart, smoothed
from utils.run.evaluated import ERROR
from utils.run.notes import Notes
from utils.run.numbers import BLOCK_GRADIENT, BLOCK_WEIGHT, Numbers

THUMBNAIL = 160
"""Pixels of the longer side of a sample on the page."""
MOST_SAMPLES = 8
"""So many prompts, and so many steps, are shown."""
ENDS = "0 is the least noise, 1 the most"
"""Of the noise levels that are trained."""
OPTIMIZER = "optimizer/"
"""What the names of an optimizer's own numbers begin with."""
NORMS = {"Norm of the gradient": BLOCK_GRADIENT, "Norm of what is trained": BLOCK_WEIGHT}
"""Title -> what the names of norms by block begin with."""
STEP_FOLDER = re.compile(r"step(\d+)")
LISTED = 12
MEMORY = {"train/peak_memory_gib": "GPU, most of a step", "train/host_memory_gib": "host, the process that holds most"}
PARTS = {
    "train/step_time_sec": "whole step",
    "train/data_time_sec": "waiting for data",
    "train/compute_time_sec": "forward and backward",
    "train/communication_time_sec": "communication",
    "train/optimizer_time_sec": "optimizer",
}
"""Names of the times of a step's parts."""


def what_is_trained(settings: str) -> str:
    """The model and how it is trained, by the run's settings as TOML; nothing if they say neither."""
    try:
        read = tomllib.loads(settings)
        model, adapter = read["model"]["type"], read.get("adapter")
        rank = f" of rank {adapter['rank']}" if adapter and "rank" in adapter else ""
        return f"Trained: {model}, {adapter['type'] if adapter else 'the whole denoiser'}{rank}. "
    except (tomllib.TOMLDecodeError, KeyError, TypeError):
        return ""


def section(title: str, content: str, *, is_open: bool = True) -> str:
    """A part that can be folded; nothing without content."""
    shown = " open" if is_open else ""
    return f"<details{shown}><summary><h2>{html.escape(title)}</h2></summary>{content}</details>" if content else ""


def tiles(facts: Mapping[str, str]) -> str:
    """The numbers that one looks for first."""
    return "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
        for name, value in facts.items()
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, which scrolls by itself where it is wider than the page. The cells are text."""
    if not rows:
        return ""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def text_block(text: str) -> str:
    return f'<pre class="wide">{html.escape(text)}</pre>' if text else ""


def state(numbers: Numbers, last_step: int | None) -> dict[str, str]:
    """How far the run is, and how it does."""
    loss, times = smoothed(numbers.points("train/loss")), numbers.points("train/step_time_sec")
    step = times[-1][0] if times else 0
    facts = {"step": f"{step:.0f} of {last_step}" if last_step else f"{step:.0f}"}
    if loss:
        facts["training loss, smoothed"] = f"{loss[-1][1]:.4f}"
    for name in numbers.evaluations():
        error = numbers.last(f"{name}{ERROR}")
        sure = "" if error is None else f" ± {error:.4f}"
        facts[f"{name} at step {numbers.points(name)[-1][0]:.0f}"] = f"{numbers.last(name):.4f}{sure}"
    if times:
        facts["seconds a step"] = f"{smoothed(times)[-1][1]:.3f}"
    peaks = numbers.points("train/peak_memory_gib")
    if peaks:
        facts["GiB at most on a GPU"] = f"{max(value for _, value in peaks):.2f}"
    if numbers.ended:
        facts["from the first number to the last"] = str(timedelta(seconds=round(numbers.ended - numbers.began)))
    return facts


def warnings_of(notes: Notes) -> str:
    """The warnings and errors, in order."""
    lines = [
        f'<li class="{level.lower()}"><time>{time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when))}</time> '
        f"{html.escape(text)}</li>"
        for text, (when, level) in notes.warnings.items()
    ]
    more = f"<p>and {notes.left_out} more, which the log has</p>" if notes.left_out else ""
    return f'<ul class="warnings">{"".join(lines)}</ul>{more}' if lines else ""


def charts(numbers: Numbers) -> str:
    """All curves; one without numbers is left out."""
    return f'<div class="charts">{"".join(_charts(numbers))}</div>'


def _charts(numbers: Numbers) -> Iterator[str]:
    loss = numbers.points("train/loss")
    lines = [Line("of a step", loss, faint=True, colour="#0072b2"), Line("smoothed", smoothed(loss), colour="#0072b2")]
    yield line_chart("Training loss", lines)
    by_level = numbers.deciles()
    colours = [ORDERED[int(float(level) * 10)] for level, _ in by_level]
    lines = [
        Line(level, smoothed(points), colour=colour) for (level, points), colour in zip(by_level, colours, strict=True)
    ]
    yield line_chart("Training loss by noise level", lines, remark=f"smoothed; by tenths of the levels, {ENDS}")
    evaluated = numbers.evaluations()
    lines = [Line(name, numbers.points(name), band=numbers.band(name)) for name in evaluated]
    yield line_chart("Evaluation", lines, remark="with 95 % confidence" if any(line.band for line in lines) else "")
    for name in evaluated:
        steps = [step for step, _ in numbers.points(name)]
        rows = [(level, [at.get(step, float("nan")) for step in steps]) for level, at in numbers.quantiles(name)]
        yield heat_map(f"{name} by noise level", steps, rows, f"change since the first evaluation; {ENDS}")
    rate = [Line("", numbers.points("train/lr"))]
    yield line_chart("Learning rate", rate, may_be_logarithmic=False)
    found = [name for name in numbers.names if name.startswith(OPTIMIZER)]
    yield line_chart("What the optimizer makes of it", [Line(name, numbers.points(name)) for name in found])
    norms = numbers.points("train/grad_norm")
    lines = [
        Line("of a step", norms, faint=True, colour="#009e73"),
        Line("smoothed", smoothed(norms), colour="#009e73"),
    ]
    yield line_chart("Norm of the gradient, before clipping", lines)
    for title, beginning in NORMS.items():
        yield from _by_block(title, beginning, numbers)
    yield line_chart("Seconds of a step", [Line(told, numbers.points(name)) for name, told in PARTS.items()])
    waiting = [Line("", numbers.points("train/bubble_share"))]
    yield line_chart("Share of time in which stages wait", waiting, remark="of 1", from_zero=True)
    for what in ("samples", "tokens"):
        lines = [Line("", smoothed(numbers.points(f"train/{what}_per_sec")))]
        yield line_chart(f"{what.capitalize()} a second", lines, remark="smoothed", from_zero=True)
    held = [Line(told, numbers.points(name)) for name, told in MEMORY.items()]
    yield line_chart("Memory in GiB", held, from_zero=True)


def _by_block(title: str, beginning: str, numbers: Numbers) -> Iterator[str]:
    """A map for each list of blocks, with a row a block."""
    lists: dict[str, dict[str, dict[float, float]]] = defaultdict(dict)
    for name in numbers.names:
        if name.startswith(beginning):
            blocks, _, number = name.removeprefix(beginning).rpartition(".")
            own = dict(smoothed(numbers.points(name)))
            lists[blocks or number][number if blocks else ""] = own
    for blocks, rows in lists.items():
        steps = sorted({step for own in rows.values() for step in own})
        by_step = [(row, [own.get(step, float("nan")) for step in steps]) for row, own in rows.items()]
        yield heat_map(f"{title}, {blocks}", steps, by_step, "by block, smoothed; change since the first")


def samples(folder: Path) -> str:
    """The samples in a run's folder: a row a prompt, a column a step."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted((folder / "samples").glob("step*/*.png")):
        if step := STEP_FOLDER.fullmatch(path.parent.name):
            found.setdefault(path.stem, {})[int(step[1])] = path
    steps = sorted({step for at in found.values() for step in at})
    if not steps:
        return ""
    shown = _spread(steps)
    rows = []
    for name in list(found)[:MOST_SAMPLES]:
        cells = "".join(f"<td>{_picture(found[name].get(step), f'{name}, step {step}')}</td>" for step in shown)
        rows.append(f"<tr><th>{html.escape(name.replace('_', ' '))}</th>{cells}</tr>")
    left = [f"{len(shown)} of {len(steps)} steps"] if len(shown) < len(steps) else []
    left += [f"{MOST_SAMPLES} of {len(found)} prompts"] if len(found) > MOST_SAMPLES else []
    told = f"<p>Shown: {' and '.join(left)}; all are in the folder samples.</p>" if left else ""
    head = "".join(f"<th>step {step}</th>" for step in shown)
    return f'{told}<div class="wide"><table class="samples"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _spread(steps: Sequence[int]) -> list[int]:
    """The first, the last, and some between them."""
    if len(steps) <= MOST_SAMPLES:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (MOST_SAMPLES - 1))] for place in range(MOST_SAMPLES)]


def _picture(path: Path | None, name: str) -> str:
    if path is None:
        return ""
    try:
        encoded = _thumbnail(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, SyntaxError):
        # Pillow raises all of these for what is damaged.
        return "cannot be read"
    return f'<img src="data:image/jpeg;base64,{encoded}" alt="{html.escape(name, quote=True)}">'


@lru_cache(maxsize=2 * MOST_SAMPLES**2)
def _thumbnail(path: Path, changed: int) -> str:
    """A small JPEG as base64. It is made once, since the page is written again and again."""
    with Image.open(path, formats=["PNG"]) as picture:
        small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    written = io.BytesIO()
    small.save(written, "JPEG", quality=80)
    return base64.b64encode(written.getvalue()).decode()


def groups(step: int, sets: Mapping[str, Mapping[str, Any]]) -> str:
    """The losses of the last evaluation by size and by directory, and the files with the highest and the lowest."""
    rows, ends = [], []
    for name, one in sets.items():
        rows += [
            [name, kind, printable(group), str(count), f"{loss:.5f}"]
            for kind, group, count, loss in one.get("groups", [])
        ]
        files = one.get("extremes", [])
        ends += [
            [name, "high" if 2 * place < len(files) else "low", f"{loss:.5f}", printable(file)]
            for place, (file, loss) in enumerate(files)
        ]
    losses = table(["set", "by", "", "samples", "loss"], rows)
    return f"<p>Step {step}</p>{losses}{table(['set', 'among its losses', 'loss', 'file'], ends)}" if sets else ""


def data(described: Sequence[Mapping[str, Any]]) -> str:
    """What each dataset has, and what of it is left out, and why."""
    rows = [
        [
            str(one.get("name", "")),
            printable(one.get("file", "")),
            str(one.get("samples", "")),
            str(one.get("files", "")),
            ", ".join(f"{count} {kind}" for kind, count in dict(one.get("rejected", {})).items()) or "none",
        ]
        for one in described
    ]
    parts = [table(["set", "file", "samples", "files", "files left out"], rows)]
    for one in described:
        name = str(one.get("name", ""))
        places = [
            [printable(path), *map(str, counts)]
            for path, counts in list(dict(one.get("directories", {})).items())
            if isinstance(counts, list)
        ]
        parts.append(table([f"directory of {name}", "samples", "shown in an epoch"], places))
        buckets = [[str(size), str(count)] for size, count in dict(one.get("buckets", {})).items()]
        parts.append(table([f"size in {name}", "samples"], buckets))
        told = [str(line) for line in one.get("told", [])]
        lines = "".join(f"<li>{html.escape(printable(line))}</li>" for line in told[:LISTED])
        more = f"<li>and {len(told) - LISTED} more</li>" if len(told) > LISTED else ""
        parts.append(f"<ul>{lines}{more}</ul>" if told else "")
    return "".join(parts) if described else ""
