"""The benchmarks that build a run by themselves go with the program as it is; what they measure is not looked at."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks import loading, overhead, startup, travelling
from tests.benchmarks.gpu import full_size
from tests.benchmarks.gpu.__main__ import within
from tests.benchmarks.setting import MINI_FLUX
from tests.models.sized import FullSize, pooled_of, text_of, vae_of
from tests.processes import run_ranks
from tests.utils.parallel import toy_flux
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
    told, threads = [], set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), trainer.prefetched() as batches:
        read_on = trainer.parts.engine.beside_backward
        assert read_on == batches.go_on
        trainer.parts.engine.beside_backward = lambda: told.append(read_on())
        for _ in range(2):
            overhead.trainer_step(trainer, batches)
        raise KeyboardInterrupt
    assert not set(threading.enumerate()) - threads, "whatever ends it, nobody reads on"
    overhead.bare_step(trainer)()
    return trainer.progress.step, len(told)


def test_the_trainer_that_is_compared_trains(tmp_path: Path) -> None:
    assert run_ranks(stepped, 1, str(tmp_path)) == [(2, 2)]


TOY = FullSize(
    "a toy",
    "flux",
    {
        "transformer": {"_class_name": "FluxTransformer2DModel", **toy_flux.CONFIG},
        "vae": vae_of(4, shift_factor=0.1),
    },
    {**text_of("t5", 8, 32, mask=False), **pooled_of(clip_pooled=32)},
    (64, 64, 1),
)


def stepped_as_at_full_size(ranks: Ranks, folder: str) -> list[tuple[float, float]]:
    """Job of a process: the loss of a step and what is planned for it, in each way of the full-size benchmark that a
    processor can go."""
    found = []
    for keys in full_size.CASES.values():
        if keys.get("plain") or keys.get("compile") or keys.get("of") == "WAN":
            continue
        keys = {key: value for key, value in keys.items() if key != "of"}
        if "blocks_to_swap" in keys:
            keys["blocks_to_swap"] = 3
        disconnect()
        step, planned = full_size.trained(TOY, Path(folder), keys)
        found.append((step(), planned))
    return found


def test_full_size_models_are_trained_as_in_a_run(tmp_path: Path) -> None:
    (found,) = run_ranks(stepped_as_at_full_size, 1, str(tmp_path))
    assert len(found) == 9 and all(math.isfinite(loss) and planned > 0 for loss, planned in found)


def test_a_part_that_takes_too_long_leaves_nothing_running(tmp_path: Path) -> None:
    """Such as processes that wait for their turn on the card."""
    child = f"import time; time.sleep(1); open({str(tmp_path / 'went on')!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert within(0.5, [sys.executable, "-c", parent]) == "took more than 0.5 s"
    time.sleep(1.2)
    assert not list(tmp_path.iterdir())
    assert within(10, [sys.executable, "-c", "raise SystemExit(3)"]) == "exit code 3"
    assert within(10, [sys.executable, "-c", "pass"]) is None


def sent(ranks: Ranks) -> dict[str, float]:
    """Job of a rank: the benchmark of gradients that travel, with little to compute."""
    travelling.BLOCKS, travelling.WIDTH, travelling.ROUNDS, travelling.STEPS = 3, 8, 4, 1
    travelling.LINK_SECONDS = 0.001
    return travelling.steps(ranks)


def test_gradients_are_sent_over_the_link_that_is_made_up() -> None:
    for seconds in run_ranks(sent, 2):
        assert seconds.keys() == travelling.WAYS.keys() and min(seconds.values()) > 0
    assert seconds["behind the pass"] > 0.001


def loaded(ranks: Ranks, folder: Path) -> tuple[float, float]:
    """Job of a rank: the benchmark of loading, with a model that is there."""
    return loading.load(ranks, folder, True, {}, {"zero_stage": 3})


def test_what_is_loaded_is_measured() -> None:
    for peak, kept in run_ranks(loaded, 2, MINI_FLUX):
        assert peak > 0 and kept > 0
