"""The benchmarks that build a run by themselves go with the program as it is; what they measure is not looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.benchmarks import overhead, startup
from tests.processes import run_ranks
from utils.ranks import Ranks, disconnect


def started(ranks: Ranks, config: str) -> list[str]:
    """Job of a process, which meets the others anew: a benchmark begins where a run does."""
    disconnect()
    return [part for part, _ in startup.parts(config)]


def test_a_start_has_its_parts(write_config: Callable[..., Path]) -> None:
    (parts,) = run_ranks(started, 1, str(write_config(eval_datasets=None, sampling=None)))
    assert parts[0] == "import of train.py and torch" and parts[-1] == "first step"


def stepped(ranks: Ranks, folder: str) -> tuple[int, int]:
    """Job of a process: two steps of the trainer that is compared with a bare loop. Returns how many steps it made, and
    how often it was told to read on within one."""
    disconnect()
    trainer = overhead.built_trainer(Path(folder), pictures=64)
    batches, told = trainer.prefetched(), []
    read_on = trainer.parts.engine.beside_backward
    trainer.parts.engine.beside_backward = lambda: told.append(read_on())
    for _ in range(2):
        overhead.trainer_step(trainer, batches)
    overhead.bare_step(trainer)()
    batches.close()
    assert read_on == batches.go_on
    return trainer.progress.step, len(told)


def test_the_trainer_that_is_compared_trains(tmp_path: Path) -> None:
    assert run_ranks(stepped, 1, str(tmp_path)) == [(2, 2)]
