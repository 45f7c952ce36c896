"""The limit of the size of a LoRA's updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import optimizers
import train as train_py
from tests.runs import only_run
from utils.adapters.attach import attach, initialise
from utils.adapters.lora import LoraSettings
from utils.adapters.norms import factors_in, limit_norms
from utils.errors import UserError
from utils.ranks import Ranks, disconnect
from utils.run.export import load_file
from utils.run.signals import StopRequests
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import Settings


def test_larger_updates_are_made_as_large_as_the_limit_and_others_stay() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 5), nn.Conv2d(3, 4, 3), nn.Linear(5, 6)])})
    settings = LoraSettings(type="lora", rank=2, alpha=1.0, convolutions=True)
    attach(model, ("blocks",), settings)
    initialise(model, [model], settings, seed=0)
    factors = factors_in([model])
    assert len(factors) == 3
    for size, one in zip((1.0, 1.0, 0.1), factors, strict=True):
        nn.init.normal_(one.up, std=size)

    def update(number: int) -> torch.Tensor:
        down, up, scale = factors[number]
        return scale * up.flatten(1) @ down.flatten(1)

    before = [update(number).detach().clone() for number in range(3)]
    norms = [matrix.norm().item() for matrix in before]
    for one, norm in zip(factors, norms, strict=True):
        assert one.norm().item() == pytest.approx(norm, rel=1e-5)
    limit = sorted(norms)[1] * 0.9
    limit_norms(factors, limit)
    for number, (matrix, norm) in enumerate(zip(before, norms, strict=True)):
        torch.testing.assert_close(update(number).detach(), matrix * min(1.0, limit / norm))


def test_a_run_keeps_its_updates_below_the_limit(write_config: Callable[..., Path]) -> None:
    keys = {"adapter__scale_weight_norms": 1e-3, "adapter__dropout": 0.0, "optimizer__lr": 0.1}
    config = write_config(max_steps=2, checkpoint_every_n_steps=None, save_format="diffusers", warmup_steps=0, **keys)
    try:
        train_py.run(train_py.parse_arguments(["--config", str(config)]), Ranks(), StopRequests(), 0.0)
    finally:
        disconnect()
    (path,) = only_run(config).rglob("adapter_model.safetensors")
    tensors = load_file(path)
    modules = {name.partition(".lora_")[0] for name in tensors}
    norms = [(tensors[f"{one}.lora_B.weight"] @ tensors[f"{one}.lora_A.weight"]).norm().item() for one in modules]
    assert max(norms) == pytest.approx(1e-3, rel=1e-4)


def test_what_keeps_other_weights_is_refused() -> None:
    def settings(optimizer: str) -> Settings:
        chosen = optimizers.find(optimizer).settings(type=optimizer, lr=1e-3)
        adapter = LoraSettings(type="lora", rank=1, scale_weight_norms=1.0)
        model = ModelSettings(type="flux")
        return Settings(output_dir="a", dataset="b", model=model, optimizer=chosen, adapter=adapter)

    optimizers.check_steps(settings("adamw"))
    with pytest.raises(UserError, match=r"\[adapter\] scale_weight_norms: does not go with .adamw_schedule_free."):
        optimizers.check_steps(settings("adamw_schedule_free"))
    for keys in ({"init": "pissa"}, {"dtype": "bfloat16"}):
        adapter = LoraSettings(type="lora", rank=1, scale_weight_norms=1.0, **keys)
        assert "scale_weight_norms" in dict(adapter.problems(ModelSettings(type="flux")))
