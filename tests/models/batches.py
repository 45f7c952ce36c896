"""Random latents and features with which the generic tests feed a model."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from models.base import BasePipeline
from utils.diffusion.losses import Labels
from utils.diffusion.seeds import normal

if TYPE_CHECKING:
    from tests.test_models import Model

LENGTHS = (5, 11)
SIZES = [(32, 48, 1), (64, 32, 1)]


class Batch(NamedTuple):
    """Two noised latents with texts of unequal lengths."""

    features: dict[str, torch.Tensor]
    x_t: torch.Tensor
    t_B: torch.Tensor


def batch_of(model: Model, pipeline: BasePipeline, size: tuple[int, int, int]) -> Batch:
    shape = (2, *pipeline.latent_shape(*size))
    t_B = torch.tensor([0.2513, 0.913])
    return Batch(features_of(model.tiny, shape), normal(shape, 0, "x"), t_B)


def features_of(tiny: ModuleType, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random features of a batch of latents of this shape, with texts of unequal lengths."""
    of_pictures = getattr(tiny, "features_of_pictures", lambda latent_shape: {})
    return tiny.features(LENGTHS) | of_pictures(shape[1:])


def sizes_of(model: Model) -> list[tuple[int, int, int]]:
    return getattr(model.tiny, "SIZES", SIZES)


def micro_batches(model: Model, pipeline: BasePipeline, step: int) -> list[tuple[Any, Labels]]:
    """What a step trains: two shapes, and texts of unequal lengths."""
    batches = []
    for size in sizes_of(model):
        shape = (2, *pipeline.latent_shape(*size))
        x_t, target = normal(shape, step, "x", *size), normal(shape, step, "target", *size)
        t_B = torch.tensor([0.2 + 0.1 * step, 0.9])
        inputs = pipeline.prepare_inputs(features_of(model.tiny, shape), x_t, t_B)
        batches.append((inputs, Labels(target, torch.ones(2, *[1] * (len(shape) - 1)))))
    return batches
