"""The trainer: one step of training, and what is due after it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch

from optimizers.schedules import Schedule, warn_of_warmup
from utils.dataset.batches import TrainingBatches
from utils.dataset.epochs import Epochs
from utils.device_memory import lacks_memory
from utils.errors import UserError
from utils.parallel.step_numbers import StepResult
from utils.ranks import any_rank
from utils.run import out_of_memory
from utils.run.attempts import Failed, advised, is_expected
from utils.run.cadence import Duty
from utils.run.checkpointing import Checkpoints
from utils.run.file_requests import SAVE, FileRequests, Votes, agreed
from utils.run.nonfinite import NonFiniteSteps, diverged
from utils.run.numbers import DECILES
from utils.run.owed import Owed, note_done
from utils.run.parts import RunParts
from utils.run.progress import Progress
from utils.run.results import results
from utils.run.signals import StopRequested
from utils.run.step_metrics import forget_peak, is_told_in_full, step_metrics
from utils.run.watch import Work
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)


def last_step_of(settings: Settings, epochs: Epochs, progress: Progress) -> int:
    """The number of all steps of a run that has come to `progress`: to the end of the last epoch, or to `max_steps` if
    that comes first."""
    limit = inf if settings.max_steps is None else settings.max_steps
    if settings.epochs is None and settings.max_steps is not None:
        return max(progress.step, settings.max_steps)
    last = max(settings.epochs or 1, progress.epoch)
    to_end = epochs.first_step(last) - epochs.first_step(progress.epoch) - progress.step_in_epoch
    return max(progress.step, min(progress.step + to_end, limit))


def _without_steps(duty: Duty, progress: Progress, epoch_ended: bool) -> None:
    duty.without_steps(progress)


@dataclass
class Trainer:
    """What the loop in `train.py` works with.

    Attributes:
        progress: advances with every step.
        duties: the work between two steps, in this order.
        resumed_from: the checkpoint from which the run went on.
        owed: what is due after the last step and not done yet; at first, what `resumed_from` owes.
    """

    parts: RunParts
    batches: TrainingBatches
    progress: Progress
    duties: Sequence[Duty] = ()
    resumed_from: Path | None = None
    owed: Owed | None = None

    def __post_init__(self) -> None:
        settings = self.parts.settings
        self.checkpoints = Checkpoints(self.parts, self.epochs, self.resumed_from)
        by_layer = settings.optimizer.gradient_release
        self.nonfinite = NonFiniteSteps(settings.max_nonfinite_steps, by_layer=by_layer)
        self.requests = FileRequests(self.parts.folder)
        self.lacks_export, self.exported = False, None
        self.owed = self.owed or Owed(self.progress)
        # Whether it owes anything, and then what of that is done, is noted in the checkpoint of this step.
        self.owes, self.saved = bool(self.owed.duties), self.resumed_from
        self._since = time.monotonic()
        if self.parts.stop.time:
            # Weights with two moments.
            self.parts.stop.time.state_bytes = 3 * sum(p.nbytes for p in self.parts.parameters.values())
        self.first_step = self.progress.step
        self.last_step = last_step_of(settings, self.epochs, self.progress)
        self._schedule = Schedule(settings, self.last_step)
        self.parts.page.last_step = self.last_step

    @property
    def epochs(self) -> Epochs:
        return self.batches.epochs

    @contextmanager
    def prefetched(self) -> Iterator[Iterator[Any]]:
        """A context with this data rank's micro-batches, step by step; None on a stage in the middle, which reads no
        data. Behind it, also after an error, nobody reads on."""
        if not (self.parts.ranks.is_first_stage or self.parts.ranks.is_last_stage):
            yield itertools.repeat(None)
            return
        with closing(self.batches.iterate(self.progress.epoch, self.progress.step_in_epoch)) as batches:
            self.parts.engine.beside_backward = batches.go_on
            yield batches

    def step(self, batches: Iterator[Any]) -> tuple[Progress, dict[str, float]]:
        """One optimizer step on the next micro-batches. Returns the progress after it and its metrics. The time of a
        step includes waiting for data.

        Raises:
            UserError: the loss is not a finite number any more, or the GPU's memory does not suffice.
        """
        started = time.monotonic()
        forget_peak(self.parts.ranks.device)
        step, groups = self.progress.step, self.parts.optimizer.param_groups
        bases = [self.parts.settings.optimizer.lr, *(group["initial_lr"] for group in groups)]
        lr, *lrs = self._schedule.learning_rates(step, bases)
        for group, own in zip(groups, lrs, strict=True):
            group["lr"] = own
        watch = self.parts.stop.watch
        watch.at(Work(f"step {step + 1}, waiting for its data", self._files_of_step, lambda: None))
        engine = self.parts.engine
        taken = engine.global_steps
        try:
            micro_batches = next(batches)
            waited = time.monotonic() - started
            watch.at(Work(f"step {step + 1}", self._files_of_step, lambda: engine.module.draw))
            numbers = self.epochs.share(self.progress.epoch, self.progress.step_in_epoch, self.parts.ranks.data_rank)
            result = engine.train_step(micro_batches, step, numbers)
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            is_new = step > self.first_step and not self.saved and engine.global_steps == taken
            save = partial(self.save_checkpoint, alone=self.parts.ranks.world_size > 1) if is_new else None
            raise out_of_memory.in_step(error, self.parts, f"step {step + 1}", save) from error
        # All ranks have the same numbers.
        finite = self.nonfinite.follow(step + 1, result, partial(self._files_of_step, everywhere=True))
        if self.nonfinite.are_too_many:
            raise self._diverged(result)
        if self.parts.ema:
            with self.parts.weights_to_use():
                self.parts.ema.update(step + 1)
        seconds = time.monotonic() - started
        examples = self.epochs.examples(self.progress.epoch, self.progress.step_in_epoch)
        done = self.progress.after_step(result.loss if finite else None, examples)
        measured = {"train/loss": result.loss, "train/grad_norm": result.grad_norm}
        values = {
            **(measured if finite else {"train/nonfinite_steps": self.nonfinite.in_all}),
            "train/lr": lr,
            "train/step_time_sec": seconds,
            "train/samples_per_sec": examples / seconds,
            **({"train/tokens_per_sec": self._tokens() / seconds} if is_told_in_full(step + 1) else {}),
            **{f"train/{name}": value for name, value in result.terms.items() if finite},
            **{f"{DECILES}{level:.2f}": loss for level, loss in result.deciles.items() if finite},
            **step_metrics(self.parts, result, step + 1, waited),
        }
        if self.ends_epoch(done) and done.epoch_losses:
            values["train/epoch_loss"] = done.epoch_loss
        return done, values

    def _diverged(self, result: StepResult) -> UserError:
        """The error of a run that cannot go on. Its weights are saved, unless a step has spoilt them."""
        spoilt = any_rank([not all(p.isfinite().all() for p in self.parts.shares.held.values())])[0]
        saved = "nothing was saved since"
        if self.progress.step > self.first_step and not spoilt:
            self.save_checkpoint()
            saved = "what the steps before had made of the weights is saved"
        self.checkpoints.complete()
        return diverged(self.parts.folder, self.progress.step + 1, result, saved)

    def _files_of_step(self, *, everywhere: bool = False) -> list[str]:
        """The files of the samples in the current step, of this data rank or of all."""
        epoch, index = self.progress.epoch, self.progress.step_in_epoch
        step = self.epochs.step(epoch, index)
        own = range(len(step)) if everywhere else self.epochs.share(epoch, index, self.parts.ranks.data_rank)
        samples = [sample for number in own for sample, _ in self.epochs.samples_of(step[number], epoch)]
        return [str(sample.media.locator) for sample in samples]

    def _tokens(self) -> int:
        """The image tokens of the current step, of all data ranks."""
        shapes = self.epochs.shapes(self.progress.epoch, self.progress.step_in_epoch)
        return sum(count * self.parts.tokens(shape) for shape, count in shapes)

    def ends_epoch(self, done: Progress) -> bool:
        """Whether the step that led to `done` was its epoch's last."""
        return done.step_in_epoch == self.epochs.steps_in(done.epoch)

    def begin(self) -> bool:
        """Does what the checkpoint owes from which the run goes on, or what is due before the first step of a run.
        Returns whether all ranks must stop here."""
        warn_of_warmup(self.parts.settings, self.last_step)
        if self.owed.duties:
            interrupted = self._catch_up()
        else:
            due = [duty for duty in self.duties if duty.before_first_step] if self.progress.step == 0 else []
            interrupted = self._perform(due, self.progress, False)
        return self._vote(False) or interrupted

    def _catch_up(self) -> bool:
        """Does what the checkpoint owes. Returns whether a stop interrupted it."""
        owed = self.owed
        due = [duty for duty in self.duties if duty.name in owed.duties]
        due.sort(key=lambda duty: duty.interruptible)
        names, step = ", ".join(duty.name for duty in due), owed.progress.step
        if due:
            logger.info("what was due after step %d and is not done comes first: %s", step, names)
            # The run may have been killed after a number was written and before that was noted.
            self.parts.metrics.measured_again(lambda name: any(duty.measures(name) for duty in due), step)
        for name in owed.duties:
            if name not in {duty.name for duty in due}:
                logger.warning("%s after step %d is not done, and this config does not ask for it", name, step)
                self._settle(name)
        return self._perform(due, owed.progress, owed.epoch_ended)

    def advance(self, done: Progress) -> bool:
        """Does what is due after the step that led to `done`: what saves it comes first, then what may be interrupted
        or fail. Of what a stop leaves no time for, the checkpoint says that it is owed. Returns whether all ranks must
        stop here."""
        before, ended, last = self.progress, self.ends_epoch(done), done.step == self.last_step
        self.progress = done.next_epoch() if ended else done
        votes, stop = self._votes(last), self.parts.stop
        due = self._due(before, done, ended, votes.files)
        exports, looks = ([duty for duty in due if duty.interruptible == kind] for kind in (False, True))
        self.owed, self.saved = Owed(done, ended, tuple(duty.name for duty in due)), None
        if not votes.writing:
            self.checkpoints.complete()
        late, is_main = votes.late or votes.is_up, self.parts.ranks.is_main
        if late and not stop.late and is_main:
            logger.warning("the time_limit leaves no time for another step and what is due after it")
        asked, quits = votes.asked, votes.quits
        stop.by_file, stop.late = quits, stop.late or late
        if is_main:
            self.requests.tell(votes.files, done.step, due)
        if not (asked or late):
            self._perform(exports, done, ended)
        # Without an export, what the last step has made is in no other place.
        at_end = last and (self.checkpoints.cadence.ever or self.lacks_export)
        at_once = asked or late or quits or SAVE in votes.files or at_end or self.checkpoints.is_lost
        if at_once or votes.overdue or self.checkpoints.cadence.due(before, done, ended):
            # What follows may take longer than the writing, and a kill in it should lose nothing.
            self.save_checkpoint(background=not (at_once or looks or last))
        if asked or late:
            # After the checkpoint, without which more would be lost if a launcher or a job scheduler does not wait.
            self._perform([duty for duty in exports if duty.at_stop or not (asked or votes.is_up)], done, ended)
        interrupted = asked or self._perform(looks, done, ended)
        if looks and not asked:
            # A stop that came meanwhile need not wait for another step.
            interrupted = self._vote(interrupted)
        gave_up = bool(looks) and not last and any_rank([self.parts.patience.is_over])[0]
        if (interrupted or gave_up) and not self.saved:
            self.save_checkpoint()
        stop.by_file = stop.by_file or gave_up
        ends_early = (interrupted or late or quits or gave_up) and (not last or bool(self.owed.duties))
        if ends_early and not last:
            exports = [duty for duty in self.duties if duty.at_stop or (gave_up and not duty.interruptible)]
            self._perform([duty for duty in exports if duty not in due], done, ended)
        if is_main:
            self.requests.done(votes.files)
        self._since = time.monotonic()
        return ends_early

    def _votes(self, last: bool) -> Votes:
        is_main, stop = self.parts.ranks.is_main, self.parts.stop
        return agreed(
            [
                stop.asked(),
                stop.time_is_up(),
                is_main and not last and self._is_out_of_time(),
                is_main and self.checkpoints.cadence.overdue(),
                self.checkpoints.is_writing,
            ],
            self.requests if is_main else None,
        )

    def _vote(self, interrupted: bool) -> bool:
        """Whether this rank was interrupted, or any was asked to stop or has no time left."""
        stop = self.parts.stop
        interrupted, late = any_rank([interrupted or stop.asked(), stop.time_is_up()])
        stop.late, self._since = stop.late or late, time.monotonic()
        return interrupted or late

    def _due(self, before: Progress, done: Progress, epoch_ended: bool, files: Sequence[str] = ()) -> list[Duty]:
        """The duties after the step from `before` to `done`, at which `files` ask for some."""
        last = done.step == self.last_step
        return [
            duty
            for duty in self.duties
            if duty.file in files or duty.cadence.due(before, done, epoch_ended) or (last and duty.at_end)
        ]

    def _is_out_of_time(self) -> bool:
        """Whether the run's time does not suffice for the next step and what is due after it."""
        limit = self.parts.stop.time
        if limit is None:
            return False
        now = time.monotonic()
        limit.step_took(now - self._since)
        before = self.progress
        after = before.after_step(None, self.epochs.examples(before.epoch, before.step_in_epoch))
        return limit.is_up_after([duty.name for duty in self._due(before, after, self.ends_epoch(after))])

    def _perform(self, due: Sequence[Duty], progress: Progress, epoch_ended: bool) -> bool:
        """Performs the duties; one that fails is told, and training goes on. Returns whether a stop interrupted one;
        those after it are skipped."""
        for duty in due:
            started = time.monotonic()
            self.parts.stop.watch.at(Work(f"{duty.name} after step {progress.step}"))
            try:
                duty.perform(progress, epoch_ended)
            except StopRequested:
                return True
            except Exception as error:
                self._tell_failed(duty, progress, error)
                failed = True
            else:
                failed = False
                if self.parts.stop.time:
                    self.parts.stop.time.took(duty.name, time.monotonic() - started)
            if failed and self.parts.ranks.device.type == "cuda":
                # What it held is free by now, also in the error's frames.
                torch.cuda.empty_cache()
            if not duty.interruptible:
                self.lacks_export, self.exported = failed, None if failed else progress.step
            self._settle(duty.name)
        return False

    def _settle(self, name: str) -> None:
        """Notes that something is owed no more: it is done, or has failed, which is told."""
        if name not in self.owed.duties:
            return
        self.owed = self.owed.without(name)
        if self.saved and self.parts.ranks.is_main:
            note_done(self.saved, name)

    def _tell_failed(self, duty: Duty, progress: Progress, error: Exception) -> None:
        """Tells why something failed, if all ranks know that it did.

        Raises:
            Exception: the error itself, if this rank alone has met it: the others wait for this one elsewhere.
        """
        if isinstance(error, Failed):
            reason = str(error)
        elif self.parts.ranks.world_size > 1:
            if self.saved and duty.name in self.owed.duties:
                # It would end the run that goes on, too. The main rank may not learn of it.
                note_done(self.saved, duty.name)
            raise error
        else:
            reason = advised(error, partial(self.parts.ways, duty.name))
            if not is_expected(error):
                logger.error("%s after step %d:", duty.name, progress.step, exc_info=error)
        if self.parts.ranks.is_main:
            logger.error("%s after step %d failed, and the run goes on: %s", duty.name, progress.step, reason)

    def end(self, stopped: bool) -> None:
        """Does what is still asked for if no step was left, closes the metrics, and tells how the run ended."""
        if self.first_step == self.last_step and not stopped:
            epochs, to_train = self.progress.epoch, "" if self.owes else "; set epochs or max_steps higher"
            level = logging.INFO if self.owes else logging.WARNING
            logger.log(level, "nothing is left to train: %d epochs are done%s", epochs, to_train)
            lacking = [
                replace(duty, perform=partial(_without_steps, duty)) for duty in self.duties if duty.without_steps
            ]
            self._perform(lacking, self.progress, False)
        self.checkpoints.complete()
        self.parts.metrics.close()
        self.parts.page.notes.how = "stopped" if stopped else "done"
        self.parts.page.write()
        if self.parts.ranks.is_main:
            self._tell_end(stopped)
        if self.lacks_export and not stopped:
            raise UserError.of(
                f"the last export failed, as the log says why; the weights are in the checkpoint: make room, and "
                f"--export {self.parts.folder} exports them",
                str(self.parts.folder),
            )

    def _tell_end(self, stopped: bool) -> None:
        folder, how = self.parts.folder, "done"
        if stopped and self.progress.step == self.first_step and not self.resumed_from:
            logger.warning("stopped before a step was made; what is cached stays cached")
            return
        if stopped:
            how = "stopped"
            first = f", first with {', '.join(self.owed.duties)}" if self.owed.duties else ""
            is_exported = self.parts.settings.adapter or self.exported == self.progress.step
            weights = "" if is_exported else f", and --export {folder} exports the weights"
            logger.warning("stopped; --resume_from_checkpoint %s goes on from here%s%s", folder, first, weights)
        at = f"step {self.progress.step}, epochs completed: {self.progress.epoch}"
        logger.info("%s at %s\n%s", how, at, results(folder))
        self.parts.webhook.post("end", how=how, step=self.progress.step, of=self.last_step)

    def save_checkpoint(self, **how: bool) -> None:
        """Writes the state to resume from; in the background, it has its place some steps later. See `Checkpoints`."""
        self.saved = self.checkpoints.save(self.progress, self.owed, **{"background": False} | how)
