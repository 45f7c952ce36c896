"""Makes the folder of a run, and finds one to resume."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tomllib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

import toml

from utils.errors import UserError, printable
from utils.json_files import read_json
from utils.ranks import Ranks, barrier, gather
from utils.run.durable import write_bytes
from utils.settings.reader import write_resolved
from utils.settings.run_tables import SECRETS
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

RUN_NAME = re.compile(r"\d{8}_\d{2}-\d{2}-\d{2}(?:_(?P<own>.+?))??(_\d+)?$")
"""Date, time, the run's own name, and a number if that was taken."""
BEGAN = len("20260101_12-00-00")
SETTINGS = "settings.toml"
CONFIG_NOTE = "config: "
"""What a line at the top of the settings begins with that names the config."""
LATEST = "latest"
OTHER_KEY = re.compile(rf"(?:{'|'.join(SECRETS)})" + r"""["']?\s*[=:]\s*+(?!(?:""|'')(?!["']))""")
"""A secret with a value that is not empty, also in a comment."""
REPLACED = ".replaced"
"""What a checkpoint's name ends with while another of the same step takes its place."""
PROGRESS = "progress.json"
METRICS = "metrics.jsonl"
LAST_BYTES = 4096
"""A line of metrics is shorter than that."""
SAVED_AT = "saved_at"
"""Where a checkpoint's `progress.json` says when it was written, in seconds since 1970."""
CHECKPOINT_NAME = re.compile(r"global_step(\d+)(\.replaced)?")


def new_name(output_dir: Path, run_name: str | None = None) -> str:
    """A name for a new run: the UTC date and time, its own name, and a number if that is taken."""
    began = datetime.now(UTC).strftime("%Y%m%d_%H-%M-%S")
    return free_name(output_dir, f"{began}_{run_name}" if run_name else began)


def free_name(folder: Path, name: str) -> str:
    """The name, or with the lowest number behind it that is not taken in the folder."""
    names = chain([name], (f"{name}_{number}" for number in count(2)))
    return next(candidate for candidate in names if not (folder / candidate).exists())


def checkpoints_before(checkpoint: Path) -> list[Path]:
    """The complete checkpoints in the folder of a checkpoint that were written before it, oldest first; the checkpoint
    itself may be missing."""
    steps: dict[int, Path] = {}
    # In this order, so that one that was to be replaced counts only if the new one did not come to its place.
    for path in sorted(checkpoint.parent.glob("global_step*"), key=lambda path: not path.name.endswith(REPLACED)):
        if (found := CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir():
            steps[int(found[1])] = path
    this = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    return [steps[step] for step in sorted(steps) if not this or step < int(this[1])]


def create(settings: Settings, ranks: Ranks, config: Path) -> Path:
    """Makes a folder for this run, the same on every rank, with copies of the user's files and the resolved
    settings."""
    folder = settings.output_dir / gather(ranks, "run folder", new_name(settings.output_dir, settings.run_name))[0]
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
        record = folder / free_name(folder, f"resumed_step{step}")
        _make(record)
        _record(record, settings, config)
        logger.info("run folder: %s; the settings from step %d on: %s", folder, step, record.name)
    return folder


def is_run_of(folder: Path, config: Path) -> bool:
    """Whether the run of this folder was begun with the file `config`."""
    try:
        lines = (folder / SETTINGS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False
    return f"# {CONFIG_NOTE}{printable(config.resolve())}" in lines


class KeptRecords:
    """The records in a run's folder (settings and copies of the user's files), kept in memory for a folder that is
    deleted while the run goes on."""

    def __init__(self, folder: Path):
        self.folder = folder
        found = [*folder.glob("*.toml"), *folder.glob("resumed_step*/*.toml")]
        self.records = {path: path.read_bytes() for path in found}
        self._identity = self._seen()

    def _seen(self) -> int | None:
        try:
            return self.folder.stat().st_ino
        except OSError:
            return None

    def folder_is_lost(self) -> bool:
        """Whether the folder is not there any more, or another has come to its place, as a checkpoint makes one."""
        return self._seen() != self._identity

    def make_again(self) -> None:
        """Makes the folder, with its records.

        Raises:
            OSError: it cannot be made.
        """
        for path, content in self.records.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)
        self._identity = self._seen()


def _record(place: Path, settings: Settings, config: Path) -> None:
    (place / "config.toml").write_text(_without_key(config, settings), encoding="utf-8")
    shutil.copyfile(settings.dataset, place / "dataset.toml")
    for entry in (one for one in settings.eval_datasets if one.config):
        shutil.copyfile(entry.config, place / f"dataset_{entry.name.replace('/', '_')}.toml")
    write_resolved(settings, place / SETTINGS, note=f"{CONFIG_NOTE}{printable(config.resolve())}")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError.of(
            f"the run's folder {folder} cannot be made ({error.strerror}); name another place", where="key `output_dir`"
        ) from error


def _without_key(config: Path, settings: Settings) -> str:
    """The run's file as the user wrote it, without its secrets, since run folders are shared; as a table without
    comments, if one is written so that it cannot be cut out, or another one may be in a comment."""
    text = config.read_text(encoding="utf-8")
    secrets = [secret for name in SECRETS if (secret := getattr(settings.monitoring, name))]
    if not secrets and not OTHER_KEY.search(text):
        return text
    written, cut = tomllib.loads(text.removeprefix("\ufeff")), text
    # One may be a part of another.
    for secret in sorted(secrets, key=len, reverse=True):
        cut = cut.replace(secret, "")
    try:
        left = tomllib.loads(cut.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError:
        left = {}
    # Nothing else is changed, the secrets are empty, and so they are in every comment.
    is_empty = not any(left.get("monitoring", {}).get(name) for name in SECRETS) and not OTHER_KEY.search(cut)
    if _keyless(left) == _keyless(written) and is_empty:
        return cut
    head = "# Written anew, without the keys of [monitoring] that are for nobody else, and without comments."
    return f"{head}\n{toml.dumps(_keyless(written))}"


def _keyless(table: Any) -> Any:
    """The same without secrets."""
    if isinstance(table, list):
        return [_keyless(entry) for entry in table]
    if not isinstance(table, dict):
        return table
    return {name: _keyless(entry) for name, entry in table.items() if name not in SECRETS}


def find_checkpoint(
    output_dir: Path,
    asked: str | None,
    of_other_run: Callable[[Path], Sequence[str]],
    damage_in: Callable[[Path], str | None] = lambda checkpoint: None,
) -> Path:
    """The checkpoint to resume: the one that `asked` names, or the newest whole one of the run that it names (a path,
    or a name in `output_dir`), or the newest whole one of the newest run of this config. What is passed over is named.

    Args:
        of_other_run: checkpoint -> why it is one of another run; nothing if it is not.
        damage_in: checkpoint -> what is damaged in it, None if it is whole.

    Raises:
        UserError: there is none, or it is damaged, or holds no checkpoint; says what there is.
    """
    runs = runs_in(output_dir)
    resumable = [run for run in runs if _newest_first(run)]
    known = ", ".join(run.name for run in resumable[-5:]) or "none"
    if not asked:
        if not resumable:
            raise UserError.of(
                f"no run with a checkpoint to resume; {len(runs)} runs are here. Start without "
                "--resume_from_checkpoint",
                str(output_dir),
            )
        run = _newest_of_this_config(resumable, of_other_run)
        for newer in runs[runs.index(run) + 1 :]:
            if newer not in resumable:
                logger.warning("passed over a newer run, which has no checkpoint: %s", newer.name)
        return _newest_whole(run, damage_in)
    candidates = [Path(asked), output_dir / asked]
    folder = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if folder is None:
        raise UserError.of(
            f"no such folder '{asked}'; runs with a checkpoint in {output_dir}: {known}",
            where="--resume_from_checkpoint",
        )
    if folder.name.startswith("global_step"):
        if damage := damage_in(folder):
            raise UserError.of(f"the checkpoint is damaged. {damage}. {_whole_before(folder, damage_in)}", str(folder))
        return folder
    if not _newest_first(folder):
        raise UserError.of(
            f"'{folder}' holds no checkpoint (no folder 'global_step...'); exports are for inference only. "
            f"Runs with a checkpoint in {output_dir}: {known}",
            where="--resume_from_checkpoint",
        )
    return _newest_whole(folder, damage_in)


def runs_in(output_dir: Path) -> list[Path]:
    """The folders of runs, the one that has come further last at the end. When that was, is known by what is in it; a
    name may have been given by a clock that was wrong, or by a user."""
    named = [path for path in output_dir.glob("*") if path.is_dir() and _is_of_a_run(path)]
    return sorted(named, key=lambda run: (_active_at(run), run.name))


def _is_of_a_run(folder: Path) -> bool:
    """Whether a folder has the name that its run was given, and not one that a user gave to a copy."""
    named = RUN_NAME.match(folder.name)
    if not named or named["own"] is None:
        return named is not None
    try:
        own = tomllib.loads((folder / SETTINGS).read_text(encoding="utf-8")).get("run_name")
    except (OSError, ValueError):
        return False
    began = folder.name[:BEGAN]
    return own is not None and bool(re.fullmatch(rf"{re.escape(began)}_{re.escape(own)}(_\d+)?", folder.name))


def _active_at(run: Path) -> float:
    """When a run wrote its newest checkpoint, or a number if that was later; if neither, when it began."""
    times = [saved_at(checkpoint) for checkpoint in _newest_first(run)[:1]]
    times += [_measured_at(run / METRICS)] if (run / METRICS).is_file() else []
    return max(times, default=run.stat().st_mtime)


def saved_at(checkpoint: Path) -> float:
    """When a checkpoint was written, in seconds since 1970; 0 if that is not known."""
    path = checkpoint / PROGRESS
    try:
        return float(read_json(path)[SAVED_AT])
    except (UserError, KeyError, TypeError, ValueError):
        # Of an earlier version, or damaged.
        return path.stat().st_mtime if path.is_file() else 0.0


def _measured_at(metrics: Path) -> float:
    """The time of the last number in a file of metrics, 0 if it has none."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - LAST_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0.0
    # The last one may have been cut by a kill.
    for line in reversed(lines[-2:]):
        try:
            return float(json.loads(line)["time"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0.0


def _newest_of_this_config(runs: Sequence[Path], of_other_run: Callable[[Path], Sequence[str]]) -> Path:
    """The last of `runs` whose newest checkpoint is not another config's; those that are passed over are named."""
    passed = []
    for run in reversed(runs):
        reasons = of_other_run(_newest_first(run)[0])
        if not reasons:
            for other in passed:
                logger.warning("passed over a newer run, which is not this config's: %s", other)
            return run
        passed.append(f"{run.name}: {', '.join(reasons)}")
    listed = "".join(f"\n    {other}" for other in passed[:5])
    raise UserError.of(
        "no run with a checkpoint is this config's. Start without --resume_from_checkpoint; or name one that was only "
        f"trained on other data, or on a model in another place, as in --resume_from_checkpoint {runs[-1].name}. "
        f"The newest first:{listed}",
        str(runs[-1].parent),
    )


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that `latest` names, if it does."""
    try:
        name = (run / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    named = CHECKPOINT_NAME.fullmatch(name)
    return run / name if named and (run / name).is_dir() else None


def newest_checkpoints(output_dir: Path) -> list[Path]:
    """The newest checkpoint of each run that has one, damaged or not."""
    return [checkpoints[0] for run in runs_in(output_dir) if (checkpoints := _newest_first(run))]


def _newest_first(run: Path) -> list[Path]:
    """The checkpoints of a run, from the one that `latest` names to the oldest; all of them if it names none."""
    latest = newest_checkpoint(run)
    return ([latest] if latest else []) + checkpoints_before(latest or run / LATEST)[::-1]


def _newest_whole(run: Path, damage_in: Callable[[Path], str | None]) -> Path:
    """The newest checkpoint of a run that is not damaged.

    Raises:
        UserError: there is none.
    """
    damages = []
    for checkpoint in _newest_first(run):
        damage = damage_in(checkpoint)
        if damage is None:
            for other in damages:
                logger.warning("passed over a newer checkpoint, which is damaged. %s", other)
            if newest_checkpoint(run) is None:
                logger.warning("'%s' is missing or names no checkpoint; the newest is taken: %s", LATEST, checkpoint)
            return checkpoint
        damages.append(damage)
    listed = "".join(f"\n    {damage}" for damage in damages[:5])
    raise UserError.of(
        f"every checkpoint is damaged; name another run, or start again. The newest first:{listed}", str(run)
    )


def _whole_before(damaged: Path, damage_in: Callable[[Path], str | None]) -> str:
    """Names the newest whole checkpoint before a damaged one."""
    for checkpoint in reversed(checkpoints_before(damaged)):
        if damage_in(checkpoint) is None:
            return f"The newest whole one before it is --resume_from_checkpoint {checkpoint}"
    return "There is no whole one before it; name another with --resume_from_checkpoint"
