"""Going on with weights in another type than that of the checkpoint."""

from __future__ import annotations

import logging
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

import optimizers
from models.assembly.trainer import restore_or_start
from optimizers.adamw import AdamW, AdamWSettings
from optimizers.ema import EMA
from optimizers.rounding import MASTER
from utils.ranks import Ranks
from utils.run import checkpoint, saving
from utils.run.checkpoint import ResumeFlags
from utils.run.progress import Progress
from utils.settings.model_schema import ModelSettings
from utils.settings.run_tables import EMASettings
from utils.settings.schema import Settings

SETTINGS = Settings(
    output_dir=Path("runs"),
    dataset=Path("data.toml"),
    model=ModelSettings(type="flux"),
    optimizer=AdamWSettings(type="adamw", lr=1e-4, weight_decay=0.1),
    ema=EMASettings(decay=0.5, warmup="none"),
)
MADE_WITH = {"identity": {}, "optimizer": {}, "steps_in_epoch": 9}
TYPES = list(permutations([torch.float32, torch.bfloat16, torch.float16], 2))
"""Before and after."""
Named = dict[str, Parameter]


def parameters(dtype: torch.dtype) -> Named:
    """With values that all types hold exactly."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"matrix": (5, 3), "vector": (7,), "scalar": (), "untouched": (2,)}
    return {name: Parameter(torch.randint(-8, 8, shape, generator=draw).to(dtype)) for name, shape in shapes.items()}


def optimizer_of(named: Named) -> AdamW:
    return optimizers.made([{"params": list(named.values())}], SETTINGS.optimizer)


def train(named: Named, optimizer: AdamW, ema: EMA, steps: range) -> None:
    """By gradients that all types hold exactly; one parameter gets none, as one that another part of a step uses."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for name, parameter in named.items():
            if name != "untouched":
                parameter.grad = torch.randint(-8, 8, parameter.shape, generator=draw).to(parameter.dtype)
        optimizer.step()
        ema.update(step)


@pytest.mark.parametrize(("old", "new"), TYPES, ids=str)
def test_all_goes_on_where_float32_goes(
    old: torch.dtype, new: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights, or their masters, and averages are to the bit those of a run that is float32 from its start to its end,
    though steps are smaller than what 16 bits can tell apart."""
    whole = parameters(torch.float32)
    whole_optimizer = optimizer_of(whole)
    whole_ema = EMA(whole.items(), SETTINGS.ema, whole_optimizer)
    train(whole, whole_optimizer, whole_ema, range(1, 7))

    first = parameters(old)
    optimizer = optimizer_of(first)
    ema = EMA(first.items(), SETTINGS.ema, optimizer)
    train(first, optimizer, ema, range(1, 4))
    saving.save(tmp_path, Ranks(), Progress(step=3), first, optimizer, MADE_WITH, ema)

    then = {name: Parameter(torch.zeros_like(parameter, dtype=new)) for name, parameter in first.items()}
    optimizer = optimizer_of(then)
    opened = checkpoint.Checkpoint(tmp_path / "global_step3")
    with caplog.at_level(logging.INFO):
        ema = restore_or_start(SETTINGS, ResumeFlags(""), opened, opened.progress, then, optimizer)
    was, is_now = (str(dtype).removeprefix("torch.") for dtype in (old, new))
    assert f"4 of 4 weights go on in another type: 'matrix' was {was} and is {is_now}" in caplog.text
    train(then, optimizer, ema, range(4, 7))
    for name, expected in whole.items():
        exact = optimizer.state[then[name]].get(MASTER, then[name])
        assert torch.equal(exact.float(), expected), name
        assert torch.equal(then[name], expected.to(new)), name
        assert torch.equal(ema.averages[name], whole_ema.averages[name]), name
        assert (MASTER in optimizer.state[then[name]]) == (new != torch.float32 and name != "untouched")


def test_with_an_optimizer_that_remembers_nothing_the_masters_are_the_weights(tmp_path: Path) -> None:
    first = parameters(torch.bfloat16)
    optimizer = optimizer_of(first)
    train(first, optimizer, EMA(first.items(), SETTINGS.ema, optimizer), range(1, 4))
    saving.save(tmp_path, Ranks(), Progress(step=3), first, optimizer, MADE_WITH)
    then = parameters(torch.float32)
    flags = ResumeFlags("", reset_optimizer=True)
    anew = optimizer_of(then)
    opened = checkpoint.Checkpoint(tmp_path / "global_step3")
    restore_or_start(SETTINGS, flags, opened, opened.progress, then, anew)
    assert not anew.state
    master = optimizer.state[first["matrix"]][MASTER]
    assert torch.equal(then["matrix"], master) and not torch.equal(master, first["matrix"].float())
