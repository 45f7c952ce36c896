"""Makes the folder of a run, and finds one to resume."""

from __future__ import annotations

import logging
import re
import shutil
from datetime import UTC, datetime
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
    name = datetime.now(UTC).strftime("%Y%m%d_%H-%M-%S")
    taken = [
        candidate for number in range(1, 100) if not (output_dir / (candidate := _numbered(name, number))).exists()
    ]
    return taken[0]


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}_{number}"


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
        (folder / "config.toml").write_text(_without_key(config, settings), encoding="utf-8")
        shutil.copyfile(settings.dataset, folder / "dataset.toml")
        for entry in settings.eval_datasets:
            shutil.copyfile(entry.config, folder / f"dataset_{entry.name.replace('/', '_')}.toml")
        write_resolved(settings, folder / "settings.toml")
        logger.info("run folder: %s", folder)
    barrier()
    return folder


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


def find_checkpoint(output_dir: Path, asked: str | None) -> Path:
    """The checkpoint to resume: the one that `asked` names, or the newest one of the run that it names (a path, or a
    name in `output_dir`), or the newest one of the newest run.

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
        return _newest_of(resumable[-1])
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


def _newest_of(run: Path) -> Path:
    newest = run / (run / LATEST).read_text().strip()
    if newest.is_dir() and newest != run:
        return newest
    there = [str(path) for path in checkpoints_before(run / LATEST)]
    raise UserError.of(
        f"names no checkpoint; name one with --resume_from_checkpoint. There are: {', '.join(there) or 'none'}",
        str(run / LATEST),
    )
