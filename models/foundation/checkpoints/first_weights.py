"""The random weights of a denoiser that starts from scratch, drawn once on each machine.

They are drawn in the order in which the whole denoiser is built, so that a process that keeps a part of them must draw
all. It is done in one process, and each takes what its stage has.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from models.foundation.checkpoints.denoiser import DenoiserWeights
from utils.adapters.presets import TensorSource
from utils.parallel.shared_memory import SharedMemory
from utils.parallel.transfers import aligned, dense_strides
from utils.ranks import Ranks


def drawn_together(weights: DenoiserWeights, denoiser: nn.Module, ranks: Ranks) -> TensorSource:
    """The first weights, each of which can be read once. All ranks call it.

    Args:
        denoiser: made by `build_empty`, still as it was made.
    """
    forms = {name: parameter.detach() for name, parameter in denoiser.named_parameters()}
    memory = SharedMemory(ranks, "first weights", None, 1)
    room = memory.add(sum(aligned(form.nbytes) for form in forms.values()))[1] if memory.shared else None
    if room is not None:
        parameters = dict(weights.build().named_parameters())
        for name, there in _views(room, forms):
            there.copy_(parameters.pop(name).detach())
    whole = memory.complete(pinned=False)
    if whole is None:
        return FirstWeights({name: parameter.detach() for name, parameter in weights.build().named_parameters()})
    return FirstWeights(dict(_views(whole, forms)), are_shared=True)


def _views(memory: torch.Tensor, forms: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of these forms that lie in memory, by name."""
    start = 0
    for name, form in forms.items():
        flat = memory[start : start + form.nbytes].view(form.dtype)
        yield name, flat.as_strided(form.shape, dense_strides(form))
        start += aligned(form.nbytes)


class FirstWeights:
    """Tensors, by name, each of which is given away when it is read.

    Args:
        are_shared: other processes read them too.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], *, are_shared: bool = False):
        self._tensors, self._are_shared = tensors, are_shared

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, of this process alone."""
        tensor = self._tensors.pop(name)
        return tensor.clone() if self._are_shared else tensor
