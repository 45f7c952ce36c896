"""A tiny Flux, its micro-batches, and the same training in one plain process: the reference of the engine's tests."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from models.flux import FluxOptions, FluxPipeline
from utils.adapters.attach import attach, base_name, initialise
from utils.adapters.lora import LoraSettings
from utils.diffusion.losses import Labels
from utils.diffusion.seeds import generator
from utils.settings.schema import AdapterSettings

CONFIG = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 4, 8],
}
LEARNING_RATE = 1e-3
MICRO_BATCH = 2


def write_folder(folder: Path, **changes: Any) -> Path:
    """The transformer's part of a diffusers folder, with changes of its configuration."""
    torch.manual_seed(0)
    FluxTransformer2DModel(**{**CONFIG, **changes}).save_pretrained(folder / "transformer")
    return folder


def pipeline(folder: Path, **options: Any) -> FluxPipeline:
    return FluxPipeline(FluxOptions(type="flux", dtype="float32", diffusers_path=folder, **options), seed=0)


def adapter(dropout: float = 0.0) -> AdapterSettings:
    return LoraSettings(type="lora", rank=4, dropout=dropout)


def denoiser_and_layers(flux: FluxPipeline, settings: AdapterSettings | None) -> tuple[Any, list]:
    """The whole denoiser with its weights and, if asked for, an adapter whose effect is not zero."""
    denoiser = flux.weights.build()
    weights = flux.weights.open(denoiser)
    if settings:
        attach(denoiser, flux.blocks, settings)
    layers = flux.to_layers(denoiser)
    flux.weights.fill(denoiser, weights, layers)
    if settings:
        initialise(denoiser, layers, settings, seed=0)
        for name, parameter in denoiser.named_parameters():
            if ".lora_B." in name:
                with torch.no_grad():
                    parameter.normal_(0, 0.05, generator=generator(0, base_name(name)))
    return denoiser, layers


def micro_batch(flux: FluxPipeline, step: int, data_rank: int, index: int) -> tuple[Any, Labels]:
    """Inputs and labels of one micro-batch; pictures of two shapes alternate within a step."""
    draw = generator(0, "toy", step, data_rank, index)
    height, width = ((4, 6), (6, 6))[index % 2]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    features = {"t5": normal(MICRO_BATCH, 5, 32), "clip_pooled": normal(MICRO_BATCH, 32)}
    inputs = flux.prepare_inputs(
        features, normal(MICRO_BATCH, 4, height, width), torch.rand(MICRO_BATCH, generator=draw)
    )
    target, share = normal(MICRO_BATCH, 4, height, width), 1.0 + index % 2
    quantile_B = torch.rand(MICRO_BATCH, generator=draw)
    weight, levels = torch.full((MICRO_BATCH, 1, 1, 1), share), (quantile_B, torch.full((MICRO_BATCH,), share))
    return inputs, Labels(target, weight, levels=levels)


def train_plainly(
    folder: Path, settings: AdapterSettings | None, data_ranks: int, accumulation: int, steps: int, clip: float
) -> dict[str, Any]:
    """Losses, gradient norms and final weights of one process that knows no pipeline."""
    flux = pipeline(folder)
    denoiser, layers = denoiser_and_layers(flux, settings)
    trained = {base_name(name): p for name, p in denoiser.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE)
    losses, norms, by_level = [], [], []
    for step in range(steps):
        total, levels = 0.0, defaultdict(list)
        for data_rank in range(data_ranks):
            for index in range(accumulation):
                inputs, labels = micro_batch(flux, step, data_rank, index)
                for layer in layers:
                    inputs = layer(inputs)
                losses_B = flux.maths.loss(inputs, labels)
                for loss, quantile, share in zip(losses_B, *labels.levels, strict=True):
                    levels[round(int(10 * quantile) / 10 + 0.05, 2)].append(loss.item() / share.item())
                loss = losses_B.mean() / (data_ranks * accumulation)
                loss.backward()
                total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), clip or float("inf")).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        by_level.append({level: fmean(own) for level, own in levels.items()})
    return {
        "losses": losses,
        "norms": norms,
        "levels": by_level,
        "weights": {name: p.detach() for name, p in trained.items()},
    }


def config_text() -> str:
    return json.dumps(CONFIG)
