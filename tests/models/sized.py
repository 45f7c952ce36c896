"""Denoisers at the sizes that people train, as pipelines without files of weights: what they are written with.

Shapes: a feature by name, without the batch.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import models
from models.base import BasePipeline
from models.foundation.checkpoints.stock import of_diffusers
from utils.dataset.samples import Bucket

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class FullSize:
    """A model in a size that people train.

    Attributes:
        configs: folder of a part -> its configuration, where it differs from the class's defaults.
        size: width, height, frames.
    """

    name: str
    type: str
    configs: Mapping[str, Mapping[str, Any]]
    features: Shapes
    size: tuple[int, int, int] = (1024, 1024, 1)

    def pipeline(self, folder: Path, kind: type | None = None, **keys: Any) -> BasePipeline:
        """The model's pipeline, or one of the class `kind`, with further keys of [model]."""
        for part, config in self.configs.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            (folder / part / name).write_text(json.dumps({**_defaults(config["_class_name"]), **config}))
        kind = kind or models.find(self.type)
        return kind(kind.Options(**{"type": self.type, "diffusers_path": folder, "dtype": "bfloat16", **keys}), 0)

    @property
    def encoders(self) -> Sequence[Any]:
        """What the plan asks encoders for."""
        return [SimpleNamespace(feature_shapes=lambda bucket: self.features)]

    @property
    def bucket(self) -> Bucket:
        return Bucket(*self.size)


def _defaults(name: str) -> dict[str, Any]:
    """Those of a class of diffusers."""
    parameters = inspect.signature(of_diffusers(name).__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def text_of(name: str, tokens: int, width: int, *, mask: bool = True) -> Shapes:
    feature = {name: ((tokens, width), torch.bfloat16)}
    return {**feature, f"{name}_mask": ((tokens,), torch.bool)} if mask else feature


def pooled_of(**widths: int) -> Shapes:
    return {name: ((width,), torch.bfloat16) for name, width in widths.items()}


def vae_of(channels: int, **more: Any) -> dict[str, Any]:
    blocks = {"block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4}
    return {"_class_name": "AutoencoderKL", "latent_channels": channels, "scaling_factor": 0.5, **blocks, **more}


def video_vae_of(kind: str, **more: Any) -> dict[str, Any]:
    return {"_class_name": kind, "z_dim": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16, **more}
