"""What holds for every model: any number of stages, recomputed or not, in full or as LoRA, trains alike."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from tests.models.tiny_flux import settings as settings_of
from tests.processes import run_ranks
from utils.diffusion.seeds import normal
from utils.ranks import Ranks
from utils.settings.schema import AdapterSettings

STEPS = 3
LAYOUTS = [(1, True), (2, False), (3, True)]
"""Stages, and whether blocks are recomputed; compared with one stage that keeps everything."""


def tiny(model: str) -> Any:
    """The module that writes a tiny folder of the model."""
    return importlib.import_module(f"tests.models.tiny_{model}")


def train(ranks: Ranks, model: str, folder: Path, stages: int, recompute: bool, rank: int | None) -> list[float]:
    """Job of a rank: losses and gradient norms of some steps, each over two micro-batches of two shapes and texts of
    unequal lengths."""
    from models.foundation.placement import load_stage
    from utils.diffusion.losses import Labels
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    initialize_deepspeed()
    ranks = ranks.with_stages(stages)
    pipeline = tiny(model).pipeline(folder)
    adapter = AdapterSettings(type="lora", rank=rank) if rank else None
    blueprint = load_stage(pipeline, settings_of(pipeline, adapter, pipeline_stages=stages), ranks.stage)
    module = DenoiserPipeline(
        blueprint.layers, blueprint.bounds, pipeline.stream_type, pipeline.loss, recompute=recompute
    )
    trained = list(blueprint.trained(blueprint.stage_layers(ranks.stage)).values())
    engine = Engine(module, torch.optim.AdamW(trained, lr=1e-2), accumulation=2, clip_norm=1.0)

    def micro_batch(step: int, size: tuple[int, int]) -> tuple:
        shape = (2, *pipeline.latent_shape(*size))
        x_t, target = normal(shape, step, "x", *size), normal(shape, step, "target", *size)
        t_B = torch.tensor([0.2 + 0.1 * step, 0.9])
        inputs = pipeline.prepare_inputs(tiny(model).features((5, 11)), x_t, t_B)
        return inputs, Labels(target, torch.ones(2, *[1] * (len(shape) - 1)))

    numbers = []
    for step in range(STEPS):
        result = engine.train_step([micro_batch(step, (32, 48)), micro_batch(step, (64, 32))], step)
        numbers += [result.loss, result.grad_norm]
    return numbers


@pytest.fixture(scope="module", params=models.available())
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tiny(request.param).write_folder(tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
def test_stages_and_recomputing_change_nothing(model: tuple[str, Path], rank: int | None) -> None:
    name, folder = model
    (reference,) = run_ranks(train, 1, name, folder, 1, False, rank)
    assert len({round(number, 5) for number in reference}) == 2 * STEPS, "a model that learns nothing shows nothing"
    for stages, recompute in LAYOUTS:
        for numbers in run_ranks(train, stages, name, folder, stages, recompute, rank):
            assert numbers == pytest.approx(reference, rel=2e-5), (stages, recompute)
