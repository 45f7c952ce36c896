"""Denoisers at full size with random weights, and micro-batches for them; no files are needed.

Shapes: B batch; latents (B, ...); a feature by name (B, ...).
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import models
from models.base import BasePipeline
from models.foundation.checkpoints.denoiser import DenoiserWeights
from tests.models.sized import FullSize
from utils.adapters.attach import base_name
from utils.diffusion.losses import Labels


def random_pipeline(model: FullSize, folder: Path, **keys: Any) -> BasePipeline:
    """The model's pipeline with further keys of [model]; its weights are drawn on the card when they are read."""
    kind = models.find(model.type)
    made = type(f"Random{kind.__name__}", (kind,), {"weights": property(lambda own: _random(super(made, own)))})
    return model.pipeline(folder, made, **keys)


def micro_batch(model: FullSize, pipeline: BasePipeline, batch: int = 1) -> tuple[Any, Labels]:
    """Inputs of the entry and labels, with random values; masks show all of the text."""
    latent_shape = (batch, *pipeline.latent_shape(*model.size))
    features = {name: _values((batch, *shape), dtype) for name, (shape, dtype) in model.features.items()}
    latents = torch.randn(latent_shape)
    inputs = pipeline.prepare_inputs({**features, "latents": latents}, latents, torch.full((batch,), 0.5))
    return inputs, Labels(torch.randn(latent_shape), torch.ones((batch,) + (1,) * (len(latent_shape) - 1)))


class _RandomWeights(DenoiserWeights):
    """Weights that come from no file."""

    def _opened(self, denoiser: nn.Module) -> Any:
        shapes = {base_name(name): parameter.shape for name, parameter in denoiser.named_parameters()}
        return SimpleNamespace(read=lambda name: drawn(shapes[name]))


def _random(pipeline: Any) -> DenoiserWeights:
    known: DenoiserWeights = pipeline.weights
    return _RandomWeights(**{field.name: getattr(known, field.name) for field in fields(DenoiserWeights)})


def drawn(shape: torch.Size) -> torch.Tensor:
    """Norm scales of 1; all others small. They stay on the card, which spares the benchmark minutes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    return torch.randn(shape, device=device).mul_(0.02).bfloat16()


def _values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.randn(shape).to(dtype)
