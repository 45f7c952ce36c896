"""The processes that walk a list of configs are launchers of its runs: one that fails, or is asked to stop, ends the
others. Here the runs are processes that sleep."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.processes import Forked, run_ranks
from utils.ranks import Ranks
from utils.run.listed import Outcome, table, walk
from utils.run.signals import StopRequests
from utils.turn import TURN

Behaviour = Callable[[int, str], int]
SLEEP = 30.0


def started(behaviour: Behaviour, rank: int) -> Callable[..., Forked]:
    """What stands for `subprocess.Popen`."""

    def start(command: list[str], env: Mapping[str, str]) -> Forked:
        def behave() -> int:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            return behaviour(rank, command[-1])

        return Forked(behave)

    return start


def one_fails(rank: int, config: str) -> int:
    """In the first run the second rank fails, for which the first one would wait."""
    if config == "a.toml" and rank == 0:
        time.sleep(SLEEP)
    return 3 if config == "a.toml" else 0


def one_is_stopped(rank: int, config: str) -> int:
    """The launcher of the second rank is asked to stop, and its run heeds that; the first one has ended."""
    if rank == 1:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(SLEEP)
    return 0


def walked(ranks: Ranks, behaviour: Behaviour) -> tuple[int, float]:
    # The ranks of this test have met at the same store.
    os.environ |= {TURN: "7", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    subprocess.Popen = started(behaviour, ranks.rank)
    began = time.monotonic()
    with StopRequests() as stop:
        code = walk(["python", "train.py"], [Path("a.toml"), Path("b.toml")], ranks, stop)
    return code, time.monotonic() - began


@pytest.mark.parametrize(
    ("behaviour", "codes"),
    [(one_fails, [1, 1]), (one_is_stopped, [128 + signal.SIGTERM, 128 + signal.SIGINT])],
)
def test_what_ends_a_run_on_one_rank_ends_it_on_all(behaviour: Behaviour, codes: list[int]) -> None:
    results = run_ranks(walked, 2, behaviour)
    assert [code for code, _ in results] == codes
    assert max(seconds for _, seconds in results) < SLEEP / 2


def test_the_table_leaves_out_what_no_run_has(tmp_path: Path) -> None:
    numbers = [("train/lr", 0.1, 2), ("train/loss", 0.5, 2), ("held/loss", 0.25, 2), ("train/lr", 0.1, 3)]
    lines = [f'{{"name": "{name}", "value": {value}, "step": {step}, "time": 1}}\n' for name, value, step in numbers]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    shown = table(
        [Outcome(Path("a.toml"), 0, 65.4, tmp_path), Outcome(Path("b.toml"), 1, 2.0), Outcome(Path("c.toml"))]
    )
    rows = [line.split("  ") for line in shown.splitlines()]
    cells = [[cell.strip() for cell in row if cell] for row in rows]
    assert cells == [
        ["config", "run folder", "exit", "steps", "training loss", "evaluation loss", "time"],
        ["a.toml", str(tmp_path), "0", "3", "0.5000", "0.2500", "0:01:05"],
        ["b.toml", "-", "1", "-", "-", "-", "0:00:02"],
        ["c.toml", "-", "not begun", "-", "-", "-", "-"],
    ]
    assert table([Outcome(Path("b.toml"), 1, 2.0)]).splitlines() == ["config  exit  time", "b.toml  1     0:00:02"]
