"""Real runs whose data ranks divide weights: all that is left of them is what a run leaves whose ranks have all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toml
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.runs import launch, only_run

STEPS = 2
KEYS = {
    "max_steps": STEPS,
    "checkpoint_every_n_steps": 1,
    "gradient_accumulation_steps": 1,
    "activation_checkpointing": True,
    "monitoring__block_norms": True,
    "eval_every_n_steps": 1,
    "ema": {"decay": 0.5, "warmup": "none"},
}
IN_FULL = {"adapter": None, "optimizer__lr": 1e-3}
PROMPTS = [{"prompt": "a red picture", "steps": 1}, {"prompt": "blue", "steps": 3}, {"prompt": "green", "steps": 2}]
LEFT_OUT = ("time", "per_sec", "memory", "wait", "gib", "seconds")


@pytest.fixture
def keys(pictures: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a run that evaluates three pictures and draws three samples, on two ranks, with different numbers of steps."""
    (tmp_path / "three").mkdir()
    for number in (1, 2, 3):
        for ending in ("png", "txt"):
            shutil.copy(pictures / f"{number}.{ending}", tmp_path / "three")
    (tmp_path / "held.toml").write_text(
        toml.dumps({"resolutions": [64], "directory": [{"path": str(tmp_path / "three")}]})
    )
    drawn = {"samples": PROMPTS, "width": 64, "height": 64, "sample_every_n_steps": STEPS}
    held = [{"name": "held", "config": str(tmp_path / "held.toml")}]
    return {**KEYS, "eval_datasets": held, "sampling": drawn, "eval_micro_batch_size_per_gpu": 1}


def left_by(run: Path) -> dict[str, Any]:
    """The numbers, tensors and pictures that a run has left."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        f"{line['name']} {line['step']}": line["value"]
        for line in lines
        if not any(word in line["name"] for word in LEFT_OUT)
    }
    for file in run.rglob("*.safetensors"):
        place = file.parent.relative_to(run) / ("" if file.name.startswith("state-") else file.name)
        found |= {f"{place} {name}": tensor for name, tensor in load_file(file).items()}
    return found | {file.name: Image.open(file).tobytes() for file in run.rglob("*.png")}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        else:
            # Norms of blocks are sums over ranks.
            assert found[name] == (pytest.approx(value, rel=1e-12) if "block_weight" in name else value), name


def leaves_the_same(
    write_config: Callable[..., Path], keys: dict[str, Any], divided: str
) -> tuple[Path, dict[str, Any]]:
    """Two runs on two ranks, of which one divides weights. Returns that one and what it has left."""
    left = {}
    for zero_stage in (0, 3):
        config = write_config(**keys, zero_stage=zero_stage)
        codes, log = launch(config, processes=2)
        assert set(codes) == {0}, log
        run = only_run(config).rename(config.with_name(f"divided {zero_stage}"))
        left[zero_stage] = left_by(run)
    assert f"zero_stage:   3, optimizer state, gradients and {divided} of the blocks divided among 2 data ranks" in log
    assert "divided blocks a rank keeps" in log and "3 of the stage's 3 blocks are divided among 2 data ranks" in log
    assert_same(left[3], left[0])
    return run, left[3]


def test_a_lora_of_a_divided_base_is_the_same(write_config: Callable[..., Path], keys: dict[str, Any]) -> None:
    """Of a base in 8 bits, of which pieces of one block wait in the machine's memory."""
    leaves_the_same(write_config, {**keys, "model__transformer_dtype": "float8", "blocks_to_swap": 1}, "frozen weights")


def test_a_divided_full_fine_tune_is_the_same(write_config: Callable[..., Path], keys: dict[str, Any]) -> None:
    """And goes on with one rank, from its first step; and its samples can be drawn by two."""
    keys |= IN_FULL
    run, left = leaves_the_same(write_config, keys, "trained weights")
    config = write_config(**keys, zero_stage=3)
    codes, log = launch(config, "--sample_only", str(run), processes=2)
    assert set(codes) == {0} and "blocks are divided among 2 data ranks" in log, log
    pictures = list((run / "samples_only" / f"step{STEPS:06d}").glob("*.png"))
    assert len(pictures) == len(PROMPTS)
    assert all(Image.open(picture).tobytes() == left[picture.name] for picture in pictures)
    for leftover in (run / f"global_step{STEPS}", *run.glob(f"step{STEPS}*"), *run.glob("epoch*")):
        shutil.rmtree(leftover)
    (run / "latest").write_text("global_step1")
    keys |= {"gradient_accumulation_steps": 2, "sampling": None}
    codes, log = launch(write_config(**keys, zero_stage=3), "--resume_from_checkpoint", str(run))
    assert codes == [0] and "zero_stage:   3 changes nothing here" in log, log
    weights = {name: value for name, value in left_by(run).items() if f"global_step{STEPS} weights/" in name}
    assert weights
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, left[name], rtol=1e-5, atol=1e-5)
