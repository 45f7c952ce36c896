"""Norms by block, of all stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from tests.runs import launch, metrics, newest_export, only_run
from utils.run.block_norms import block_of
from utils.run.numbers import BLOCK_GRADIENT, BLOCK_WEIGHT


def norms_in(run: Path, beginning: str) -> dict[str, float]:
    """The norms of the second step, by block."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["name"].startswith(beginning) and line["step"] == 2]
    return {line["name"].removeprefix(beginning): line["value"] for line in lines}


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("transformer_blocks.12.attn.to_q.lora_A.weight", "transformer_blocks.12"),
        ("unet.down_blocks.1.attentions.0.proj_in.weight", "unet.down_blocks.1"),
        ("proj_out.weight", "others"),
        ("layer1.weight", "others"),
    ],
)
def test_the_block_of_a_parameter(name: str, block: str) -> None:
    assert block_of(name) == block


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "two stages": (2, {"pipeline_stages": 2}),
    "two data ranks": (2, {"zero_stage": 2, "gradient_accumulation_steps": 1}),
    "released": (1, {"optimizer__gradient_release": True, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}),
}


def test_norms_are_those_of_all_at_any_layout(write_config: Callable[..., Path]) -> None:
    found = {}
    for layout, (processes, keys) in LAYOUTS.items():
        config = write_config(max_steps=2, adapter__dropout=0.0, monitoring__block_norms=True, **keys)
        codes, log = launch(config, processes=processes)
        assert set(codes) == {0}, log
        run = only_run(config)
        gradients, weights = norms_in(run, BLOCK_GRADIENT), norms_in(run, BLOCK_WEIGHT)
        assert sqrt(sum(norm**2 for norm in gradients.values())) == pytest.approx(
            metrics(run, "train/grad_norm")[2], rel=1e-5
        )
        of_block = [tensor for name, tensor in newest_export(run).items() if ".single_transformer_blocks.0." in name]
        expected = sqrt(sum(tensor.double().square().sum() for tensor in of_block))
        assert weights["single_transformer_blocks.0"] == pytest.approx(expected, rel=1e-5)
        if layout == "two stages":
            assert "Norm of the gradient, transformer_blocks" in (run / "run.html").read_text()
        found[layout] = gradients
        shutil.rmtree(run)
    assert found["two stages"] == pytest.approx(found["two data ranks"], rel=1e-4)
    assert set(found["two stages"]) == set(found["released"])


def test_nobody_is_told_who_has_not_asked(write_config: Callable[..., Path]) -> None:
    config = write_config(max_steps=1)
    assert launch(config)[0] == [0]
    assert "block_" not in (only_run(config) / "metrics.jsonl").read_text()
