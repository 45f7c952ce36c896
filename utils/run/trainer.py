"""The trainer: one step of training, and what is due after it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch

from optimizers.schedules import learning_rates, warn_of_warmup
from utils.dataset.batches import TrainingBatches
from utils.dataset.epochs import Epochs
from utils.errors import UserError
from utils.ranks import any_rank
from utils.run import checkpoint, out_of_memory
from utils.run.cadence import Cadence, Duty
from utils.run.folder import LATEST, checkpoints_before
from utils.run.parts import RunParts
from utils.run.progress import Progress
from utils.run.signals import SAVE, SAVE_AND_QUIT, FileRequests, StopRequested

logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """What the loop in `train.py` works with.

    Attributes:
        progress: advances with every step.
        duties: the work between two steps, in this order.
        resumed_from: the checkpoint from which the run went on.
    """

    parts: RunParts
    batches: TrainingBatches
    progress: Progress
    duties: Sequence[Duty] = ()
    resumed_from: Path | None = None

    def __post_init__(self) -> None:
        settings = self.parts.settings
        self.checkpoints = Cadence(
            settings.checkpoint_every_n_steps,
            settings.checkpoint_every_n_epochs,
            minutes=settings.checkpoint_every_n_minutes,
        )
        self.requests = FileRequests(self.parts.folder)
        self.last_step = self.progress.step + self._steps_left()

    def _steps_left(self) -> int:
        """The number of steps to the end of the last epoch, or to `max_steps` if that comes first."""
        epochs, limit = self.parts.settings.epochs, self.parts.settings.max_steps
        to_limit = inf if limit is None else limit - self.progress.step
        if epochs is None and limit is not None:
            return max(0, to_limit)
        begun, last = self.progress.epoch, max(epochs or 1, self.progress.epoch)
        to_end = self.epochs.first_step(last) - self.epochs.first_step(begun) - self.progress.step_in_epoch
        return max(0, min(to_end, to_limit))

    @property
    def epochs(self) -> Epochs:
        return self.batches.epochs

    def prefetched(self) -> Iterator[Any]:
        """This data rank's micro-batches, step by step; None on a stage in the middle, which reads no data."""
        if self.parts.ranks.is_first_stage or self.parts.ranks.is_last_stage:
            return self.batches.iterate(self.progress.epoch, self.progress.step_in_epoch)
        return itertools.repeat(None)

    def step(self, batches: Iterator[Any]) -> tuple[Progress, dict[str, float]]:
        """One optimizer step on the next micro-batches. Returns the progress after it and its metrics. The time of a
        step includes waiting for data.

        Raises:
            UserError: the loss is not a finite number any more, or the GPU's memory does not suffice.
        """
        started = time.monotonic()
        step, groups = self.progress.step, self.parts.optimizer.param_groups
        bases = [self.parts.settings.optimizer.lr, *(group["initial_lr"] for group in groups)]
        lr, *lrs = learning_rates(step, bases, self.parts.settings, self.last_step)
        for group, own in zip(groups, lrs, strict=True):
            group["lr"] = own
        micro_batches = next(batches)
        try:
            result = self.parts.engine.train_step(micro_batches, step)
        except torch.OutOfMemoryError as error:
            raise out_of_memory.explained(error, self.parts.settings, self.parts.folder, step + 1) from error
        if not isfinite(result.loss) or not isfinite(result.grad_norm):
            raise UserError.of(
                f"loss {result.loss}, gradient norm {result.grad_norm}: training has diverged, and nothing was saved "
                f"since. {self._way_on()} with a lower [optimizer] lr or more warmup_steps",
                str(self.parts.folder),
                f"step {step + 1}",
            )
        if self.parts.ema:
            self.parts.ema.update(step + 1)
        seconds = time.monotonic() - started
        examples = self.epochs.examples(self.progress.epoch, self.progress.step_in_epoch)
        done = self.progress.after_step(result.loss, examples)
        values = {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": lr,
            "train/step_time_sec": seconds,
            "train/samples_per_sec": examples / seconds,
            **{f"train/{name}": value for name, value in result.terms.items()},
        }
        if self.ends_epoch(done):
            values["train/epoch_loss"] = done.epoch_loss
        return done, values

    def _way_on(self) -> str:
        """Where training that cannot go on may begin."""
        checkpoints = checkpoints_before(self.parts.folder / LATEST)
        if not checkpoints:
            return "There is no checkpoint to go on from: start again"
        return f"Go on from a checkpoint (the newest is --resume_from_checkpoint {checkpoints[-1]})"

    def ends_epoch(self, done: Progress) -> bool:
        """Whether the step that led to `done` was its epoch's last."""
        return done.step_in_epoch == self.epochs.steps_in(done.epoch)

    def begin(self) -> bool:
        """Does what is due before the first step of a run. Returns whether all ranks must stop here."""
        warn_of_warmup(self.parts.settings, self.last_step)
        due = [duty for duty in self.duties if duty.before_first_step] if self.progress.step == 0 else []
        return self._perform(due, self.progress, False) or any_rank([self.parts.stop.pending()])[0]

    def advance(self, done: Progress) -> bool:
        """Does what is due after the step that led to `done`. Returns whether all ranks must stop here."""
        before, ended, last = self.progress, self.ends_epoch(done), done.step == self.last_step
        due = [duty for duty in self.duties if duty.cadence.due(before, done, ended) or (last and duty.at_end)]
        interrupted = self._perform(due, done, ended)
        self.progress = done.next_epoch() if ended else done
        # A signal reaches one process, and clocks differ: the ranks have to agree, since all of them save together.
        is_main, requests = self.parts.ranks.is_main, self.requests
        asked, overdue, save, quit_too = any_rank(
            [
                self.parts.stop.pending(),
                is_main and self.checkpoints.overdue(),
                is_main and requests.asked(SAVE),
                is_main and requests.asked(SAVE_AND_QUIT),
            ]
        )
        stopping = interrupted or asked or quit_too
        self.parts.stop.by_file = quit_too
        at_end = last and self.checkpoints.ever
        if stopping or save or overdue or at_end or self.checkpoints.due(before, done, ended):
            self.save_checkpoint()
        if is_main and (save or quit_too):
            requests.done()
        return stopping and not last

    def _perform(self, due: Sequence[Duty], progress: Progress, epoch_ended: bool) -> bool:
        """Performs the duties. Returns whether a stop interrupted one; interruptible duties after it are skipped."""
        interrupted = False
        for duty in due:
            if interrupted and duty.interruptible:
                continue
            try:
                duty.perform(progress, epoch_ended)
            except StopRequested:
                interrupted = True
        return interrupted

    def close(self, batches: Iterator[Any]) -> None:
        """Stops the thread that reads ahead, and closes the metrics."""
        if isinstance(batches, Generator):
            batches.close()
        self.parts.metrics.close()

    def save_checkpoint(self) -> None:
        """Writes the state to resume from."""
        made_with = {
            "identity": checkpoint.identity_of(self.parts.settings),
            "run": checkpoint.run_of(self.parts.settings),
            "optimizer": self.parts.settings.optimizer.model_dump(mode="json"),
            "steps_in_epoch": self.epochs.steps_in(self.progress.epoch),
        }
        state = (self.progress, self.parts.parameters, self.parts.optimizer, made_with, self.parts.ema)
        path = checkpoint.save(self.parts.folder, self.parts.ranks, *state)
        self.checkpoints.restart()
        logger.info("checkpoint: %s", path)
        if self.parts.ranks.is_main and self.parts.settings.keep_checkpoints:
            checkpoint.remove_older(path, self.parts.settings.keep_checkpoints, self.resumed_from)
