"""All ways of saving memory together, on a tiny Flux: each combination trains as without any of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from models.assembly.placement import block_swap, homes_of
from models.assembly.stage import load_stage
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from tests.processes import run_ranks
from utils.adapters.lora import LoraSettings
from utils.diffusion.losses import Labels
from utils.diffusion.seeds import normal
from utils.parallel.offload import HostInputs
from utils.ranks import Ranks

STEPS, ACCUMULATION = 2, 2
LORA = LoraSettings(type="lora", rank=4)
SWAPPED = 2
BLOCKS = {"num_layers": 1, "num_single_layers": 4}
"""One of two stages has as many as are swapped, and the other one more."""
TOLERANCES = {"float32": 2e-6, "bfloat16": 1e-2, "float8": 2e-6}
"""Of losses and gradient norms, relative, by what the blocks are kept in; in bfloat16 all is computed in it, and in
float32 otherwise. Recomputed blocks add up in another order what a tensor gets from each of them."""


class Combination(NamedTuple):
    """One way to train.

    Attributes:
        base: what the blocks are kept in.
        recompute: "off", "on" or "offload".
    """

    adapted: bool
    base: str
    swapped: bool
    recompute: str

    def __str__(self) -> str:
        swapped = "swapped" if self.swapped else "not swapped"
        return f"{'LoRA' if self.adapted else 'full'}, {self.base}, {swapped}, recompute {self.recompute}"


def combinations() -> Iterator[Combination]:
    """All that there are: a full fine-tune has no frozen weights, which alone can be in 8 and 4 bits."""
    for one in product((True, False), TOLERANCES, (False, True), ("off", "on", "offload")):
        if one[0] or one[1] in ("float32", "bfloat16"):
            yield Combination(*one)


def train(ranks: Ranks, flux: Path, chosen: list[Combination]) -> dict[Combination, list[float]]:
    """Job of a rank, which is a stage: losses and gradient norms of the chosen combinations."""
    from utils.parallel.backend import initialize_deepspeed

    initialize_deepspeed()
    ranks = ranks.with_stages(ranks.world_size)
    return {one: numbers_of(ranks, flux, one) for one in chosen}


def numbers_of(ranks: Ranks, folder: Path, one: Combination) -> list[float]:
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    dtype = "bfloat16" if one.base == "bfloat16" else "float32"
    flux = tiny_flux.pipeline(folder, dtype=dtype, transformer_dtype=one.base)
    blocks = SWAPPED if one.swapped else 0
    keys = {
        "pipeline_stages": ranks.stages,
        "partition_method": "uniform",
        "blocks_to_swap": blocks,
        "max_steps": STEPS,
    }
    settings = settings_of(flux, LORA if one.adapted else None, **keys)
    homes = partial(homes_of, settings, ranks, trained=not one.adapted)
    staged = load_stage(flux, settings, ranks.stage, homes)
    module = DenoiserPipeline(
        staged.layers,
        staged.bounds,
        flux.stream_type,
        flux.maths.loss,
        recompute=one.recompute != "off",
        host=HostInputs(smallest=1) if one.recompute == "offload" else None,
        swap=block_swap(settings, staged.homes),
    )
    trained = list(staged.trained(staged.stage_layers(ranks.stage)).values())
    engine = Engine(module, torch.optim.AdamW(trained, lr=1e-3), accumulation=ACCUMULATION, clip_norm=1.0)
    batches = [[micro_batch(flux, step, index) for index in range(ACCUMULATION)] for step in range(STEPS)]
    results = [engine.train_step(given, step) for step, given in enumerate(batches)]
    return [number for result in results for number in (result.loss, result.grad_norm)]


def micro_batch(flux: Any, step: int, index: int) -> tuple[Any, Labels]:
    shape = (2, *flux.latent_shape(16, 16 + 16 * index, 1))
    config = flux.parts.denoiser_config
    features = {
        "t5": normal((2, 16, config["joint_attention_dim"]), step, index, "t5"),
        "clip_pooled": normal((2, config["pooled_projection_dim"]), step, index, "clip"),
    }
    x_t, target = (normal(shape, step, index, name) for name in ("x", "target"))
    inputs = flux.prepare_inputs(features, x_t, torch.tensor([0.3, 0.8]))
    return inputs, Labels(target, torch.ones(2, 1, 1, 1))


def test_memory_is_saved_and_nothing_else_changes(tmp_path: Path) -> None:
    """Each combination on two stages; in one process those of nothing and those of everything, since a stage saves its
    memory by itself."""
    every = list(combinations())
    plain = [one for one in every if not one.swapped and one.recompute == "off"]
    flux = tiny_flux.write_folder(tmp_path, **BLOCKS)
    (alone,) = run_ranks(train, 1, flux, plain + [one for one in every if one.swapped and one.recompute == "offload"])
    assert len({str(alone[one]) for one in plain}) == len(plain) == len(TOLERANCES) + 2, (
        "adapters, full training and what the blocks are kept in make a difference"
    )
    assert all(len(set(numbers)) == 2 * STEPS for numbers in alone.values())
    stages = run_ranks(train, 2, flux, every)
    assert all(list(rank) == every for rank in stages)
    for rank in (alone, *stages):
        for one, numbers in rank.items():
            reference = alone[one._replace(swapped=False, recompute="off")]
            assert numbers == pytest.approx(reference, rel=TOLERANCES[one.base]), one
