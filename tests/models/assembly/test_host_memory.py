"""What the processes of a pipeline take of the host's memory while weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from models.assembly.stage import load_stage
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from tests.own_memory import MIB, Watch
from tests.processes import run_ranks
from utils.adapters.lora import LoraSettings
from utils.ranks import Ranks

LARGER = {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 48,
    "num_attention_heads": 12,
    "axes_dims_rope": [8, 20, 20],
}


def load(ranks: Ranks, folder: Path) -> tuple[int, int]:
    """Job of a rank: the bytes of its stage, and the most that loading it took."""
    ranks = ranks.with_stages(ranks.world_size)
    flux: Any = tiny_flux.pipeline(folder, dtype="bfloat16")
    settings = settings_of(flux, LoraSettings(type="lora", rank=4), pipeline_stages=ranks.stages)
    with Watch() as watch:
        staged = load_stage(flux, settings, ranks.stage)
    layers = staged.stage_layers(ranks.stage)
    return sum(p.nbytes for layer in layers for p in layer.parameters()), watch.most


def test_a_stage_takes_no_more_while_it_is_loaded(tmp_path: Path) -> None:
    """From float32, tensor by tensor."""
    folder = tiny_flux.write_folder(tmp_path)
    config = {**json.loads((folder / "transformer" / "config.json").read_text()), **LARGER}
    torch.manual_seed(0)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    FluxTransformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    stages = run_ranks(load, 2, folder)
    whole = sum(held for held, _ in stages)
    for held, most in stages:
        assert 0.3 * whole < held < 0.7 * whole
        assert 0.5 * held < most < held + 20 * MIB < 0.9 * whole
