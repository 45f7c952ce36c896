"""Denoisers at full size with random weights, and micro-batches for them; no files are needed.

Shapes: B batch; latents (B, ...); a feature by name (B, ...).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import models
from models.base import BasePipeline
from models.foundation.checkpoints.denoiser import DenoiserWeights
from utils.adapters.attach import base_name
from utils.dataset.samples import Bucket
from utils.diffusion.losses import Labels

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
FLUX_VAE = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
WAN_VAE = {"z_dim": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16, "scale_factor_spatial": 8}
TEXT = 512


@dataclass(frozen=True)
class FullSize:
    """A model in a size that people train.

    Attributes:
        configs: folder of a part -> its configuration, where it differs from the class's defaults.
        features: name -> shape without the batch, and type.
        size: width, height, frames.
    """

    type: str
    configs: Mapping[str, Mapping[str, Any]]
    features: Shapes
    size: tuple[int, int, int]

    def pipeline(self, folder: Path, **keys: Any) -> BasePipeline:
        """The model's pipeline with further keys of [model]; its weights are drawn on the card when they are read."""
        for part, config in self.configs.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / "config.json").write_text(json.dumps(config))
        kind = models.find(self.type)
        made = type(f"Random{kind.__name__}", (kind,), {"weights": property(lambda own: _random(super(made, own)))})
        return made(kind.Options(**{"type": self.type, "diffusers_path": folder, "dtype": "bfloat16", **keys}), 0)

    def encoders(self, batch: int) -> Sequence[Any]:
        """What the plan asks encoders for."""
        return [SimpleNamespace(feature_shapes=lambda bucket: self.features)]

    @property
    def bucket(self) -> Bucket:
        return Bucket(*self.size)

    def micro_batch(self, pipeline: BasePipeline, batch: int = 1) -> tuple[Any, Labels]:
        """Inputs of the entry and labels, with random values; masks show all of the text."""
        latent_shape = (batch, *pipeline.latent_shape(*self.size))
        features = {name: _values((batch, *shape), dtype) for name, (shape, dtype) in self.features.items()}
        latents = torch.randn(latent_shape)
        inputs = pipeline.prepare_inputs({**features, "latents": latents}, latents, torch.full((batch,), 0.5))
        return inputs, Labels(torch.randn(latent_shape), torch.ones((batch,) + (1,) * (len(latent_shape) - 1)))


FLUX = FullSize(
    "flux",
    {
        "transformer": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], **FLUX_VAE},
    },
    {"t5": ((TEXT, 4096), torch.bfloat16), "clip_pooled": ((768,), torch.bfloat16)},
    (1024, 1024, 1),
)
WAN = FullSize(
    "wan",
    {
        "transformer": {"_class_name": "WanTransformer3DModel", "in_channels": 16},
        "vae": {"_class_name": "AutoencoderKLWan", "scale_factor_temporal": 4, **WAN_VAE},
    },
    {"umt5": ((TEXT, 4096), torch.bfloat16), "umt5_mask": ((TEXT,), torch.bool)},
    (832, 480, 49),
)


class _RandomWeights(DenoiserWeights):
    """Weights that come from no file."""

    def _opened(self, denoiser: nn.Module) -> Any:
        shapes = {base_name(name): parameter.shape for name, parameter in denoiser.named_parameters()}
        return SimpleNamespace(read=lambda name: _drawn(shapes[name]))


def _random(pipeline: Any) -> DenoiserWeights:
    known: DenoiserWeights = pipeline.weights
    return _RandomWeights(**{field.name: getattr(known, field.name) for field in fields(DenoiserWeights)})


def _drawn(shape: torch.Size) -> torch.Tensor:
    """Norm scales of 1; all others small. They stay on the card, which spares the benchmark minutes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    return torch.randn(shape, device=device).mul_(0.02).bfloat16()


def _values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.randn(shape).to(dtype)
