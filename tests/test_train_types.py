"""Runs that go on in another type of weights: what they train, and the record that they leave of it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.runs import launch, only_run
from tests.test_train_ema import assert_averages, state, weights_at_start
from utils.settings.run_tables import EMASettings

EMA = {"decay": 0.5, "warmup": "none"}
KEYS = {"checkpoint_every_n_steps": 1, "save_every_n_steps": 1, "save_format": "diffusers", "ema": EMA}
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("adapter__dtype", {}),
    "full": ("model__transformer_dtype", {"adapter": None, "optimizer__lr": 1e-4}),
}


def exported(run: Path, step: int) -> tuple[dict[str, torch.Tensor], str]:
    """The weights of an export by name, and the hash of the settings with which it was made."""
    for file in run.glob("*/**/*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            if header.get("step") == str(step) and "weights" not in header:
                return {name: opened.get_tensor(name) for name in opened.keys()}, header["settings_hash"]
    raise AssertionError(f"no export of step {step}")


@pytest.mark.parametrize("trained", TRAINED)
def test_bfloat16_and_float32_go_on_as_each_other(write_config: Callable[..., Path], trained: str) -> None:
    """Each step moves what is exported, the averages are those of the exact weights of all steps, and each time that
    the run goes on leaves the settings that its exports name."""
    key, keys = TRAINED[trained]
    types = ("float32", "bfloat16", "float32")
    for step, dtype in enumerate(types, start=1):
        config = write_config(**KEYS, **keys, max_steps=step, **{key: dtype})
        if step == 1:
            start = weights_at_start(config, 1)
        codes, log = launch(config, *(["--resume_from_checkpoint"] if step > 1 else []))
        assert codes == [0], log
        assert ("weights go on in another type" in log) == (step > 1)
    run = only_run(config)
    weights = [start, *(state(run, step, "weights") for step in (1, 2, 3))]
    # In float32: the weights, or their masters.
    assert all(tensor.dtype == torch.float32 for tensors in weights[1:] for tensor in tensors.values())
    for step in (1, 2, 3):
        assert_averages(state(run, step, "ema"), EMASettings(**EMA), weights[: step + 1])
        moved = [not torch.equal(weights[step][name], weights[step - 1][name]) for name in start]
        assert sum(moved) > len(moved) // 2
    records = {1: run, 2: run / "resumed_step1", 3: run / "resumed_step2"}
    exports = {step: exported(run, step) for step in records}
    for step, dtype in enumerate(types, start=1):
        tensors, made_with = exports[step]
        text = (records[step] / "settings.toml").read_text()
        assert text.startswith(f"# settings_hash: {made_with}\n")
        table, _, name = key.partition("__")
        assert tomllib.loads(text)[table][name] == dtype
        assert {str(tensor.dtype) for tensor in tensors.values()} >= {f"torch.{dtype}"}
    assert any(not torch.equal(tensor, exports[2][0][name].to(tensor)) for name, tensor in exports[3][0].items())
