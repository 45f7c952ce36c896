"""State in 8 bits, of bitsandbytes (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): blocks of
elements share a scale, by which they are codes of a table of 256 numbers."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch

from optimizers.kinds import Groups
from utils.settings.schema import OptimizerSettings

ELEMENTS = 4096
"""Parameters with fewer elements keep their state in 32 bits (bitsandbytes' `min_8bit_size`)."""
BLOCK = 256
"""Elements of 8-bit state that share a scale in float32."""
PAGED = ("state1", "state2")


def in_eight_bits(name: str) -> Callable[..., torch.optim.Optimizer]:
    """What builds an optimizer of bitsandbytes. Its import looks for CUDA libraries and takes seconds."""

    def build(groups: Groups, **keys: Any) -> torch.optim.Optimizer:
        import bitsandbytes.optim

        return _paging(getattr(bitsandbytes.optim, name))(groups, **keys)

    return build


def _paging(stock: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The class; where its state is in pages, also that which came from a checkpoint."""
    if not stock.__name__.startswith("Paged"):
        return stock

    class Paged(stock):
        def prefetch_state(self, p: torch.Tensor) -> None:
            state = self.state[p]
            for key in PAGED:
                kept = state.get(key)
                if p.is_cuda and kept is not None and not getattr(kept, "is_paged", False):
                    # Small ones are in no pages, and the same after this.
                    state[key] = self.get_state_buffer(p, dtype=kept.dtype)
                    state[key].copy_(kept)
            super().prefetch_state(p)

    return Paged


def eight_bit_bytes(moments: int, settings: OptimizerSettings, parameter: torch.Tensor) -> int:
    """Of so many moments, each with the scales of its blocks."""
    count = parameter.numel()
    if count < ELEMENTS:
        return moments * count * torch.float32.itemsize
    return moments * (count + ceil(count / BLOCK) * torch.float32.itemsize)


class Moment8bit:
    """A running mean in 8 bits, or in float32 where there are few elements.

    Args:
        key: of its tensors in the state: codes, and scales of blocks under the key with "_scale".
        signed: whether it has negative values.
    """

    def __init__(self, key: str, *, signed: bool):
        self.key, self.scale, self._signed = key, f"{key}_scale", signed
        self._tables: dict[torch.device, torch.Tensor] = {}

    def _table(self, device: torch.device) -> torch.Tensor:
        if device not in self._tables:
            from bitsandbytes.functional import create_dynamic_map

            self._tables[device] = create_dynamic_map(signed=self._signed).to(device)
        return self._tables[device]

    def read(self, state: dict[str, Any], like: torch.Tensor) -> torch.Tensor:
        """In float32, of the shape of `like`; zeros at first."""
        kept = state.get(self.key)
        if kept is None:
            return torch.zeros(like.shape, device=like.device)
        if kept.dtype == torch.float32:
            return kept
        from bitsandbytes.functional import dequantize_blockwise

        return dequantize_blockwise(kept, absmax=state[self.scale], code=self._table(kept.device), blocksize=BLOCK)

    def write(self, state: dict[str, Any], value: torch.Tensor) -> None:
        """Keeps a float32 value."""
        if value.numel() < ELEMENTS:
            state[self.key] = value
            return
        from bitsandbytes.functional import quantize_blockwise

        codes, how = quantize_blockwise(value.contiguous(), code=self._table(value.device), blocksize=BLOCK)
        state[self.key], state[self.scale] = codes.view(value.shape), how.absmax
