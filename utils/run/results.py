"""What a run has left in its folder, for the user to find."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from utils.run.export import exports_in
from utils.run.folder import newest_checkpoint
from utils.run.report import PAGE_NAME


def results(folder: Path) -> str:
    """A line with its path for everything in the run's folder that one may look for after a run."""
    return "\n".join(f"  {what and what + ':':<12}{where}" for what, where in _results(folder))


def weights_in(export: Path) -> list[Path]:
    """The files of an export that other programs load, and its parts of a diffusers folder."""
    return sorted(path for path in export.iterdir() if path.is_dir() or path.suffix == ".safetensors")


def _results(folder: Path) -> Iterator[tuple[str, str]]:
    exports = exports_in(folder)
    newest = [export for export in exports if export.metadata["step"] == exports[-1].metadata["step"]]
    for export in newest:
        for path in weights_in(export.folder):
            yield "weights", str(path)
    if earlier := len(exports) - len(newest):
        yield "", f"and {earlier} earlier export{'s' if earlier > 1 else ''} beside it"
    if newest := newest_checkpoint(folder):
        yield "checkpoint", str(newest)
    if (folder / "samples").is_dir():
        yield "samples", str(folder / "samples")
    if (folder / PAGE_NAME).is_file():
        yield "page", str(folder / PAGE_NAME)
    yield "metrics", str(folder / "metrics.jsonl")
    if (folder / "tensorboard_logs").is_dir():
        yield "", f"tensorboard --logdir {folder}"
