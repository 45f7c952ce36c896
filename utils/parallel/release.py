"""Steps within the backward pass: a layer's parameters are stepped, and their gradients let go, as soon as all of them
are there (Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources", section 3.1).

So there are never gradients of more than a layer, or two. It is exact where a step is of one micro-batch and needs no
number of all gradients. What uses a parameter in a backward pass also makes a part of its gradient, so that nothing
needs a layer's parameters any more once all of their gradients are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from utils.parallel.clipping import Clipping, by_layer, gradient_norms


class GradientRelease:
    """Steps the trained parameters of a stage.

    Layers are stepped from the last to the first, on all data ranks alike: one that lacks a gradient waits for the end
    of the pass, and those before it wait for it. A gradient that never comes counts as zeros.

    Args:
        layers: of the stage.
        trained: all that it trains.
        optimizer: steps the parameters that have a gradient, each by itself.
        mean: replaces gradients by their means over the data ranks; None with one data rank.
        clipping: of layers or values.

    Attributes:
        norms: of the last step's gradients.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        trained: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        mean: Callable[[list[torch.Tensor]], None] | None,
        clipping: Clipping,
    ):
        self._layers = list(reversed(by_layer(trained, layers)))
        self._layer_of = {parameter: number for number, layer in enumerate(self._layers) for parameter in layer}
        self._optimizer, self._mean, self._clipping = optimizer, mean, clipping
        self.norms: dict[nn.Parameter, torch.Tensor] = {}
        self._begin()
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _begin(self) -> None:
        self._missing = [len(layer) for layer in self._layers]
        self._next = 0
        self._norms: list[torch.Tensor] = []

    def _arrived(self, parameter: nn.Parameter) -> None:
        """A gradient is there."""
        number = self._layer_of[parameter]
        assert number >= self._next and self._missing[number], "a parameter's gradient came in two parts"
        self._missing[number] -= 1
        while self._next < len(self._layers) and not self._missing[self._next]:
            self._step_next()

    @torch.no_grad()
    def _step_next(self) -> None:
        layer = self._layers[self._next]
        self._next += 1
        for parameter in layer:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
        if self._mean is not None:
            self._mean([parameter.grad for parameter in layer])
        norms_P = gradient_norms(layer, layer[0].device)
        self.norms.update(zip(layer, norms_P, strict=True))
        norm = norms_P.norm()
        self._norms.append(norm)
        self._clipping.apply(layer, norms_P, norm, layers=())
        if may_step(self._optimizer, norm):
            self._optimizer.step()
        for parameter in layer:
            parameter.grad = None

    def finish(self, device: torch.device) -> torch.Tensor:
        """Steps what is left after the backward pass. Returns the norms of the layers' gradients (L,)."""
        while self._next < len(self._layers):
            self._step_next()
        norms = self._norms
        self._begin()
        return torch.stack(norms) if norms else torch.zeros(0, device=device)


def may_step(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> bool:
    """Whether to take the step of a gradient with this norm: one number that is not finite would make all weights and
    moments so.

    Optimizers that are told so on the device, as torch's GradScaler does it, leave the step out by themselves; for
    others the host has to wait. On a processor there is nothing to wait for.
    """
    if norm.device.type != "cpu" and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = norm.isfinite().logical_not().float()
        return True
    return bool(norm.isfinite())
