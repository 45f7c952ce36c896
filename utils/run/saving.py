"""Writes checkpoints; `checkpoint.py` says what is in them, and reads them.

A checkpoint is written under another name, and gets its own when all its bytes are on disk; `latest` follows. No older
one goes before that.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from optimizers.ema import EMA
from utils.errors import UserError
from utils.parallel.sharding import Shares
from utils.ranks import Ranks, gather
from utils.run.attempts import Attempt, Failed
from utils.run.checkpoint import NamedParameters, state_file
from utils.run.checksums import Sums, damage_of, forget_cached, own_sum, sums_of
from utils.run.durable import replace_text, sync_folder, write_bytes
from utils.run.folder import LATEST, PROGRESS, REPLACED, SAVED_AT, checkpoints_before
from utils.run.owed import OWED, Owed
from utils.run.progress import Progress
from utils.run.progress_file import CHECKSUMS, CHECKSUMS_KEY, FORMAT
from utils.run.tensor_file import write_tensors

REMOVED = ".removed"
UNFINISHED = ".unfinished"


def save(
    folder: Path,
    ranks: Ranks,
    progress: Progress,
    parameters: NamedParameters,
    optimizer: torch.optim.Optimizer,
    made_with: Mapping[str, Any],
    ema: EMA | None = None,
    shares: Shares | None = None,
    *,
    owed: Owed | None = None,
    read_back: bool = False,
) -> Path:
    """Writes the checkpoint of this step into the run's folder; all ranks call it, and one per stage writes, or all
    that have a share.

    Args:
        parameters: the trainable parameters of this stage by name.
        made_with: settings that a resumed run should share, under the names in `MADE_WITH`; the user is told if they
            differ.
        ema: the averages of these parameters, if there are any.
        shares: which of the parameters `optimizer` has, and `ema`; default: all of them, as they are.
        owed: what is still to be done after this step; default: nothing.
        read_back: reads what was written before the checkpoint counts, since older ones are to be removed.

    Raises:
        UserError: on every rank, if one cannot write; nothing of it is left, and older ones stay.
    """
    shares = shares or Shares(parameters)
    name = f"global_step{progress.step}"
    unfinished = folder / f"{name}{UNFINISHED}"
    attempt = Attempt(f"checkpoint {progress.step}", ranks)
    shared = ranks.data_ranks if shares.divided else 1
    content = _content(ranks, progress, made_with, owed or Owed(progress), ema_since=ema and ema.since, shares=shared)
    try:
        if ranks.is_main:
            attempt.alone(_make_anew, unfinished)
        attempt.meet()
        sums: dict[str, Sums] | None = {}
        if shares.divided or ranks.data_rank == 0:
            weights = parameters if ranks.data_rank == 0 else {}
            path = unfinished / state_file(ranks.stage, ranks.data_rank)
            sums = attempt.alone(_write_state, path, weights, shares.stepped, optimizer, ema, read_back)
        attempt.meet()
        gathered = gather(ranks, attempt.name, sums)
        if ranks.is_main:
            attempt.alone(_finish, unfinished, folder / name, content, gathered, read_back)
        attempt.meet()
    except Failed as failed:
        if ranks.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        why = f"the checkpoint of step {progress.step} is not written: {failed}. {_newest(folder)}"
        raise UserError.of(why, str(folder)) from failed
    return folder / name


def _content(
    ranks: Ranks, progress: Progress, made_with: Mapping[str, Any], owed: Owed, **further: Any
) -> dict[str, Any]:
    """What `progress.json` says."""
    return {
        "format": FORMAT,
        SAVED_AT: time.time(),
        "stages": ranks.stages,
        "progress": progress.as_dict(),
        OWED: owed.as_dict(),
        "made_with": dict(made_with),
        CHECKSUMS_KEY: CHECKSUMS,
        **further,
    }


def _newest(folder: Path) -> str:
    before = checkpoints_before(folder / LATEST)
    if not before:
        return "Make room, and start again; there is no older one"
    return f"Make room, and go on from the newest: --resume_from_checkpoint {before[-1]}"


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_state(
    path: Path,
    weights: NamedParameters,
    stepped: NamedParameters,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    read_back: bool,
) -> dict[str, Sums]:
    sums = write_tensors(path, _state(weights, stepped, optimizer, ema))
    if read_back:
        _read_back(path, sums)
    return {path.name: sums}


def _read_back(path: Path, sums: Sums) -> None:
    """Whether the disk has kept what was written.

    Raises:
        UserError: it has not.
    """
    forget_cached(path)
    if damage := damage_of(path, sums):
        raise UserError.of(f"{damage}, as reading it back has shown", str(path))


def _finish(
    unfinished: Path, finished: Path, content: Mapping[str, Any], gathered: list[dict[str, Sums]], read_back: bool
) -> None:
    """Completes a checkpoint and gives it its place. One of the same step waits under another name, by which it can be
    found too, until `latest` names the new one."""
    sums = {name: own for of_rank in gathered for name, own in of_rank.items()}
    progress = json.dumps(content, indent=2).encode()
    sums[PROGRESS] = sums_of(progress)
    checksums = json.dumps({"files": sums, "of_these": own_sum(sums)}).encode()
    for name, written in ((PROGRESS, progress), (CHECKSUMS, checksums)):
        write_bytes(unfinished / name, written)
        if read_back:
            _read_back(unfinished / name, sums_of(written))
    sync_folder(unfinished)
    replaced = finished.with_name(finished.name + REPLACED)
    if finished.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        finished.rename(replaced)
    unfinished.rename(finished)
    sync_folder(finished.parent)
    replace_text(finished.parent / LATEST, finished.name)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_older(newest: Path, keep: int, spared: Path | None) -> None:
    """Removes older checkpoints than `newest` so that `keep` are left, except for `spared`.

    Each is renamed first, so that a half-removed one does not look complete if the process is killed. `newest` was read
    back when it was saved.
    """
    for leftover in newest.parent.glob(f"global_step*{REMOVED}"):
        shutil.rmtree(leftover, ignore_errors=True)
    before = checkpoints_before(newest)
    for old in before[: max(0, len(before) + 1 - keep)]:
        if spared is None or old.resolve() != spared.resolve():
            shutil.rmtree(old.rename(old.with_name(old.name + REMOVED)), ignore_errors=True)


def _state(
    weights: NamedParameters, stepped: NamedParameters, optimizer: torch.optim.Optimizer, ema: EMA | None
) -> dict[str, torch.Tensor]:
    tensors = {f"weights/{name}": parameter.detach() for name, parameter in weights.items()}
    tensors |= {f"ema/{name}": average for name, average in (ema.averages if ema else {}).items()}
    for name, parameter in stepped.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return tensors
