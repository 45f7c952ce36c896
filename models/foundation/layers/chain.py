"""Layers that carry a stream through a denoiser, and how to cut a plain chain of blocks into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Middle(nn.Module):
    """One repeated block of a denoiser as a layer `Stream -> Stream`.

    It calls the block with fields of the stream and writes the results into fields of the stream; all other fields pass
    through. This serves every denoiser whose blocks form a chain.

    Args:
        block: the denoiser's own module, unchanged.
        reads: argument of the block's forward -> field of the stream.
        writes: fields that take the block's results, in the order in which the block returns them.
    """

    recomputable = True

    def __init__(self, block: nn.Module, reads: Mapping[str, str], writes: Sequence[str]):
        super().__init__()
        self.block = block
        self.reads = dict(reads)
        self.writes = tuple(writes)

    def forward(self, stream: Any) -> Any:
        results = self.block(**{argument: getattr(stream, field) for argument, field in self.reads.items()})
        if len(self.writes) == 1:
            results = (results,)
        return stream._replace(**dict(zip(self.writes, results, strict=True)))


@contextmanager
def capture_outputs(
    modules: Iterable[nn.Module], capture: Callable[[nn.Module, tuple, Any], torch.Tensor]
) -> Iterator[list[torch.Tensor]]:
    """Collects the results of `capture` (module, inputs, output) for every call of `modules` within its context, for
    layers that need values from inside a block. To be used in a layer's forward, so that it is recomputed with the
    layer."""
    captured: list[torch.Tensor] = []
    handles = [module.register_forward_hook(lambda *call: captured.append(capture(*call))) for module in modules]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
