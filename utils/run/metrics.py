"""Writes numbers and pictures to metrics.jsonl, TensorBoard and Weights & Biases, from the main rank."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.json_files import is_of, parsed_json
from utils.run.attempts import reason_of
from utils.run.folder import METRICS, KeptRecords
from utils.run.numbers import BLOCK_GRADIENT, BLOCK_WEIGHT, QUANTILE
from utils.settings.run_tables import MonitoringSettings

logger = logging.getLogger(__name__)


WANDB = "[monitoring] enable_wandb"
WANDB_HINT = "set wandb_api_key, or WANDB_API_KEY, or run `wandb login`; WANDB_MODE=offline needs no account"
WITHOUT_ACCOUNT = ("offline", "dryrun", "disabled")


def check_account(settings: MonitoringSettings) -> None:
    """Whether an account for Weights & Biases is known, if it is enabled. To be called by the main rank; the others
    need no account.

    Raises:
        UserError: no key is known, or wandb's settings on this machine are invalid.
    """
    if not settings.enable_wandb or settings.wandb_api_key:
        return
    import wandb

    known = wandb.Settings()
    try:
        known.update_from_system_settings()
        known.update_from_env_vars(os.environ)
    except ValueError as error:
        raise UserError.of(f"the settings of wandb on this machine are wrong: {error}", where=WANDB) from error
    if known.mode in WITHOUT_ACCOUNT or known.api_key or known.identity_token_file:
        return
    # `wandb login` of older versions kept the key under the older name of the same host.
    if not _has_key((urlparse(known.base_url).hostname or "", "api.wandb.ai")):
        raise UserError.of(f"no account is known on this machine; {WANDB_HINT}", where=WANDB)


def _has_key(hosts: Sequence[str]) -> bool:
    """Whether this machine's .netrc has an account for any of these hosts."""
    try:
        accounts = netrc(os.environ.get("NETRC", os.path.expanduser("~/.netrc")))
    except (OSError, NetrcParseError):
        return False
    return any(accounts.authenticators(host) for host in hosts)


class Sink(Protocol):
    """A destination for numbers and pictures.

    Attributes:
        tries_again: whether it is of use after an error.
    """

    tries_again: bool

    def scalars(self, values: dict[str, float], step: int) -> None: ...
    def picture(self, name: str, picture: Image.Image, step: int) -> None: ...
    def measured_again(self, which: Callable[[str], bool], at: int) -> None: ...
    def begin_again(self) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object per line: {"name", "value", "step", "time"}. Pictures are in the run folder anyway. What cannot
    be written is tried again with what comes next."""

    tries_again = True

    def __init__(self, folder: Path, resumed_at: int | None = None):
        self.path, self.waiting = folder / METRICS, b""
        if resumed_at is not None and self.path.exists():
            removed = _cut(self.path, lambda name, step: step <= resumed_at)
            if removed:
                last = max(removed)
                logger.info("metrics after step %d, up to step %d, are cut: these steps come again", resumed_at, last)
        self.file = self.path.open("a+b", buffering=0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        now = time.time()
        lines = [
            json.dumps({"name": name, "value": value, "step": step, "time": now}) for name, value in values.items()
        ]
        self.waiting += "".join(f"{line}\n" for line in lines).encode()
        if not self.path.exists():
            self.begin_again()
        self._write()

    def _write(self) -> None:
        while self.waiting:
            # A disk that becomes full takes a part.
            self.waiting = self.waiting[self.file.write(self.waiting) :]

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        pass

    def measured_again(self, which: Callable[[str], bool], at: int) -> None:
        self.file.close()
        try:
            _cut(self.path, lambda name, step: step < inf and not (step == at and which(name)))
        finally:
            self.file = self.path.open("a+b", buffering=0)

    def begin_again(self) -> None:
        """The file was deleted: as long as it is open, what was in it is still there."""
        before = self.file
        before.seek(0)
        self.file = self.path.open("a+b", buffering=0)
        self.waiting = before.read() + self.waiting
        before.close()

    def close(self) -> None:
        try:
            self._write()
        finally:
            self.file.close()


def _cut(path: Path, keeps: Callable[[str, float], bool]) -> list[float]:
    """Removes all lines but those that `keeps` (name, step), and an incomplete one of a killed run. Returns the steps
    of those that are removed."""
    beside, removed = path.with_name(path.name + ".new"), []
    with path.open(encoding="utf-8", errors="replace") as old, beside.open("w", encoding="utf-8") as new:
        for line in old:
            name, step = _of_line(line)
            if keeps(name, step):
                new.write(line)
            elif step < inf:
                removed.append(step)
    os.replace(beside, path)
    return removed


def _of_line(line: str) -> tuple[str, float]:
    """The name and the step of a number; a step after all others, if the line is not whole."""
    try:
        found = parsed_json(line)
        name, step = found["name"], found["step"]
    except (ValueError, KeyError, TypeError, IndexError):
        return "", inf
    is_whole = line.endswith("\n") and is_of(name, str) and is_of(step, float)
    return (name, step) if is_whole else ("", inf)


CHARTS = {
    "training loss by noise level": ["train_deciles/loss_.*"],
    "evaluation by noise level": [".*/(ema_)?loss_quantile_.*"],
    "evaluation": ["(?!train/).*/(ema_)?loss$"],
    "seconds of a step": ["train/.*_time_sec"],
    "norm of the gradient by block": [f"{BLOCK_GRADIENT}.*"],
    "norm of what is trained by block": [f"{BLOCK_WEIGHT}.*"],
}
"""Charts of several numbers in TensorBoard's "Custom scalars": title -> patterns of their names."""


class TensorBoard:
    tries_again = False

    def __init__(self, folder: Path, resumed_at: int | None = None):
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        purge_step = None if resumed_at is None else resumed_at + 1
        self.open = partial(SummaryWriter, str(folder / "tensorboard_logs"))
        self.writer = self.open(purge_step=purge_step)
        self.writer.add_custom_scalars({"penstock": {title: ["Multiline", names] for title, names in CHARTS.items()}})

    def scalars(self, values: dict[str, float], step: int) -> None:
        # As one record: each takes the interpreter from the training thread twice.
        numbers = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.file_writer.add_summary(self._summary(value=numbers), step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def measured_again(self, which: Callable[[str], bool], at: int) -> None:
        """Its files take nothing back but all of a step; it shows the number twice, which is the same."""

    def begin_again(self) -> None:
        # The old writer has no file to close any more.
        self.writer = self.open()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    tries_again = False

    def __init__(self, folder: Path, settings: MonitoringSettings, resolved: dict[str, Any]):
        import wandb

        if settings.wandb_api_key:
            os.environ["WANDB_API_KEY"] = settings.wandb_api_key
        self.wandb = wandb
        self._together: dict[str, dict[str, dict[int, float]]] = {}
        try:
            self.run = wandb.init(
                project=settings.wandb_tracker_name or "penstock",
                name=settings.wandb_run_name or folder.name,
                dir=str(folder),
                config=resolved,
            )
        except wandb.Error as error:
            raise UserError.of(f"Weights & Biases refused the run: {error}; {WANDB_HINT}", where=WANDB) from error

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, **self._charts(values, step)}, step=step)

    def _charts(self, values: dict[str, float], step: int) -> dict[str, Any]:
        """A chart with a line for each noise level, of each loss of evaluation that is measured at this step."""
        measured = set()
        for name, value in values.items():
            loss, found, level = name.partition(QUANTILE)
            if found:
                self._together.setdefault(loss, {}).setdefault(level, {})[step] = value
                measured.add(loss)
        return {f"{loss} by noise level": self._chart(loss) for loss in sorted(measured)}

    def _chart(self, loss: str) -> Any:
        lines = self._together[loss]
        return self.wandb.plot.line_series(
            [list(line) for line in lines.values()],
            [list(line.values()) for line in lines.values()],
            keys=list(lines),
            title=f"{loss} by noise level",
            xname="step",
        )

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.run.log({name: self.wandb.Image(picture)}, step=step)

    def measured_again(self, which: Callable[[str], bool], at: int) -> None:
        """What was sent stays, and the same number comes again."""

    def begin_again(self) -> None:
        """What it sends is on its way, and needs no folder."""

    def close(self) -> None:
        self.run.finish()


class Metrics:
    """All sinks of a run; ranks other than the main one have none. One that fails is told once, and the run goes on."""

    def __init__(self, sinks: list[Sink], kept: KeptRecords | None = None):
        self.sinks, self.kept = sinks, kept
        self._told: set[str] = set()

    @classmethod
    def from_settings(
        cls,
        folder: Path,
        settings: MonitoringSettings,
        resolved: dict[str, Any],
        is_main: bool,
        resumed_at: int | None = None,
    ) -> Metrics:
        """The sinks that the settings ask for.

        Args:
            resolved: the run's settings, which are stored beside its numbers.
            resumed_at: the step from which a resumed run goes on; later measurements are made again.

        Raises:
            UserError: Weights & Biases refuses the run.
        """
        if not is_main:
            return cls([])
        sinks: list[Sink] = [JsonLines(folder, resumed_at)]
        if settings.enable_tensorboard:
            sinks.append(TensorBoard(folder, resumed_at))
        if settings.enable_wandb:
            sinks.append(WeightsAndBiases(folder, settings, resolved))
        return cls(sinks, KeptRecords(folder))

    def scalars(self, values: dict[str, float], step: int) -> None:
        if self.kept and self.kept.folder_is_lost():
            self._make_again(self.kept)
        self._each(lambda sink: sink.scalars(values, step))

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._each(lambda sink: sink.picture(name, picture, step))

    def measured_again(self, which: Callable[[str], bool], at: int) -> None:
        """Forgets the numbers `at` a step whose names are `which`, since they are about to come again."""
        self._each(lambda sink: sink.measured_again(which, at))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, send: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                send(sink)
            except Exception as error:
                name = type(sink).__name__
                after = "later lines are tried again" if sink.tries_again else "it gets nothing more in this run"
                if name not in self._told:
                    logger.error("metrics: %s failed (%s); training goes on, and %s", name, reason_of(error), after)
                self._told.add(name)
                if not sink.tries_again:
                    self.sinks.remove(sink)

    def _make_again(self, kept: KeptRecords) -> None:
        """Makes the run's folder whole, which somebody has deleted."""
        try:
            kept.make_again()
        except OSError as error:
            if "folder" not in self._told:
                self._told.add("folder")
                logger.error("the run's folder was deleted, and cannot be made again: %s", reason_of(error))
            return
        self._each(lambda sink: sink.begin_again())
        logger.error(
            "the run's folder %s was deleted: it is made again with its settings and metrics, and training goes on; "
            "earlier checkpoints, exports and samples are lost",
            kept.folder,
        )
