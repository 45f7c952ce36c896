"""Running a layer, and running it again in the backward pass instead of keeping its activations.

The first run keeps the input of the layer and nothing else: it has no graph. `torch.utils.checkpoint` makes one, and
calls Python for each of its tensors, which takes as long as the rest of a block on a fast GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from utils.diffusion import seeds
from utils.parallel import wire
from utils.parallel.attention import kernels_for
from utils.parallel.offload import HostInputs
from utils.parallel.partition import repeated_blocks


def recomputed_positions(layers: Sequence[nn.Module], every: int) -> list[int]:
    """Which layers of a stage are recomputed: of every so many repeated blocks the first; with 0 none."""
    return repeated_blocks(layers)[::every] if every else []


def run_layer(layer: Callable[[Any], Any], stream: Any, *, seed: int | None = None) -> Any:
    """What a layer makes of a stream. If it draws random numbers (dropout), `seed` says which."""
    if seed is not None:
        seeds.seed_devices(seed)
    with kernels_for(stream):
        return layer(stream)


def run_recomputed(
    layer: Callable[[Any], Any], stream: Any, *, trains: bool, seed: int | None = None, host: HostInputs | None = None
) -> Any:
    """The same; only the layer's input is kept for the backward pass, which runs it again.

    Args:
        trains: the layer has parameters that want a gradient. Then, and if its input wants one, so does all that it
            makes of floating point.
        host: where the inputs wait; None: on the device.
    """
    tensors, description = wire.flatten(stream)
    if not trains and not any(tensor.requires_grad for tensor in tensors):
        return run_layer(layer, stream, seed=seed)
    run = _Run(layer, type(stream), description, seed)
    # A first layer's input wants no gradient, its parameters do.
    wants_gradient = torch.empty(0, requires_grad=True)
    made = iter(_Recomputed.apply(wants_gradient, run, host, *tensors))
    given = [tensors[source] if source is not None else next(made) for source in run.sources]
    return run.made_type(*wire.unflatten(given, run.made))


@dataclass
class _Run:
    """A layer and the form of its input, and of what it made of that.

    Attributes:
        sources: for each tensor that it gave, the position of the input's tensor that it is; None if it is a new one.
    """

    layer: Callable[[Any], Any]
    stream_type: Callable[..., Any]
    description: wire.Description
    seed: int | None
    made_type: Callable[..., Any] = tuple
    made: wire.Description | None = None
    sources: Sequence[int | None] = ()

    def new_tensors(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the layer makes of an input, without tensors that it passes on."""
        stream = self.stream_type(*wire.unflatten(tensors, self.description))
        output = run_layer(self.layer, stream, seed=self.seed)
        positions = {id(tensor): position for position, tensor in enumerate(tensors)}
        given, self.made = wire.flatten(output)
        self.made_type = type(output)
        self.sources = [positions.get(id(tensor)) for tensor in given]
        return [tensor for tensor in given if id(tensor) not in positions]


class _Recomputed(torch.autograd.Function):
    """A run whose backward pass is that of a second one."""

    @staticmethod
    def forward(
        ctx: Any, wants_gradient: torch.Tensor, run: _Run, host: HostInputs | None, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        made = run.new_tensors(tensors)
        ctx.run, ctx.host = run, host
        passed_on = {source for source in run.sources if source is not None}
        ctx.kept = host and host.keep({place: tensor for place, tensor in enumerate(tensors) if place not in passed_on})
        ctx.save_for_backward(*(None if ctx.kept and place in ctx.kept else t for place, t in enumerate(tensors)))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(tensor for tensor in made if not _may_want_gradient(tensor)))
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        run, tensors = ctx.run, list(ctx.saved_tensors)
        if ctx.kept:
            for place, tensor in ctx.host.bring(ctx.kept).items():
                tensors[place] = tensor
        wanted = ctx.needs_input_grad[3:]
        inputs = [tensor.detach().requires_grad_(wants) for tensor, wants in zip(tensors, wanted, strict=True)]
        with torch.enable_grad():
            made = run.new_tensors(inputs)
        pairs = [(tensor, gradient) for tensor, gradient in zip(made, gradients, strict=True) if gradient is not None]
        pairs = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        return None, None, None, *(tensor.grad for tensor in inputs)


def _may_want_gradient(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
