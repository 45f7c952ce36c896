"""The checkpoints of a run: when one is due, and how it is written while training goes on."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from utils.dataset.epochs import Epochs
from utils.media.memory import available_bytes
from utils.ranks import Ranks, any_rank
from utils.run import checkpoint, saving
from utils.run.cadence import Cadence
from utils.run.owed import Owed
from utils.run.parts import RunParts
from utils.run.progress import Progress
from utils.run.time_limit import CHECKPOINT
from utils.run.watch import Work

logger = logging.getLogger(__name__)

SHARE_OF_MEMORY = 0.5
"""Of the memory that the machine has left, how much its ranks' copies of state may take."""


class Checkpoints:
    """Saves a run's state. In the background, a copy of it in the host's memory is written by a thread, while steps are
    made; the ranks meet between two steps to give the checkpoint its place.

    Attributes:
        cadence: when a checkpoint is due.
        is_lost: whether the last one was removed before it counted, so that another is due at once.
    """

    def __init__(self, parts: RunParts, epochs: Epochs, resumed_from: Path | None) -> None:
        settings = parts.settings
        self.cadence = Cadence(
            settings.checkpoint_every_n_steps,
            settings.checkpoint_every_n_epochs,
            minutes=settings.checkpoint_every_n_minutes,
        )
        self._parts, self._epochs, self._resumed_from = parts, epochs, resumed_from
        self._pending: saving.Saving | None = None
        self.is_lost = False
        self._seconds = 0.0

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes its part of a checkpoint."""
        return self._pending is not None and self._pending.is_writing

    def save(self, progress: Progress, owed: Owed, *, background: bool, alone: bool = False) -> Path | None:
        """Saves the state after a step. Returns the checkpoint's folder; None if it is written while training goes on,
        until `complete` is called. One that was begun before is completed first.

        Args:
            owed: what is still to be done after this step.
            background: write it while training goes on, if all ranks have room for a copy.
            alone: this rank, which has all of the state, writes it without the others, and what was begun before is not
                completed.
        """
        if alone:
            self._pending = None
        self.complete()
        self.is_lost = False
        parts, settings = self._parts, self._parts.settings
        parts.stop.watch.at(Work(f"checkpoint of step {progress.step}"))
        made_with = {
            "identity": checkpoint.identity_of(settings),
            "run": checkpoint.run_of(settings),
            "optimizer": settings.optimizer.model_dump(mode="json"),
            "steps_in_epoch": self._epochs.steps_in(progress.epoch),
            "order": self._epochs.state(progress.epoch, progress.step_in_epoch),
        }
        background = background and not any_rank([not self._has_room()])[0]
        started = time.monotonic()
        self._pending = saving.Saving(
            parts.folder,
            Ranks() if alone else parts.ranks,
            progress,
            parts.parameters,
            parts.optimizer,
            made_with,
            parts.ema,
            parts.shares,
            owed=owed,
            read_back=bool(settings.keep_checkpoints),
            background=background,
        )
        self._seconds = time.monotonic() - started
        self.cadence.restart()
        return None if background else self.complete()

    def _has_room(self) -> bool:
        """Whether a copy of what this rank writes takes no more than its part of the memory that is left."""
        parts = self._parts
        state = saving.state_of(parts.ranks, parts.optimizer, parts.ema, parts.shares)
        room = SHARE_OF_MEMORY * available_bytes() / parts.ranks.local_size
        return sum(tensor.nbytes for tensor in (state or {}).values()) <= room

    def complete(self) -> Path | None:
        """Gives the checkpoint that was begun its place, once all ranks have written it; all ranks call it. Returns its
        folder, None if there is none.

        Raises:
            UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        parts, started = self._parts, time.monotonic()
        try:
            path = pending.complete()
        except saving.Lost as lost:
            if not pending.is_behind:
                raise
            # The folder was removed while training went on, which makes it again.
            logger.warning("%s; it is written anew at once", lost.problems[0].message)
            self.is_lost = True
            return None
        if parts.stop.time:
            parts.stop.time.took(CHECKPOINT, self._seconds + pending.seconds + time.monotonic() - started)
        logger.info("checkpoint: %s", path)
        keep = parts.settings.keep_checkpoints
        if parts.ranks.is_main and keep:
            saving.remove_older(path, keep, self._resumed_from)
        return path
