"""A list of configs: `--config a.toml b.toml` runs one after the other, and ends with a table.

Neither torch.distributed nor DeepSpeed begins twice in a process, nor does all memory come back. So each run has
processes of its own, one for each rank, and those that a launcher has started walk the list together: they are its
runs' launchers. They meet at the store that their runs meet at too, each under a name of its own (`utils/turn.py`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from utils.errors import UserError
from utils.ranks import LaunchError, Ranks, meet
from utils.run.numbers import Numbers
from utils.run.signals import StopRequests
from utils.turn import TOLD, TURN

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
SECONDS_TO_END = 30.0
"""How long the processes of a run have after another one of it has failed, or has left with the others' stop."""
SILENCE = timedelta(minutes=5)
"""How long another process of the list may give no sign of life."""
MISSING, NOT_BEGUN = "-", "not begun"
MAX_RESTARTS = "TORCHELASTIC_MAX_RESTARTS"


@dataclass(frozen=True)
class Outcome:
    """How a run of the list has ended.

    Attributes:
        code: its exit code, of the rank that failed first if one did; None if it was not begun.
        folder: of the run, if it came to have one.
    """

    config: Path
    code: int | None = None
    seconds: float = 0.0
    folder: Path | None = None


class Meeting:
    """The processes that walk one list."""

    def __init__(self, ranks: Ranks, store: dist.Store | None):
        self.ranks, self._store, self._beat = ranks, store, 0
        self._own: dict[str, Any] = {}
        self._seen: dict[int, tuple[str, float]] = {}

    def tell(self, name: str, value: Any) -> None:
        """Tells the others something of this process, by a name that is given once."""
        self._own[name] = value
        if self._store:
            self._store.set(f"{name}/{self.ranks.rank}", json.dumps(value))

    def told(self, name: str) -> dict[int, Any]:
        """What those have told that have told it, by their ranks."""
        if not self._store:
            return {0: self._own[name]} if name in self._own else {}
        keys = {rank: f"{name}/{rank}" for rank in range(self.ranks.world_size)}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def beat(self, awaited: Sequence[int] = ()) -> None:
        """Gives a sign of life.

        Raises:
            TimeoutError: one that is `awaited` has given none for long.
        """
        if not self._store:
            return
        self._beat += 1
        self._store.set(f"beat/{self.ranks.rank}", str(self._beat))
        now = time.monotonic()
        for rank in awaited:
            beat = self._store.get(f"beat/{rank}").decode() if self._store.check([f"beat/{rank}"]) else ""
            if self._seen.get(rank, ("none", 0.0))[0] != beat:
                self._seen[rank] = (beat, now)
            if now - self._seen[rank][1] > SILENCE.total_seconds():
                raise TimeoutError(f"--config: the process of rank {rank} that walks the list is gone, or hangs")


class Walk:
    """The way through a list of configs, on one rank.

    Args:
        command: runs one config, whose path is appended.
    """

    def __init__(self, command: Sequence[str], meeting: Meeting, stop: StopRequests):
        self.command, self.meeting, self.stop = command, meeting, stop
        self.stops = False

    def run(self, config: Path, turn: int, told: Path) -> Outcome:
        """One run, on all ranks. Whether the list ends with it is in `stops` then, the same on all.

        Args:
            told: the file in which it names its folder.
        """
        began, name = time.monotonic(), f"turn{turn}"
        environment = {**os.environ, **self._where(), TURN: str(turn), TOLD: str(told)}
        process = subprocess.Popen([*self.command, "--config", str(config)], env=environment)
        try:
            code, was_ended = self._wait(process, name)
        except BaseException:
            process.terminate()
            raise
        self.meeting.tell(name, [code, was_ended, self.stop.asked_silently()])
        ends = self._all(name)
        self.stops = any(stopped for _, _, stopped in ends.values())
        failed = [code for code, was_ended, _ in ends.values() if code and not was_ended]
        code = next(iter([*failed, *(code for code, *_ in ends.values() if code)]), 0)
        folder = Path(told.read_text(encoding="utf-8")) if told.is_file() else None
        return Outcome(config, code, time.monotonic() - began, folder)

    def _where(self) -> Mapping[str, str]:
        """Where the processes of a run meet: at the store at which these have met, which they do not host."""
        ranks = self.meeting.ranks
        if ranks.world_size == 1:
            return {}
        return {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}

    def _wait(self, process: subprocess.Popen, name: str) -> tuple[int, bool]:
        """Waits for this rank's process: its exit code as in shells, and whether it was ended after another failed."""
        passed_on, ended_at, polls = False, None, 0
        while (code := process.poll()) is None:
            if self.stop.asked_silently() and not passed_on:
                # One that the terminal has sent to all arrives twice, which counts as once.
                process.send_signal(self.stop.received or signal.SIGTERM)
                passed_on = True
            if polls % 10 == 0:
                self.meeting.beat()
            if ended_at is None and any(code for code, *_ in self.meeting.told(name).values()) and not passed_on:
                # It may not have met the others yet, and would wait for them. A launcher does the same.
                process.terminate()
                ended_at = time.monotonic()
            elif ended_at is not None and time.monotonic() - ended_at > SECONDS_TO_END:
                process.kill()
            polls += 1
            time.sleep(POLL_SECONDS)
        return (128 - code if code < 0 else code), ended_at is not None

    def _all(self, name: str) -> dict[int, Any]:
        """What all have told, once they have."""
        everyone = range(self.meeting.ranks.world_size)
        while len(told := self.meeting.told(name)) < len(everyone):
            self.meeting.beat([rank for rank in everyone if rank not in told])
            time.sleep(POLL_SECONDS)
        return told

    def end(self) -> None:
        """The main process, which may host the store, leaves last."""
        self.meeting.tell("end", True)
        if self.meeting.ranks.is_main:
            self._all("end")


def check_launch() -> None:
    """Raises:
    LaunchError: the launcher would start the list again.
    """
    if int(os.environ.get(MAX_RESTARTS) or 0):
        raise LaunchError(
            "--max_restarts: with several configs a run that fails does not keep the next one from running, and "
            "torchrun would begin the whole list again after it; leave --max_restarts out, or name one config"
        )


def check_all(read: Callable[[Path], Any], configs: Sequence[Path]) -> None:
    """Reads all configs, silently: each run says of its own what is to be said.

    Raises:
        UserError: with the problems of all of them.
    """
    problems, level = [], logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        for config in configs:
            try:
                read(config)
            except UserError as error:
                problems += error.problems
    finally:
        logging.disable(level)
    if problems:
        # They may name the same file of data.
        raise UserError(dict.fromkeys(problems))


def walk(
    command: Sequence[str],
    configs: Sequence[Path],
    ranks: Ranks,
    stop: StopRequests,
    master_port: int | None = None,
) -> int:
    """Runs the configs one after the other; one that fails does not keep the next from running, and a stop of any rank
    ends the list. The main rank shows how each has ended. Returns the exit code: 0 if all have succeeded, that of a
    stop, or 1.

    Args:
        command: of one run, without its config.

    Raises:
        LaunchError, TimeoutError: the processes do not meet, or have lost one of theirs.
    """
    store = None
    if ranks.world_size > 1:
        with stop.ending_at_once():
            stop.raise_if_stopping()
            store = dist.PrefixStore("list", meet(ranks, master_port))
    walker = Walk(command, Meeting(ranks, store), stop)
    outcomes: list[Outcome] = []
    try:
        with tempfile.TemporaryDirectory(prefix="penstock_list_") as folder:
            for turn, config in enumerate(configs, 1):
                if walker.stops:
                    outcomes.append(Outcome(config))
                    continue
                logger.info("run %d of %d: %s", turn, len(configs), config)
                outcomes.append(walker.run(config, turn, Path(folder) / str(turn)))
        if ranks.is_main:
            sys.stdout.write(f"\n{table(outcomes)}\n")
            sys.stdout.flush()
        walker.end()
    except dist.DistError as error:
        raise LaunchError("--config: the main process of the list, at which the others meet, is gone") from error
    if walker.stops:
        return stop.exit_code
    return int(any(outcome.code for outcome in outcomes))


def table(outcomes: Sequence[Outcome]) -> str:
    """How the runs have ended, as lines of text; columns in which none has anything are left out."""
    head = ["config", "run folder", "exit", "steps", "training loss", "evaluation loss", "time"]
    rows = [_row(outcome) for outcome in outcomes]
    shown = [index for index in range(len(head)) if any(row[index] != MISSING for row in rows)]
    lines = [[row[index] for index in shown] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _row(outcome: Outcome) -> list[str]:
    if outcome.code is None:
        return [str(outcome.config), MISSING, NOT_BEGUN, MISSING, MISSING, MISSING, MISSING]
    steps, loss, evaluated = _last_numbers(outcome.folder) if outcome.folder else (MISSING, MISSING, MISSING)
    took = str(timedelta(seconds=round(outcome.seconds)))
    folder = str(outcome.folder) if outcome.folder else MISSING
    return [str(outcome.config), folder, str(outcome.code), steps, loss, evaluated, took]


def _last_numbers(folder: Path) -> tuple[str, str, str]:
    """The run's last step, its loss, and the last loss of its first evaluation set."""
    numbers = Numbers(folder)
    try:
        numbers.read()
    except OSError:
        return MISSING, MISSING, MISSING
    steps, loss = numbers.points("train/lr"), numbers.last("train/loss")
    evaluated = next((numbers.last(name) for name in numbers.evaluations()), None)
    return (
        f"{steps[-1][0]:.0f}" if steps else "0",
        MISSING if loss is None else f"{loss:.4f}",
        MISSING if evaluated is None else f"{evaluated:.4f}",
    )
