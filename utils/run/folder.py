"""Makes the folder of a run, and finds one to resume."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path

from utils.errors import UserError
from utils.ranks import Ranks, barrier, gather
from utils.settings.reader import write_resolved
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

RUN_NAME = re.compile(r"\d{8}_\d{2}-\d{2}-\d{2}(_\d+)?$")
LATEST = "latest"
CHECKPOINT_NAME = re.compile(r"global_step(\d+)")


def new_name(output_dir: Path) -> str:
    """A name for a new run: the UTC date and time, and a number if that second is taken."""
    return _free_name(output_dir, datetime.now(UTC).strftime("%Y%m%d_%H-%M-%S"))


def _free_name(folder: Path, name: str) -> str:
    """The name, or with the lowest number behind it that is not taken in the folder."""
    names = chain([name], (f"{name}_{number}" for number in count(2)))
    return next(candidate for candidate in names if not (folder / candidate).exists())


def checkpoints_before(checkpoint: Path) -> list[Path]:
    """The complete checkpoints in the folder of a checkpoint that were written before it, oldest first; the checkpoint
    itself may be missing."""
    steps = {
        int(found[1]): path
        for path in checkpoint.parent.glob("global_step*")
        if (found := CHECKPOINT_NAME.fullmatch(path.name))
    }
    this = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    return [steps[step] for step in sorted(steps) if not this or step < int(this[1])]


def create(settings: Settings, ranks: Ranks, config: Path) -> Path:
    """Makes a folder for this run, the same on every rank, with copies of the user's files and the resolved
    settings."""
    folder = settings.output_dir / gather(ranks, "run folder", new_name(settings.output_dir))[0]
    if ranks.is_main:
        _make(folder)
        _record(folder, settings, config)
        logger.info("run folder: %s", folder)
    barrier()
    return folder


def go_on(folder: Path, settings: Settings, ranks: Ranks, config: Path, step: int) -> Path:
    """The folder of a run that goes on from `step`, in which this leaves a record of its own: what `create` copies, in
    `resumed_step500`, since settings may have changed."""
    if ranks.is_main:
        record = folder / _free_name(folder, f"resumed_step{step}")
        _make(record)
        _record(record, settings, config)
        logger.info("run folder: %s; the settings from step %d on: %s", folder, step, record.name)
    return folder


def _record(place: Path, settings: Settings, config: Path) -> None:
    (place / "config.toml").write_text(_without_key(config, settings), encoding="utf-8")
    shutil.copyfile(settings.dataset, place / "dataset.toml")
    for entry in settings.eval_datasets:
        shutil.copyfile(entry.config, place / f"dataset_{entry.name.replace('/', '_')}.toml")
    write_resolved(settings, place / "settings.toml")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError.of(
            f"the run's folder {folder} cannot be made ({error.strerror}); name another place", where="key `output_dir`"
        ) from error


def _without_key(config: Path, settings: Settings) -> str:
    """The run's file as the user wrote it, without the account's key, since run folders are shared."""
    text, key = config.read_text(encoding="utf-8"), settings.monitoring.wandb_api_key
    return text.replace(key, "") if key else text


def find_checkpoint(output_dir: Path, asked: str | None, of_other_run: Callable[[Path], Sequence[str]]) -> Path:
    """The checkpoint to resume: the one that `asked` names, or the newest one of the run that it names (a path, or a
    name in `output_dir`), or the newest one of the newest run of this config.

    Args:
        of_other_run: checkpoint -> why it is one of another run; nothing if it is not.

    Raises:
        UserError: there is none, or it holds no checkpoint; says what there is.
    """
    runs = (
        sorted(p for p in output_dir.glob("*") if p.is_dir() and RUN_NAME.match(p.name)) if output_dir.is_dir() else []
    )
    resumable = [run for run in runs if (run / LATEST).is_file()]
    known = ", ".join(run.name for run in resumable[-5:]) or "none"
    if not asked:
        if not resumable:
            raise UserError.of(
                f"no run with a checkpoint to resume; {len(runs)} runs are here. Start without "
                "--resume_from_checkpoint",
                str(output_dir),
            )
        return _newest_of_this_run(resumable, of_other_run)
    candidates = [Path(asked), output_dir / asked]
    folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if folder is None:
        raise UserError.of(
            f"no such folder '{asked}'; runs with a checkpoint in {output_dir}: {known}",
            where="--resume_from_checkpoint",
        )
    if folder.name.startswith("global_step"):
        return folder
    if not (folder / LATEST).is_file():
        raise UserError.of(
            f"'{folder}' holds no checkpoint (no file '{LATEST}'); exports are for inference only. "
            f"Runs with a checkpoint in {output_dir}: {known}",
            where="--resume_from_checkpoint",
        )
    return _newest_of(folder)


def _newest_of_this_run(runs: Sequence[Path], of_other_run: Callable[[Path], Sequence[str]]) -> Path:
    """The newest checkpoint of the last of `runs` that is not another's; those that are passed over are named."""
    passed = []
    for run in reversed(runs):
        checkpoint = _newest_of(run)
        reasons = of_other_run(checkpoint)
        if not reasons:
            for other in passed:
                logger.warning("passed over a newer run, which is not this config's: %s", other)
            return checkpoint
        passed.append(f"{run.name}: {', '.join(reasons)}")
    listed = "".join(f"\n    {other}" for other in passed[:5])
    raise UserError.of(
        "no run with a checkpoint is this config's. Start without --resume_from_checkpoint; or name one that was only "
        f"trained on other data, or on a model in another place, as in --resume_from_checkpoint {runs[-1].name}. "
        f"The newest first:{listed}",
        str(runs[-1].parent),
    )


def _newest_of(run: Path) -> Path:
    newest = run / (run / LATEST).read_text().strip()
    if newest.is_dir() and newest != run:
        return newest
    there = [str(path) for path in checkpoints_before(run / LATEST)]
    raise UserError.of(
        f"names no checkpoint; name one with --resume_from_checkpoint. There are: {', '.join(there) or 'none'}",
        str(run / LATEST),
    )
