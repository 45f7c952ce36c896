"""Several modules that are trained together, such as a UNet and its text encoders.

They are children of one module, each under the name of its folder in a diffusers folder, so that the names of their
parameters begin with this name in checkpoints, adapters and patterns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


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
