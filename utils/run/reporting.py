"""What the user sees: the log, the progress, and messages about mistakes."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean

from tqdm import tqdm

from utils.errors import UserError, without_controls
from utils.progress_bar import progress_bar
from utils.ranks import LaunchError, Ranks, leave_together
from utils.run.attempts import FULL
from utils.run.notes import Notes

logger = logging.getLogger(__name__)

QUIET_LIBRARIES = {
    "accelerate": logging.ERROR,
    "bitsandbytes": logging.ERROR,
    "deepspeed": logging.WARNING,
    "DeepSpeed": logging.WARNING,
    "diffusers": logging.ERROR,
    "peft": logging.ERROR,
    "torch": logging.WARNING,
    "transformers": logging.ERROR,
    "PIL": logging.INFO,
}
SECONDS_FOR_MAIN_RANK = 3.0
PEAK_MEMORY = "train/peak_memory_gib"
"""The metric of the GPU that held most since the step before, with what was done between the steps."""
STEPS_OF_MEAN = 100
"""One loss says little, since samples and noise levels differ; a mean of so many shows where it goes."""


class _Once(logging.Filter):
    """Lets each warning through once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        message = record.getMessage()
        new = message not in self.seen
        self.seen.add(message)
        return new


def start_logging(ranks: Ranks) -> None:
    """One readable log on the main rank, above the progress bar; errors only from the others. The warnings are kept for
    the page of the run."""
    handler = _AboveProgressBar()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(_Once())
    handlers = [handler, Notes()] if ranks.is_main else [handler]
    logging.basicConfig(level=logging.INFO if ranks.is_main else logging.ERROR, handlers=handlers, force=True)
    for name, level in QUIET_LIBRARIES.items():
        logging.getLogger(name).setLevel(level)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


class _AboveProgressBar(logging.StreamHandler):
    """Writes lines to stderr without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(without_controls(self.format(record)), file=sys.stderr)


def is_user_error(error: Exception) -> bool:
    """Whether the error is a mistake of the user, or a fault of their machine, that its text explains better than a
    traceback."""
    is_full = isinstance(error, OSError) and error.errno in FULL
    # A time-out is an OSError in Python; ours name the ranks that did not answer.
    return isinstance(error, UserError | LaunchError | TimeoutError) or is_full


def report_user_error(error: Exception, ranks: Ranks, *, stopping: bool = False) -> None:
    """Shows a mistake of the user once, and lets the ranks leave together.

    All ranks meet most mistakes at the same time: the main rank shows them, and then the others leave silently: if they
    are connected, by themselves, otherwise by the signal of a launcher whose main process has ended. A rank that waits
    in vain has met an error that the main rank has not, and shows it itself.

    Args:
        stopping: whether this process was asked to stop; then it does not wait for that.
    """
    began = time.monotonic()
    if ranks.is_main:
        _tell(error)
    if not leave_together(ranks, SECONDS_FOR_MAIN_RANK) and not (ranks.is_main or stopping):
        time.sleep(max(0.0, began + SECONDS_FOR_MAIN_RANK - time.monotonic()))
        _tell(error)


def _tell(error: Exception) -> None:
    if isinstance(error, OSError) and error.errno in FULL:
        error = UserError.of(
            f"{error.strerror}: nothing more can be written here. Make room and start again (a run with "
            "--resume_from_checkpoint); what was cached and saved before stays",
            str(error.filename or "the disk of output_dir, cache_dir or of temporary files"),
        )
    sys.stderr.write(f"\nerror: {without_controls(str(error))}\n")
    sys.stderr.flush()


class StepReporter:
    """The main rank's progress bar on a terminal, and a line in the log at a fixed number of steps.

    Args:
        first, total: the first step, and the number of all steps.
        every: number of steps between lines.
    """

    def __init__(self, first: int, total: int, every: int, active: bool):
        self.first, self.total, self.every, self.active = first, total, every, active
        self.started = time.monotonic()
        # In a log file the lines are enough.
        self.bar = progress_bar(total, "training", first=first, active=active and sys.stderr.isatty())
        self.losses: deque[float] = deque(maxlen=STEPS_OF_MEAN)
        self.memory = 0.0

    def step(self, done: int, epoch: int, values: Mapping[str, float]) -> None:
        """Reports a step; `done` counts steps since the beginning of the run."""
        self.bar.update(1)
        self.losses.extend(values[name] for name in ("train/loss",) if name in values)
        self.memory = max(self.memory, values.get(PEAK_MEMORY, 0.0))
        if self.active and (done % self.every == 0 or done == self.total):
            logger.info("%s", self._line(done, epoch, values))
            self.memory = 0.0

    def _line(self, done: int, epoch: int, values: Mapping[str, float]) -> str:
        pace = (time.monotonic() - self.started) / (done - self.first)
        told = [
            f"step {done}/{self.total}",
            f"epoch {epoch + 1}",
            *(self._measured(values) if "train/loss" in values else ["not finite"]),
            f"lr {values['train/lr']:.2e}",
            f"{values['train/step_time_sec']:.3f} s/step",
            *([f"memory {self.memory:.2f} GiB"] if self.memory else []),
            f"left {timedelta(seconds=round(pace * (self.total - done)))}",
        ]
        return "  ".join(told)

    def _measured(self, values: Mapping[str, float]) -> list[str]:
        mean = f"mean of {len(self.losses)}: {fmean(self.losses):.4f}"
        return [f"loss {values['train/loss']:.4f} ({mean})", f"norm {values['train/grad_norm']:.3f}"]

    def close(self) -> None:
        self.bar.close()


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Logs how long something took."""
    started = time.monotonic()
    yield
    logger.info("%s: %.1f s", what, time.monotonic() - started)
