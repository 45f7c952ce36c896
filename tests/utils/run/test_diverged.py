"""Steps whose loss is no number: one is left out and told, a run of them ends the training with what can be done."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

import train as train_py
from tests.runs import metrics, only_run
from utils.errors import UserError
from utils.parallel import wire
from utils.parallel.engine import Engine
from utils.parallel.step_numbers import StepResult
from utils.ranks import Ranks, disconnect
from utils.run.export import load_file
from utils.run.nonfinite import NonFiniteSteps
from utils.run.signals import StopRequests


def train_with_nan(config: Path, monkeypatch: pytest.MonkeyPatch, steps: Collection[int], *flags: str) -> Path:
    """A run whose inputs are no numbers in these steps, the first being 0."""
    train_step = Engine.train_step

    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor

    def spoiling(engine: Engine, micro_batches: Any, number: int, numbers: Any) -> Any:
        if number in steps:
            micro_batches = [wire.map_tensors(spoilt, batch) for batch in micro_batches]
        return train_step(engine, micro_batches, number, numbers)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "train_step", spoiling)
        try:
            train_py.run(train_py.parse_arguments(["--config", str(config), *flags]), Ranks(), StopRequests(), 0.0)
        finally:
            disconnect()
    return only_run(config)


def test_a_step_that_is_not_finite_is_left_out_and_its_files_are_told(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = train_with_nan(write_config(max_steps=4), monkeypatch, {1, 2})
    # The first step of the second epoch is left out.
    loss = metrics(run, "train/loss")
    assert metrics(run, "train/epoch_loss") == {2: loss[1], 4: loss[4]}
    assert sorted(metrics(run, "train/loss")) == [1, 4] and sorted(metrics(run, "train/lr")) == [1, 2, 3, 4]
    assert metrics(run, "train/nonfinite_steps") == {2: 1, 3: 2}
    told = [line for line in caplog.messages if "the weights stay as they were" in line]
    assert len(told) == 2 and told[0].startswith("step 2: loss nan, gradient norm nan") and ".png" in told[0]
    assert any(line.startswith("step 2/4  epoch 1  not finite") for line in caplog.messages)
    (adapter,) = run.rglob("adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(adapter).values())


@pytest.mark.parametrize(
    ("first", "most", "way_on"),
    [
        (0, 1, "nothing was saved since. There is no checkpoint to go on from: start again"),
        (1, 2, "is saved. Go on from a checkpoint (the newest is --resume_from_checkpoint {run}/global_step2)"),
    ],
)
def test_a_run_of_them_ends_the_training_with_its_state_saved(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, first: int, most: int, way_on: str
) -> None:
    config = write_config(checkpoint_every_n_steps=None, max_nonfinite_steps=most)
    with pytest.raises(UserError, match=f"step {first + most}: loss nan.*diverged") as error:
        train_with_nan(config, monkeypatch, range(first, 9))
    assert way_on.format(run=only_run(config)) in str(error.value)


def test_weights_that_are_no_numbers_are_not_saved(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = Engine.train_step

    def spoiling(engine: Engine, micro_batches: Any, number: int, numbers: Any) -> Any:
        if number == 1:
            next(p for p in engine.module.parameters() if p.requires_grad).detach().fill_(math.inf)
        return train_step(engine, micro_batches, number, numbers)

    monkeypatch.setattr(Engine, "train_step", spoiling)
    config = write_config(checkpoint_every_n_steps=1, max_nonfinite_steps=2)
    with pytest.raises(UserError, match="step 3: .*nothing was saved since") as error:
        train_with_nan(config, monkeypatch, ())
    assert f"the newest is --resume_from_checkpoint {only_run(config)}/global_step" in str(error.value)


def test_a_step_by_layers_is_left_out_by_layers_too(caplog: pytest.LogCaptureFixture) -> None:
    """With `gradient_release` those before the spoilt one are stepped when it is found."""
    spoilt = StepResult(loss=1.0, grad_norm=math.nan)
    for by_layer, said in ((False, "the weights stay as they were"), (True, "and the others have moved")):
        caplog.clear()
        assert not NonFiniteSteps(most=2, by_layer=by_layer).follow(1, spoilt, lambda: ["a.png"])
        (told,) = caplog.messages
        assert said in told and ("have moved" in told) is by_layer
