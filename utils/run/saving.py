"""Writes checkpoints; `checkpoint.py` says what is in them, and reads them.

A checkpoint is written under another name, and gets its own when all its bytes are on disk; `latest` follows. No older
one goes before that.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from optimizers.ema import EMA
from optimizers.saved_state import state_by_parameter
from utils.errors import UserError
from utils.parallel.sharding import Shares
from utils.ranks import Ranks, any_rank, gather
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


class Lost(UserError):
    """What was written of a checkpoint is gone, with the run's folder or without."""


class Saving:
    """Writes the checkpoint of a step into the run's folder; all ranks make one, and one per stage writes, or all that
    have a share. It counts when `complete` has returned.

    Args:
        parameters: the trainable parameters of this stage by name.
        made_with: settings that a resumed run should share, under the names in `MADE_WITH`; the user is told if they
            differ.
        ema: the averages of these parameters, if there are any.
        shares: which of the parameters `optimizer` has, and `ema`; default: all of them, as they are.
        owed: what is still to be done after this step; default: nothing.
        read_back: reads what was written before the checkpoint counts, since older ones are to be removed.
        background: the state is copied, and a thread writes the copy, while the state may change; otherwise it is
            written at once.

    Attributes:
        seconds: that the thread took.

    Raises:
        UserError: on every rank, if one cannot write; nothing of it is left, and older ones stay. `Lost`, if somebody
            has removed it.
    """

    def __init__(
        self,
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
        background: bool = False,
    ) -> None:
        shares = shares or Shares(parameters)
        self._folder, self._ranks, self._progress, self._read_back = folder, ranks, progress, read_back
        self._unfinished = folder / f"{self._name}{UNFINISHED}"
        self._attempt = Attempt(f"checkpoint {progress.step}", ranks)
        shared = ranks.data_ranks if shares.divided else 1
        since = ema and ema.since
        self._content = _content(ranks, progress, made_with, owed or Owed(progress), ema_since=since, shares=shared)
        self._sums: dict[str, Sums] | None = {}
        self._thread: threading.Thread | None = None
        self.seconds = 0.0
        with self._told():
            if ranks.is_main:
                self._attempt.alone(_make_anew, self._unfinished)
            self._attempt.meet()
        state = state_of(ranks, optimizer, ema, shares)
        if state is not None:
            self._begin(state, background)

    @property
    def _name(self) -> str:
        return f"global_step{self._progress.step}"

    @property
    def is_writing(self) -> bool:
        """Whether this rank has not written its part yet."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_behind(self) -> bool:
        """Whether training has gone on since it was begun."""
        return self._thread is not None

    def _begin(self, state: dict[str, torch.Tensor], background: bool) -> None:
        path = self._unfinished / state_file(self._ranks.stage, self._ranks.data_rank)
        if not background:
            self._write(path, state)
            return
        # Tensors of a device are copied by that; those of the host would change with the next step.
        copied = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        self._thread = threading.Thread(target=self._write, args=(path, copied), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, path: Path, state: dict[str, torch.Tensor]) -> None:
        started = time.monotonic()
        self._sums = self._attempt.alone(_write_state, path, state, self._read_back)
        self.seconds = time.monotonic() - started if self._thread else 0.0

    def complete(self) -> Path:
        """Waits until all ranks have written, and gives the checkpoint its place. Returns its folder."""
        if self._thread:
            self._thread.join()
        with self._told():
            self._attempt.meet()
            gathered = gather(self._ranks, self._attempt.name, self._sums)
            finished = self._folder / self._name
            if self._ranks.is_main:
                self._attempt.alone(_finish, self._unfinished, finished, self._content, gathered, self._read_back)
            self._attempt.meet()
        return finished

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Failed as failed:
            is_lost = self._ranks.is_main and not self._unfinished.exists()
            is_lost = any_rank([is_lost])[0] if self._ranks.world_size > 1 else is_lost
            if self._ranks.is_main:
                shutil.rmtree(self._unfinished, ignore_errors=True)
            why = f"the checkpoint of step {self._progress.step} is not written: {failed}. {_newest(self._folder)}"
            raise (Lost if is_lost else UserError).of(why, str(self._folder)) from failed


def save(*state: Any, **how: Any) -> Path:
    """Writes a checkpoint at once, as `Saving` describes. Returns its folder."""
    return Saving(*state, **how).complete()


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


def _write_state(path: Path, state: Mapping[str, torch.Tensor], read_back: bool) -> dict[str, Sums]:
    sums = write_tensors(path, state)
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


def state_of(
    ranks: Ranks,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    shares: Shares,
) -> dict[str, torch.Tensor] | None:
    """What this rank writes, by the names that the tensors have in its file; None if another rank has the same."""
    if ranks.data_rank and not shares.divided:
        return None
    # Of what is not divided each data rank has all, and one that is alone writes it, whichever it is.
    written = shares.written if shares.divided else shares.held
    tensors = {f"weights/{name}": parameter.detach() for name, parameter in written.items()}
    tensors |= {f"ema/{name}": average for name, average in (ema.averages if ema else {}).items()}
    of_optimizer = state_by_parameter(optimizer)
    for name, parameter in shares.stepped.items():
        for key, value in of_optimizer.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value
    return tensors
