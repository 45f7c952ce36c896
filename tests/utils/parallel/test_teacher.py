"""Targets that a teacher gives, at any number of stages: the frozen base as a base that has no adapter at all, and the
model itself for empty captions."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_ranks
from tests.utils.parallel import toy_flux
from tests.utils.parallel.test_engine import engine_of
from utils.adapters.attach import switched_off
from utils.ranks import Ranks

STEPS, ACCUMULATION = 2, 2
REGULARISING = torch.tensor([True, False])


def micro_batches(flux: Any, step: int) -> list:
    """Micro-batches of two samples, of which the first is regularisation data."""
    made = [toy_flux.micro_batch(flux, step, 0, index) for index in range(ACCUMULATION)]
    return [(inputs, labels._replace(regularising=REGULARISING)) for inputs, labels in made]


def train(ranks: Ranks, folder: Path, stages: int) -> dict[str, Any]:
    """Job of a rank: losses, and the weights that no step may change."""
    from utils.parallel.teacher import Teacher

    ranks = ranks.with_stages(stages)
    flux = toy_flux.pipeline(folder)
    engine, _ = engine_of(ranks, flux, toy_flux.adapter(), ACCUMULATION, clip=0.0)
    engine.teacher = Teacher(partial(switched_off, engine.module), flux.maths.with_teacher_target)
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters() if not p.requires_grad}
    losses = [engine.train_step(micro_batches(flux, step), step).loss for step in range(STEPS)]
    kept = all(torch.equal(p, before[name]) for name, p in engine.module.named_parameters() if name in before)
    return {"losses": losses, "kept": kept and bool(before)}


def plain_losses(folder: Path) -> list[float]:
    """The same steps in one plain process, the base being a model of its own."""
    flux = toy_flux.pipeline(folder)
    _, base = toy_flux.denoiser_and_layers(flux, None)
    denoiser, layers = toy_flux.denoiser_and_layers(flux, toy_flux.adapter())
    optimizer = torch.optim.AdamW([p for p in denoiser.parameters() if p.requires_grad], lr=toy_flux.LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for inputs, labels in micro_batches(flux, step):
            with torch.no_grad():
                parents = run(base, inputs)
            target = torch.stack([parents[0], labels.target[1]])
            loss = (labels.weight * (run(layers, inputs) - target).square()).mean() / ACCUMULATION
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def run(layers: list, stream: Any) -> torch.Tensor:
    for layer in layers:
        stream = layer(stream)
    return stream


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_regularisation_data_is_held_to_what_the_base_makes_of_it(tmp_path: Path, stages: int) -> None:
    folder = toy_flux.write_folder(tmp_path)
    expected = plain_losses(folder)
    for result in run_ranks(train, stages, folder, stages):
        assert result["losses"] == pytest.approx(expected, rel=1e-5)
        assert result["kept"]


GUIDANCE = 2.5
CAPTIONED = torch.tensor([True, False])


def captioned_and_empty(flux: Any, step: int) -> list:
    """Micro-batches of two samples, of which the first has a caption, each with inputs whose captions are empty."""
    made = [toy_flux.micro_batch(flux, step, 0, index) for index in range(ACCUMULATION)]
    empty = [inputs._replace(text_BLD=torch.zeros_like(inputs.text_BLD)) for inputs, _ in made]
    return [
        (inputs, labels._replace(captioned=CAPTIONED), none) for (inputs, labels), none in zip(made, empty, strict=True)
    ]


def train_folded(ranks: Ranks, folder: Path, stages: int) -> list[float]:
    """Job of a rank: losses, with guidance folded into the targets."""
    from utils.parallel.teacher import Teacher

    ranks = ranks.with_stages(stages)
    flux = toy_flux.pipeline(folder, folded_guidance=GUIDANCE)
    engine, _ = engine_of(ranks, flux, toy_flux.adapter(), ACCUMULATION, clip=0.0)
    engine.teacher = Teacher(nullcontext, flux.maths.with_folded_guidance, inputs=lambda batch: (batch[2], batch[1]))
    return [engine.train_step(captioned_and_empty(flux, step), step).loss for step in range(STEPS)]


def plain_folded_losses(folder: Path) -> list[float]:
    """The same steps in one plain process."""
    flux = toy_flux.pipeline(folder)
    denoiser, layers = toy_flux.denoiser_and_layers(flux, toy_flux.adapter())
    optimizer = torch.optim.AdamW([p for p in denoiser.parameters() if p.requires_grad], lr=toy_flux.LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for inputs, labels, empty in captioned_and_empty(flux, step):
            with torch.no_grad():
                unprompted = run(layers, empty)
            guided = GUIDANCE * labels.target[0] + (1 - GUIDANCE) * unprompted[0]
            target = torch.stack([guided, labels.target[1]])
            loss = (labels.weight * (run(layers, inputs) - target).square()).mean() / ACCUMULATION
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("stages", [1, 3])
def test_guidance_is_folded_into_the_targets_of_captioned_samples(tmp_path: Path, stages: int) -> None:
    folder = toy_flux.write_folder(tmp_path)
    expected = plain_folded_losses(folder)
    for losses in run_ranks(train_folded, stages, folder, stages):
        assert losses == pytest.approx(expected, rel=1e-5)
