"""The page of a run, `run.html` in its folder, and a page that compares runs: `python -m utils.run.report RUN...`.

A page is one file, with its pictures in it, and asks nothing of any server."""

from __future__ import annotations

import argparse
import html
import logging
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.errors import UserError, without_controls
from utils.run import page_parts as parts
from utils.run.attempts import reason_of
from utils.run.charts import Line, line_chart, smoothed
from utils.run.durable import replace_text
from utils.run.evaluated import KeptEvaluations
from utils.run.folder import METRICS
from utils.run.notes import Notes, notes_in
from utils.run.numbers import Numbers

logger = logging.getLogger(__name__)

PAGE_NAME = "run.html"
COMPARISON = "comparison.html"
SETTINGS = "settings.toml"
MISSING = "-"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #222; --weak: #667; --paper: #fafafa; --card: #fff; --edge: #ddd }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e4e8; --weak: #9a9aa6; --paper: #16171b; --card: #1f2026; --edge: #3a3b44 }}
  .chart polyline, .chart circle, .key line {{ filter: brightness(1.5) }}
}}
* {{ box-sizing: border-box }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 78rem; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere }}
h1 {{ font-size: 1.35rem; margin: .2rem 0 }} h2 {{ font-size: 1.1rem; display: inline }}
details {{ margin: 1rem 0 }} summary {{ cursor: pointer; padding: .3rem 0 }}
.remark, .tile span, time {{ color: var(--weak); font-size: .85em }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem }}
.tile, .chart {{ background: var(--card); border: 1px solid var(--edge); border-radius: 6px; padding: .6rem }}
.tile b {{ display: block; font-size: 1.1rem }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .8rem }}
.chart {{ margin: 0 }} .chart > svg {{ width: 100%; height: auto; display: block }}
.chart text {{ fill: var(--ink); font-size: 11px }}
.axis {{ stroke: var(--weak) }} .grid {{ stroke: var(--edge) }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .3rem 0 0; padding: 0;
  font-size: .85em }}
.key {{ width: 24px; height: 8px; margin-right: .35rem }}
.ramp {{ display: inline-block; width: 6rem; height: .7em; border-radius: 2px }}
.warnings {{ padding-left: 1.1rem }} .error {{ font-weight: 600 }}
.wide {{ overflow-x: auto }} pre {{ background: var(--card); border: 1px solid var(--edge); padding: .6rem;
  border-radius: 6px; font-size: .82em }}
table {{ border-collapse: collapse; margin: .5rem 0; font-size: .9em }}
th, td {{ text-align: left; overflow-wrap: break-word; padding: .2rem .6rem .2rem 0;
  border-bottom: 1px solid var(--edge); vertical-align: top }}
td:last-child {{ overflow-wrap: anywhere }}
.samples th:first-child {{ min-width: 6rem; max-width: 10rem; font-weight: 400 }}
.samples td {{ border: 0 }} .samples img {{ display: block; width: {thumbnail}px; max-width: none; border-radius: 3px }}
@media (max-width: 32rem) {{
  .samples th:first-child {{ min-width: 4.5rem; font-size: .85em }} .samples td {{ padding-right: .3rem }}
  .samples img {{ width: 7.2rem }}
}}
</style></head><body>
<h1>{title}</h1>
<p class="remark">{remark}</p>
{body}
</body></html>
"""


class RunPage:
    """Writes the page of a run that goes on, from the main rank.

    Args:
        folder: of the run; None on other ranks, which write nothing.
        last_step: of the run, if it is known.
    """

    def __init__(self, folder: Path | None = None, notes: Notes | None = None):
        self.folder, self.notes = folder, notes or Notes()
        self.last_step: int | None = None
        self._numbers = Numbers(folder) if folder else None
        self._has_failed = False

    def tell_end(self, text: str) -> None:
        """Writes the page a last time, with why the run has ended."""
        self.notes.add(text)
        self.notes.how = "failed"
        self.write()

    def in_steps(self, seconds: float) -> str:
        """ ", as long as 12.3 steps", if a step has been made; on the main rank."""
        steps = smoothed(self.measured("train/step_time_sec"))
        return f", as long as {seconds / steps[-1][1]:.1f} steps" if steps else ""

    def measured(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of all that the run has measured so far; on the main rank."""
        if self._numbers is None:
            return []
        with suppress(OSError):
            self._numbers.read()
        return self._numbers.points(name)

    def write(self) -> None:
        """Writes the page anew. Whatever hinders that is told once, and training goes on."""
        if self.folder is None or self._numbers is None:
            return
        try:
            self.notes.save(self.folder)
            self._numbers.read()
            replace_text(self.folder / PAGE_NAME, page_of(self.folder, self.notes, self._numbers, self.last_step))
        except Exception as error:
            if not self._has_failed:
                logger.error("%s cannot be written, and training goes on: %s", PAGE_NAME, reason_of(error))
            self._has_failed = True


def page_of(folder: Path, notes: Notes, numbers: Numbers, last_step: int | None = None) -> str:
    """The page of a run as HTML."""
    settings = _text(folder / SETTINGS)
    stands = {f"at {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC": notes.how} if notes.how else {}
    body = [
        f'<div class="tiles">{parts.tiles(stands | parts.state(numbers, last_step))}</div>',
        parts.section("Warnings", parts.warnings_of(notes)),
        parts.section("Curves", parts.charts(numbers)),
        parts.section("Samples", parts.samples(folder)),
        parts.section("Last evaluation", parts.groups(*KeptEvaluations(folder).newest())),
        parts.section("Data", parts.data(notes.data)),
        parts.section("Plan", "".join(map(parts.text_block, notes.texts.values())), is_open=False),
        parts.section("Settings", parts.text_block(settings), is_open=False),
    ]
    unread = f"; {numbers.unreadable} lines of {METRICS} are no numbers" if numbers.unreadable else ""
    return _page(folder.absolute().name, f"{parts.what_is_trained(settings)}{folder.absolute()}{unread}", body)


def comparison_of(folders: Sequence[Path]) -> str:
    """A page with the curves of several runs over each other, the settings in which they differ, and their last
    numbers."""
    names = _names(folders)
    runs = {name: Numbers(folder) for name, folder in zip(names, folders, strict=True)}
    for numbers in runs.values():
        numbers.read()
    states = {name: parts.state(numbers, None) for name, numbers in runs.items()}
    facts = list(dict.fromkeys(fact for state in states.values() for fact in state))
    ends = [[name, *(state.get(fact, MISSING) for fact in facts)] for name, state in states.items()]
    settings = [_flat(_settings(folder)) for folder in folders]
    keys = sorted({key for one in settings for key in one})
    differing = [key for key in keys if len({one.get(key, MISSING) for one in settings}) > 1]
    rows = [[key, *(one.get(key, MISSING) for one in settings)] for key in differing]
    alike = "" if rows else "<p>Their settings are the same.</p>"
    body = [
        parts.section("Last numbers", parts.table(["run", *facts], ends)),
        parts.section("Settings that differ", parts.table(["key", *names], rows) + alike),
        parts.section("Curves", f'<div class="charts">{"".join(_compared(runs))}</div>'),
    ]
    return _page(f"{len(folders)} runs", ", ".join(str(folder.absolute()) for folder in folders), body)


def _compared(runs: Mapping[str, Numbers]) -> list[str]:
    def lines(metric: str, smooth: bool) -> list[Line]:
        found = {name: numbers.points(metric) for name, numbers in runs.items()}
        bands = {name: () if smooth else numbers.band(metric) for name, numbers in runs.items()}
        return [Line(name, smoothed(own) if smooth else own, band=bands[name]) for name, own in found.items()]

    evaluated = dict.fromkeys(name for numbers in runs.values() for name in numbers.evaluations())
    return [
        line_chart("Training loss", lines("train/loss", True), remark="smoothed"),
        *(line_chart(name, lines(name, False)) for name in evaluated),
        line_chart("Learning rate", lines("train/lr", False), may_be_logarithmic=False),
        line_chart("Norm of the gradient", lines("train/grad_norm", True), remark="smoothed"),
        line_chart("Seconds of a step", lines("train/step_time_sec", True), remark="smoothed"),
        line_chart("GiB at most on a GPU", lines("train/peak_memory_gib", False)),
    ]


def _page(title: str, remark: str, body: Sequence[str]) -> str:
    page = PAGE.format(
        title=html.escape(title), remark=html.escape(remark), body="\n".join(body), thumbnail=parts.THUMBNAIL
    )
    return without_controls(page)


def _names(folders: Sequence[Path]) -> list[str]:
    """The names of the runs; whole paths where two are the same."""
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder.absolute()) for folder in folders]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _settings(folder: Path) -> dict[str, Any]:
    """The run's settings.

    Raises:
        UserError: the file is no TOML.
    """
    try:
        return tomllib.loads(_text(folder / SETTINGS))
    except tomllib.TOMLDecodeError as error:
        raise UserError.of(f"is no TOML ({error})", str(folder / SETTINGS)) from error


def _flat(content: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """The keys of all tables, as in `optimizer.lr`, with their values as text."""
    flat: dict[str, str] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": str(value)}
    return flat


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page of one run into its folder, or that of several runs into this folder.

    Args:
        output: another place.

    Raises:
        UserError: a folder is no run's, or the page cannot be written.
    """
    for folder in folders:
        if not (folder / METRICS).is_file():
            raise UserError.of(f"has no {METRICS}; name the folder of a run", str(folder))
    if len(folders) == 1:
        numbers = Numbers(folders[0])
        numbers.read()
        page, place = page_of(folders[0], notes_in(folders[0]), numbers), folders[0] / PAGE_NAME
    else:
        page, place = comparison_of(folders), Path(COMPARISON)
    try:
        replace_text(output or place, page)
    except OSError as error:
        raise UserError.of(f"cannot be written ({error.strerror})", str(output or place)) from error
    return output or place


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 1 after a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m utils.run.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: RUN/{PAGE_NAME}, or {COMPARISON}")
    arguments = parser.parse_args(argv)
    try:
        sys.stdout.write(f"{write_report(arguments.runs, arguments.output)}\n")
    except UserError as error:
        sys.stderr.write(f"error: {without_controls(str(error))}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
