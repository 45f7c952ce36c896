"""The samples of all steps on one picture: a row a prompt, a column a step."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from utils.run.sample_texts import PARAMETERS

SHEET = "sheet.png"
CELL, GAP, HEAD, SIDE = 160, 4, 22, 180
"""Pixels: the longer side of a picture, the room between two, the line of steps, the column of prompts."""
MOST_STEPS, MOST_PROMPTS = 12, 24
LINES, LETTERS = 7, 27
"""So much of a prompt is shown."""
PAPER, INK = (255, 255, 255), (30, 30, 30)


@dataclass(frozen=True)
class _Grid:
    """What a sheet shows: a file for each row's name and column's step, where there is one."""

    steps: Sequence[Path]
    names: Sequence[str]
    files: Mapping[tuple[str, Path], Path]

    def small(self, name: str, step: Path) -> Image.Image | None:
        """The picture of a cell."""
        file = self.files.get((name, step))
        return None if file is None else _small(file, file.stat().st_mtime_ns)

    def label(self, name: str) -> str:
        """The prompt of a row, from its newest picture."""
        return _label(next(self.files[name, step] for step in reversed(self.steps) if (name, step) in self.files))


def write_sheet(folder: Path) -> Path | None:
    """Writes `sheet.png` from what is in `folder/step000100/`, and returns it; None if there is nothing. Of many steps
    some are shown, the first and the newest among them; of many prompts those that were drawn last.

    Raises:
        OSError: a picture cannot be read, or the sheet not be written.
    """
    grid = _grid_of(folder)
    if not grid.steps:
        return None
    cells = {
        (name, step): small
        for name in grid.names
        for step in grid.steps
        if (small := grid.small(name, step)) is not None
    }
    heights = [max(cell.height for (row, _), cell in cells.items() if row == name) for name in grid.names]
    widths = [max([CELL // 2, *(cell.width for (_, at), cell in cells.items() if at == step)]) for step in grid.steps]
    lefts, tops = _places(SIDE, widths), _places(HEAD, heights)
    sheet = Image.new("RGB", (lefts[-1], tops[-1]), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for step, left in zip(grid.steps, lefts, strict=False):
        pen.text((left, 4), f"step {int(step.name.removeprefix('step'))}", INK, font)
    for name, top in zip(grid.names, tops, strict=False):
        pen.multiline_text((GAP, top), grid.label(name), INK, font, spacing=2)
    for (name, step), cell in cells.items():
        sheet.paste(cell, (lefts[grid.steps.index(step)], tops[grid.names.index(name)]))
    # Nobody who looks at it meanwhile finds half of it.
    unfinished = folder / f"{SHEET}.unfinished"
    sheet.save(unfinished, format="PNG", optimize=True)
    os.replace(unfinished, folder / SHEET)
    return folder / SHEET


def _grid_of(folder: Path) -> _Grid:
    steps = sorted(path for path in folder.glob("step*") if re.fullmatch(r"step\d+", path.name))
    files = {(file.name, step): file for step in steps for file in sorted(step.glob("*.png"))}
    drawn = {step for _, step in files}
    shown = _some([step for step in steps if step in drawn], MOST_STEPS)
    # What was drawn last comes first, below it prompts that are no more drawn.
    names = dict.fromkeys(name for step in reversed(shown) for name, at in files if at == step)
    return _Grid(shown, list(names)[:MOST_PROMPTS], files)


def _some(steps: Sequence[Path], most: int) -> list[Path]:
    """At most so many, at even distances, with the first and the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]


def _places(first: int, sizes: Sequence[int]) -> list[int]:
    """Where parts of these sizes begin, and where the last one ends."""
    return list(accumulate((size + GAP for size in sizes), initial=first))


# Of a hundred large pictures the old ones need not be read again.
@lru_cache(maxsize=MOST_STEPS * MOST_PROMPTS)
def _small(file: Path, changed: int) -> Image.Image:
    with Image.open(file, formats=["PNG"]) as picture:
        small = picture.convert("RGB")
    small.thumbnail((CELL, CELL))
    return small


def _label(file: Path) -> str:
    """The prompt of a picture, in short lines."""
    with Image.open(file, formats=["PNG"]) as picture:
        prompt = picture.info.get(PARAMETERS, file.stem).splitlines()[0]
    return "\n".join(textwrap.wrap(prompt, LETTERS, max_lines=LINES, placeholder=" ..."))
