"""A run that goes on from one of its older checkpoints: what it had after that is set aside, so that its folder holds
one line of steps, and the next resume goes on in that.

    after_step300.set_aside/
        global_step600/ latest       checkpoints of later steps
        metrics.jsonl                as it was
        epoch5/ samples/step000600/  exports and samples of later steps

It can be named like a run, to go on from what is in it.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError
from utils.run.durable import replace_text
from utils.run.evaluated import KeptEvaluations
from utils.run.export import exports_in
from utils.run.folder import CHECKPOINT_NAME, LATEST, METRICS, free_name, newest_checkpoint

logger = logging.getLogger(__name__)

SET_ASIDE = ".set_aside"
UNFINISHED = re.compile(
    r"global_step\d+\.(unfinished|removed)|(epoch|step)\d+(_step\d+)?(_ema)?\.(unfinished|parts|removed)"
)
"""Checkpoints and exports of which a process that was killed had written, or removed, a part."""
SAMPLES = "samples"


def begin_branch(checkpoint: Path, step: int) -> None:
    """Lets a run's folder be that of a run which has come to this checkpoint and no further: `latest` names it, and if
    there are checkpoints of later steps, these are set aside with what else is of later steps. What a killed process
    had not finished is removed. To be called by one process, which has the folder for itself, when nothing is left that
    may be refused.

    Raises:
        UserError: something cannot be written or moved.
    """
    run = checkpoint.parent
    for path in run.iterdir():
        if UNFINISHED.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            logger.info("removed what a killed process had not finished: %s", path.name)
    latest, later = newest_checkpoint(run), list(_later_checkpoints(run, step))
    try:
        if latest != checkpoint:
            replace_text(run / LATEST, checkpoint.name)
        if later:
            _set_aside(run, step, later, latest)
        KeptEvaluations(run).forget_after(step)
    except OSError as error:
        raise UserError.of(
            f"cannot go on from {checkpoint.name}: {error.strerror}", str(error.filename or run)
        ) from error


def _later_checkpoints(run: Path, step: int) -> Iterator[Path]:
    for path in sorted(run.glob("global_step*")):
        found = CHECKPOINT_NAME.fullmatch(path.name)
        if found and int(found[1]) > step and path.is_dir():
            yield path


def _later_exports(run: Path, step: int) -> Iterator[Path]:
    for made in exports_in(run):
        if made.metadata["step"].isdigit() and int(made.metadata["step"]) > step:
            yield made.folder


def _later_samples(run: Path, step: int) -> Iterator[Path]:
    for path in sorted((run / SAMPLES).glob("step*")):
        number = path.name.removeprefix("step")
        if number.isdigit() and int(number) > step:
            yield path


def _set_aside(run: Path, step: int, checkpoints: list[Path], latest: Path | None) -> None:
    aside = run / free_name(run, f"after_step{step}{SET_ASIDE}")
    aside.mkdir()
    if (run / METRICS).exists():
        shutil.copyfile(run / METRICS, aside / METRICS)
    moved = [*checkpoints, *_later_exports(run, step), *_later_samples(run, step)]
    for path in moved:
        target = aside / path.relative_to(run)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    if latest in checkpoints:
        (aside / LATEST).write_text(latest.name, encoding="utf-8")
    names = ", ".join(str(path.relative_to(run)) for path in moved)
    logger.warning(
        "what this run had after step %d is set aside, as %s: %s; --resume_from_checkpoint %s goes on from there",
        step,
        aside.name,
        names,
        aside,
    )
