"""Limits of the gradient before a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from utils.settings.values import ClipBy


@dataclass(frozen=True)
class Clipping:
    """How large a gradient may be.

    Attributes:
        limit: 0 for none.
        by: what is limited: the norm of the whole gradient, over all stages; that of each layer, each by itself (as
            LARS and LAMB scale layer by layer, You et al. 2017 and 2020); or the size of every element.
    """

    limit: float
    by: ClipBy = "norm"

    def apply(
        self, trained: Sequence[nn.Parameter], norms_P: torch.Tensor, total: torch.Tensor, layers: Sequence[nn.Module]
    ) -> None:
        """Scales the gradients of a stage.

        Args:
            trained: what the stage trains. Those have no gradient that another data rank keeps.
            norms_P: of their gradients, all of them.
            total: the norm of the whole gradient.
            layers: of the stage.
        """
        if not self.limit:
            return
        if self.by == "value":
            torch.nn.utils.clip_grad_value_(trained, self.limit)
        elif self.by == "norm":
            _scale(trained, self.limit, total)
        else:
            # One by one, since the host would wait for the device to get a list of places.
            norms = dict(zip(trained, norms_P.unbind(), strict=True))
            for layer in by_layer(trained, layers):
                _scale(layer, self.limit, torch.stack([norms[parameter] for parameter in layer]).norm())


def gradient_norms(parameters: Sequence[nn.Parameter], device: torch.device) -> torch.Tensor:
    """Those of the gradients (P,), in float32 for gradients of any type: bfloat16 would leave a norm two digits."""
    if not parameters:
        return torch.zeros(0, device=device)
    norms = torch._foreach_norm([parameter.grad for parameter in parameters], 2, dtype=torch.float32)
    # Those of swapped blocks are in the host's memory.
    return torch.stack([norm.to(device) for norm in norms])


def _scale(parameters: Iterable[nn.Parameter], limit: float, norm: torch.Tensor) -> None:
    held = [parameter for parameter in parameters if parameter.grad is not None]
    if held:
        torch.nn.utils.clip_grads_with_norm_(held, limit, norm)


def by_layer(trained: Sequence[nn.Parameter], layers: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """The trained parameters of every layer that has some; those of several layers are in the first. In one order in
    all runs, in which norms are summed."""
    left, found = set(trained), []
    for layer in layers:
        own = [parameter for parameter in layer.parameters() if parameter in left]
        left.difference_update(own)
        found.append(own)
    found.append([parameter for parameter in trained if parameter in left])
    return [own for own in found if own]
