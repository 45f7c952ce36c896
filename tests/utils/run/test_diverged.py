"""A run whose loss is no number any more ends with what can be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest

import train as train_py
from tests.runs import only_run
from utils.errors import UserError
from utils.parallel.engine import Engine
from utils.ranks import Ranks, disconnect
from utils.run.signals import StopRequests


@pytest.mark.parametrize("step", [0, 1])
def test_a_diverged_run_is_led_to_a_checkpoint_only_if_there_is_one(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    train_step = Engine.train_step

    def diverging(engine: Engine, micro_batches: Any, number: int, numbers: Any) -> Any:
        result = train_step(engine, micro_batches, number, numbers)
        return replace(result, loss=nan) if number == step else result

    monkeypatch.setattr(Engine, "train_step", diverging)
    config = write_config(checkpoint_every_n_steps=1)
    try:
        with pytest.raises(UserError, match=f"step {step + 1}: loss nan.*diverged") as error:
            train_py.run(train_py.parse_arguments(["--config", str(config)]), Ranks(), StopRequests(), 0.0)
    finally:
        disconnect()
    newest = f"the newest is --resume_from_checkpoint {only_run(config) / 'global_step1'}"
    assert (newest in str(error.value)) is (step == 1)
    assert ("There is no checkpoint to go on from: start again" in str(error.value)) is (step == 0)
