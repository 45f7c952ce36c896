"""The floating point operations of layers, counted on the meta device, which computes nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.assembly.activations import LightAttention, tensors_of
from models.assembly.known_operations import KnownOperations
from utils.parallel import wire


@dataclass(frozen=True)
class LayerOperations:
    """The operations of one layer for one micro-batch: those of products, convolutions and attention, beside which the
    others take little time.

    Attributes:
        backward: 0 where no gradient comes, before the first layer that is trained. A frozen weight takes none of its
            own.
    """

    forward: int
    backward: int

    def of_step(self, *, recomputed: bool, passes: int = 1) -> int:
        """All that a step takes.

        Args:
            recomputed: the layer runs again in its backward pass.
            passes: the number of its other forward passes; 2 beside a teacher.
        """
        return (passes + (recomputed and self.backward > 0)) * self.forward + self.backward


def count_operations(layers: Sequence[nn.Module], stream: Any) -> list[LayerOperations]:
    """The operations of every layer of a chain; of layers that are alike, those of the first.

    Args:
        stream: the input of the first layer, on the meta device.
    """
    counted, known = [], {}
    with KnownOperations():
        for layer in layers:
            key = _kind_of(layer, stream)
            if key not in known:
                known[key] = _count(layer, stream)
            operations, stream = known[key]
            counted.append(operations)
    return counted


def _kind_of(layer: nn.Module, stream: Any) -> Hashable:
    """The same for layers that do the same with streams of one form: modules, weights, and what the layer itself was
    given."""
    weights = tuple((name, part.shape, part.requires_grad) for name, part in layer.named_parameters())
    given = repr({name: value for name, value in vars(layer).items() if not name.startswith("_")})
    places: dict[int, int] = {}

    def form(tensor: torch.Tensor) -> Hashable:
        return places.setdefault(id(tensor), len(places)), tensor.dtype, tensor.shape, tensor.requires_grad

    # Not as it is sent, which the first stream, of tuples in tuples in some models, never is.
    return repr(layer), weights, given, type(stream), wire.map_tensors(form, stream)


def _count(layer: nn.Module, stream: Any) -> tuple[LayerOperations, Any]:
    """A layer's operations, and what it makes of the stream."""
    # Cut off from the layers before, so that the backward pass is this layer's own.
    stream = wire.map_tensors(lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), stream)
    wanted = [tensor for tensor in (*tensors_of(stream), *layer.to("meta").parameters()) if tensor.requires_grad]
    with LightAttention(), counter() as forward:
        made = layer(stream)
    outputs = [tensor for tensor in tensors_of(made) if tensor.requires_grad]
    with counter() as backward:
        if outputs:
            gradients = [torch.empty_like(tensor) for tensor in outputs]
            torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
    return LayerOperations(forward.get_total_flops(), backward.get_total_flops()), made


def counter() -> FlopCounterMode:
    """A context that counts the operations within it."""
    # Which torch's counter does not know.
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _operations_of_addmm})


def _operations_of_addmm(sum_MN: Any, left_MK: Any, right_KN: Any, *_: Any, **__: Any) -> int:
    """Of the shapes of its arguments."""
    return 2 * left_MK[0] * left_MK[1] * right_KN[1]
