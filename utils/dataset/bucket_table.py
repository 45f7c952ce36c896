"""The table of buckets that the plan shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from utils.dataset.samples import Sample


@dataclass(frozen=True)
class BucketLine:
    """The share of an epoch that the samples of one shape have.

    `batches` are micro-batches; `fill` counts the samples that are repeated to complete them. In the line of the total,
    `name` is empty and the micro-batches that complete the last step count too.
    """

    name: str
    frames: int
    files: int
    samples: int
    repeats: float
    batches: int
    fill: int


def line_of(name: str, samples: Sequence[Sample], appearing: int, batches: int, fill: int) -> BucketLine:
    # A file is one object, however many samples it has; of a million, to compare places takes seconds.
    files = {id(sample.media) for sample in samples}
    return BucketLine(
        name, samples[0].bucket.frames if name else 0, len(files), appearing, appearing / len(samples), batches, fill
    )


def format_table(lines: Iterable[BucketLine]) -> str:
    """The table as text, columns aligned."""
    rows: list[tuple] = [("bucket", "frames", "files", "samples", "repeats", "batches", "fill")]
    rows += [
        (
            line.name or "total",
            line.frames or "",
            line.files,
            line.samples,
            f"{line.repeats:.4g}",
            line.batches,
            line.fill,
        )
        for line in lines
    ]
    width = max(len(row[0]) for row in rows) + 2
    text = "\n".join(f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in rows)
    if any(row[-1] for row in rows[1:]):
        text += "\nfill: how often samples are used once more, so that the last batch of a size is full too"
    return text
