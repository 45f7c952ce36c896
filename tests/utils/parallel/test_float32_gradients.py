"""Gradients of 16-bit parameters, summed over micro-batches and averaged over data ranks in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.flux import FluxOptions, FluxPipeline
from tests.processes import run_ranks
from tests.utils.parallel import toy_flux
from utils.ranks import Ranks

ACCUMULATION = 8


def pipeline(folder: Path) -> FluxPipeline:
    return FluxPipeline(FluxOptions(type="flux", dtype="bfloat16", diffusers_path=folder), seed=0)


def errors(ranks: Ranks, folder: Path) -> dict[bool, float]:
    """Job of a data rank: how far the sums are from those in float64 of every micro-batch's own bfloat16 gradients. Of
    matrices; the gradients of norms' weights come in float32 where that is wanted, and are better than those."""
    from utils.parallel.backend import initialize_deepspeed

    initialize_deepspeed()
    expected = summed(folder, ranks.data_ranks)
    found = {float32: gradients_of_a_step(ranks, folder, float32) for float32 in (True, False)}
    return {
        float32: max(
            (ours.double() - theirs).abs().max().item() / theirs.abs().max().item()
            for ours, theirs in zip(gradients, expected, strict=True)
            if theirs.ndim == 2 and theirs.any()
        )
        for float32, gradients in found.items()
    }


def gradients_of_a_step(ranks: Ranks, folder: Path, float32: bool) -> list[torch.Tensor]:
    """The gradients that the optimizer gets."""
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    flux, kept = pipeline(folder), []
    _, layers = toy_flux.denoiser_and_layers(flux, None)
    module = DenoiserPipeline(layers, [(0, len(layers))], flux.stream_type, flux.maths.loss)
    optimizer, parameters = torch.optim.SGD(module.parameters(), lr=0.0), list(module.parameters())
    engine = Engine(module, optimizer, accumulation=ACCUMULATION, clip_norm=0.0, float32_gradients=float32)
    # Its own step would not take them.
    engine.optimizer.step = lambda *_, **__: kept.extend(p.grad.clone() for p in parameters)
    engine.train_step([toy_flux.micro_batch(flux, 0, ranks.data_rank, index) for index in range(ACCUMULATION)], 0)
    assert {gradient.dtype for gradient in kept} == {torch.float32 if float32 else torch.bfloat16}
    return kept


def summed(folder: Path, data_ranks: int) -> list[torch.Tensor]:
    """The means over data ranks, in one process."""
    flux = pipeline(folder)
    _, layers = toy_flux.denoiser_and_layers(flux, None)
    module = torch.nn.ModuleList(layers)
    totals = [torch.zeros(p.shape, dtype=torch.float64) for p in module.parameters()]
    for data_rank in range(data_ranks):
        for index in range(ACCUMULATION):
            stream, labels = toy_flux.micro_batch(flux, 0, data_rank, index)
            for layer in layers:
                stream = layer(stream)
            (flux.maths.loss(stream, labels).mean() / ACCUMULATION).backward()
            for total, parameter in zip(totals, module.parameters(), strict=True):
                total += parameter.grad.double() / data_ranks if parameter.grad is not None else 0.0
            module.zero_grad()
    return totals


@pytest.mark.parametrize("data_ranks", [1, 2])
def test_what_later_micro_batches_add_is_not_lost(tmp_path: Path, data_ranks: int) -> None:
    for found in run_ranks(errors, data_ranks, toy_flux.write_folder(tmp_path)):
        assert found[True] < 1e-5 and found[False] > 1e-3
