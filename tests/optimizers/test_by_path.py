"""Somebody's optimizer, of which no more is known than its class."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import optimizers
from models.assembly.preflight import check_optimizer
from optimizers import by_path
from utils.errors import UserError
from utils.ranks import Ranks
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import Settings


def run_with(optimizer: dict[str, object], **keys: object) -> Settings:
    chosen = optimizers.find(str(optimizer["type"])).settings
    return Settings(
        output_dir=Path("runs"),
        dataset=Path("data.toml"),
        model=ModelSettings(type="flux"),
        optimizer=chosen(**optimizer),
        **keys,
    )


def test_a_path_means_a_class_and_its_arguments_are_the_keys() -> None:
    kind = optimizers.find("torch.optim.Adamax")
    settings = kind.settings(type="torch.optim.Adamax", lr=0.1, betas=[0.5, 0.6], weight_decay=0.2)
    weight = nn.Parameter(torch.ones(3))
    optimizer = optimizers.build([{"params": [weight]}], settings)
    assert type(optimizer) is torch.optim.Adamax
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.1, (0.5, 0.6), 0.2, 1e-8)
    assert kind.settings(type="torch.optim.Adamax", lr=0.1).weight_decay == 0.0
    with pytest.raises(ValidationError, match="beta1"):
        kind.settings(type="torch.optim.Adamax", lr=0.1, beta1=0.5)
    with pytest.raises(ValidationError, match="eps"):
        kind.settings(type="torch.optim.Adamax", lr=0.1, eps="small")


def test_a_name_in_pytorch_optimizer_means_its_class() -> None:
    kind = optimizers.find("Adan")
    assert kind.type == "pytorch_optimizer.Adan" and optimizers.find(kind.type).settings.__name__ == "Settings_Adan"
    assert optimizers.find("ScheduleFreeRAdam").averages
    # Those that have a file of their own come first.
    assert optimizers.find("Prodigy").library == "ours"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("AdamX", r'no optimizer is called "AdamX"; known: adafactor, .*some\.module\.Class'),
        ("no_such_module.Adam", "No module named 'no_such_module'"),
        ("torch.optim.Nothing", "torch.optim has nothing of this name"),
        ("torch.nn.Linear", r"torch.nn has no class of a torch.optim.Optimizer of this name"),
    ],
)
def test_what_is_no_optimizer_is_told(path: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        optimizers.find(path)


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        ({"type": "torch.optim.LBFGS", "lr": 0.1}, "takes no step of a small parameter: ValueError: LBFGS"),
        ({"type": "torch.optim.Adamax", "lr": 0.1, "betas": [2.0, 0.5]}, "Invalid beta parameter at index 0"),
        ({"type": "torch.optim.Muon", "lr": 0.1}, "Muon only supports 2D parameters"),
    ],
)
def test_what_takes_no_step_is_told_before_anything_is_loaded(optimizer: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=rf"\[optimizer\].*{says}"):
        optimizers.check(run_with(optimizer).optimizer, "cpu")


def test_each_process_tries_it_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever touches another one takes some of its memory for as long as the process lives."""
    tried = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(by_path, "tried", lambda settings, device: tried.append(device))
    settings = run_with({"type": "torch.optim.Adamax", "lr": 0.1})
    check_optimizer(settings, Ranks(rank=1, world_size=2, local_rank=1).device)
    assert tried == [torch.device("cuda", 1)]


def test_decay_that_a_class_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(torch.optim.SGD):
        def __init__(self, params: object, lr: float) -> None:
            super().__init__(params, lr)

    module = types.ModuleType("somebodys_module")
    module.Plain = Plain
    monkeypatch.setitem(sys.modules, "somebodys_module", module)
    kind = optimizers.find("somebodys_module.Plain")
    optimizers.check(kind.settings(type=kind.type, lr=0.1), "cpu")
    with pytest.raises(ValidationError, match="weight_decay"):
        kind.settings(type=kind.type, lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("shape", [(40, 30), (7,), (), (2000, 300)])
def test_state_is_counted_by_a_step(shape: tuple[int, ...]) -> None:
    settings = optimizers.find("torch.optim.Adamax").settings(type="torch.optim.Adamax", lr=0.1)
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.zeros(shape, dtype=dtype, device="meta")
        moments = 2 * parameter.nbytes if shape else 0
        assert optimizers.state_bytes(settings, parameter) == moments


def test_that_each_process_sums_over_its_own_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        optimizers.warn_of_sums(run_with({"type": "torch.optim.Adamax", "lr": 0.1}))
        optimizers.warn_of_sums(run_with({"type": "prodigy"}, pipeline_stages=2))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        optimizers.warn_of_sums(run_with({"type": "torch.optim.Adamax", "lr": 0.1}, pipeline_stages=2))
    assert 'steps its own parameters with "torch.optim.Adamax"' in caplog.text


def test_a_schedule_that_breaks_an_optimizer_is_refused() -> None:
    for name in ("adamw_schedule_free", "prodigy_plus_schedule_free"):
        optimizers.check_schedule(run_with({"type": name, "lr": 0.1}, lr_scheduler="constant", warmup_steps=5))
        with pytest.raises(UserError, match=rf'lr_scheduler.*"{name}" averages what is trained .*"constant"'):
            optimizers.check_schedule(run_with({"type": name, "lr": 0.1}, lr_scheduler="cosine"))
    optimizers.check_schedule(run_with({"type": "prodigy"}, lr_scheduler="cosine"))
