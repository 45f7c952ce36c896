"""The norms of gradients and weights by block, of all stages together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from math import isfinite, sqrt

import torch
from torch import nn

from utils.parallel.engine import Engine
from utils.ranks import Ranks, gather, summed
from utils.run.numbers import BLOCK_GRADIENT, BLOCK_WEIGHT

NUMBERED = re.compile(r"(.*?\.\d+)\.")
REST = "others"


def block_of(parameter: str) -> str:
    """The block that a parameter is in: its name up to the first number, as in `transformer_blocks.3`."""
    numbered = NUMBERED.match(parameter)
    return numbered[1] if numbered else REST


class BlockNorms:
    """Measures what is trained. All ranks make it together.

    Args:
        parameters: that this stage trains, by name.
        measured: those of which this rank measures the weights for all.
    """

    def __init__(
        self,
        ranks: Ranks,
        engine: Engine,
        parameters: Mapping[str, nn.Parameter],
        measured: Mapping[str, nn.Parameter],
    ):
        self._engine, self._own = engine, defaultdict(list)
        for name, parameter in parameters.items():
            self._own[block_of(name)].append(parameter)
        # A block may be cut between two stages.
        self._blocks = list(dict.fromkeys(block for own in gather(ranks, "blocks", list(self._own)) for block in own))
        # Data ranks have the same gradients.
        self._counts, self._measured = ranks.data_rank == 0, list(measured.values())

    def measure(self) -> dict[str, float]:
        """The norms of the last step's gradients, before clipping, and of the weights after it; what is no finite
        number is left out. All ranks call it together."""
        gradients, weights = self._engine.gradient_norms(), self._weights()
        squares = [
            sum(norms.get(parameter, 0.0) ** 2 for parameter in self._own.get(block, ()))
            for norms in (gradients if self._counts else {}, weights)
            for block in self._blocks
        ]
        names = [f"{kind}{block}" for kind in (BLOCK_GRADIENT, BLOCK_WEIGHT) for block in self._blocks]
        found = zip(names, summed(squares), strict=True)
        return {name: sqrt(square) for name, square in found if isfinite(square)}

    @torch.no_grad()
    def _weights(self) -> dict[nn.Parameter, float]:
        by_device = defaultdict(list)
        for parameter in self._measured:
            by_device[parameter.device].append(parameter)
        norms: dict[nn.Parameter, float] = {}
        for own in by_device.values():
            of_own = torch.stack(torch._foreach_norm(own, 2, dtype=torch.float32))
            norms.update(zip(own, of_own.tolist(), strict=True))
        return norms
