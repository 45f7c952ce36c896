"""Several modules that are trained together, as a UNet and its text encoders.

They are children of one module, each under the name of its folder in a diffusers folder, so that names of parameters
begin with it: in checkpoints, adapters and patterns alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from models.foundation.weights import Weights


class Ensemble(nn.Module):
    """The parts of a model that are trained.

    Args:
        parts: name of the folder -> module.
        configs: name of the folder -> its `config.json`.
    """

    def __init__(self, parts: Mapping[str, nn.Module], configs: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        self.configs = configs
        for name, part in parts.items():
            self.add_module(name, part)


class EnsembleWeights:
    """The tensors of an ensemble by its names, read when asked for.

    Args:
        weights: part -> its tensors on disk.
        modules: part -> what loads it whole; for parts whose files are for their own library to read. It is called
            once, by a process that holds a tensor of the part.
    """

    def __init__(self, weights: Mapping[str, Weights], modules: Mapping[str, Callable[[], nn.Module]]):
        self._read = {
            **{part: one.read for part, one in weights.items()},
            **{part: _reading(load) for part, load in modules.items()},
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        part, _, rest = name.partition(".")
        return self._read[part](rest)


def _reading(load: Callable[[], nn.Module]) -> Callable[[str], torch.Tensor]:
    tensors = cache(lambda: dict(load().named_parameters()))
    return lambda name: tensors()[name].detach()
