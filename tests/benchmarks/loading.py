"""What each of two data ranks holds in memory of its own, at most, while it loads a stage that they divide or swap.

A Flux of 12 blocks with random weights in a float32 file, loaded in bfloat16. Pages of the mapped file are not counted,
since the system takes them back. The references are all of the stage, and what the rank keeps of it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from tests.own_memory import MIB, Watch
from tests.processes import run_ranks
from utils.ranks import Ranks

SHAPE = {
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 64,
    "num_attention_heads": 20,
    "axes_dims_rope": [8, 28, 28],
}
BLOCKS = 12
CASES: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "LoRA, zero_stage = 3": (True, {}, {"zero_stage": 3}),
    "LoRA on float8, zero_stage = 3": (True, {"transformer_dtype": "float8"}, {"zero_stage": 3}),
    "in full, zero_stage = 3": (False, {}, {"zero_stage": 3}),
    "LoRA, all blocks swapped": (True, {}, {"blocks_to_swap": BLOCKS}),
    "in full, all blocks swapped": (False, {}, {"blocks_to_swap": BLOCKS}),
}
"""Name -> whether there is an adapter, keys of [model], keys of the run."""


def measure() -> Iterator[str]:
    from tests.models import tiny_flux

    with tempfile.TemporaryDirectory() as place:
        folder = tiny_flux.write_folder(Path(place))
        known = json.loads((folder / "transformer" / "config.json").read_text())
        torch.manual_seed(0)
        denoiser = FluxTransformer2DModel.from_config({**known, **SHAPE})
        denoiser.save_pretrained(folder / "transformer")
        whole = 2 * sum(parameter.numel() for parameter in denoiser.parameters()) / MIB
        del denoiser
        for name, case in CASES.items():
            for rank, (peak, kept) in enumerate(run_ranks(load, 2, folder, *case)):
                held = f"{peak:.0f} MiB at most, {peak / whole:.2f} of the stage ({whole:.0f})"
                yield f"{name}, rank {rank}: {held}; its blocks keep {kept:.0f} in the end"


def load(ranks: Ranks, folder: Path, adapted: bool, model: dict[str, Any], keys: dict[str, Any]) -> tuple[float, float]:
    """Job of a rank: MiB of its own memory, at most, and of its blocks where they stay."""
    from models.assembly.placement import block_swap, homes_of
    from models.assembly.stage import load_stage
    from tests.models import tiny_flux
    from tests.models.tiny_folder import settings_of
    from utils.adapters.lora import LoraSettings

    flux = tiny_flux.pipeline(folder, dtype="bfloat16", **model)
    settings = settings_of(flux, LoraSettings(type="lora", rank=4) if adapted else None, **keys)
    with Watch() as watch:
        homes = partial(homes_of, settings, ranks, trained=not adapted)
        staged = load_stage(flux, settings, ranks.stage, homes, ranks=ranks)
        swap = block_swap(settings, staged.homes)
    return watch.most / MIB, sum(block.home.nbytes for block in swap._blocks) / MIB
