"""The engine at any number of stages, micro-batches and data ranks against one plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_ranks
from tests.utils.parallel import toy_flux
from utils.adapters.attach import base_name
from utils.ranks import Ranks

STEPS = 3
CLIP = 0.05
LAYOUTS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)]
ACCUMULATIONS = (1, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_flux.write_folder(tmp_path_factory.mktemp("flux"))


def engine_of(ranks: Ranks, flux: Any, settings: Any, accumulation: int, clip: float, recompute: bool = False) -> tuple:
    """An engine on this rank's stage, and its trainable parameters by name."""
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine, optimizer_for_frozen_stage
    from utils.parallel.partition import stage_bounds
    from utils.parallel.pipeline import DenoiserPipeline

    initialize_deepspeed()
    denoiser, layers = toy_flux.denoiser_and_layers(flux, settings)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    bounds = stage_bounds("parameters", sizes, ranks.stages)
    module = DenoiserPipeline(layers, bounds, flux.stream_type, flux.loss, recompute=recompute)
    held = {id(p) for p in module.parameters()}
    trained = {
        base_name(name): p for name, p in denoiser.named_parameters() if p.requires_grad and id(p) in held
    }
    optimizer = (
        torch.optim.AdamW(trained.values(), lr=toy_flux.LEARNING_RATE) if trained else optimizer_for_frozen_stage()
    )
    return Engine(module, optimizer, micro_batch=toy_flux.MICRO_BATCH, accumulation=accumulation, clip_norm=clip), trained


def batches_of(ranks: Ranks, flux: Any, step: int, accumulation: int) -> list | None:
    if not (ranks.is_first_stage or ranks.is_last_stage):
        return None
    return [toy_flux.micro_batch(flux, step, ranks.data_rank, index) for index in range(accumulation)]


def train(ranks: Ranks, folder: Path, stages: int, settings: Any, recompute: bool) -> dict[int, dict[str, Any]]:
    """Job of a rank: trains with each accumulation; losses, norms, and the weights of its stage."""
    ranks = ranks.with_stages(stages)
    flux = toy_flux.pipeline(folder)
    results = {}
    for accumulation in ACCUMULATIONS:
        engine, trained = engine_of(ranks, flux, settings, accumulation, CLIP, recompute)
        steps = [engine.train_step(batches_of(ranks, flux, step, accumulation), step) for step in range(STEPS)]
        results[accumulation] = {
            "losses": [result.loss for result in steps],
            "norms": [result.grad_norm for result in steps],
            "weights": {name: p.detach().numpy() for name, p in trained.items()},
        }
    return results


@pytest.mark.parametrize(("stages", "data_ranks"), LAYOUTS)
@pytest.mark.parametrize("settings", [None, toy_flux.adapter()], ids=["full", "lora"])
def test_equals_one_process(folder: Path, stages: int, data_ranks: int, settings: Any) -> None:
    returned = run_ranks(train, stages * data_ranks, folder, stages, settings, stages == 2)
    for accumulation in ACCUMULATIONS:
        expected = toy_flux.train_plainly(folder, settings, data_ranks, accumulation, STEPS, CLIP)
        weights: dict[str, torch.Tensor] = {}
        for result in (rank[accumulation] for rank in returned):
            assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
            assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
            weights |= {name: torch.from_numpy(values) for name, values in result["weights"].items()}
        assert weights.keys() == expected["weights"].keys()
        for name, values in expected["weights"].items():
            assert torch.allclose(weights[name], values, atol=2e-5), name
