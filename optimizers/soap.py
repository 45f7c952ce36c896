"""Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from optimizers.kinds import OptimizerKind, State
from optimizers.libraries import nothing_is_kept, of_library
from utils.settings.schema import OptimizerSettings
from utils.settings.values import Betas, Count, Positive, Share


class SOAPSettings(OptimizerSettings):
    """`type = "soap"`: Adam in directions that follow from the gradients of whole matrices (Vyas et al. 2024): fewer
    steps, each of which takes longer, and a square of each side of a matrix as state. Its first step moves nothing.
    Directions that no gradient has had are chosen by rounding, so that sums in another order change a run visibly."""

    type: Literal["soap"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.95, 0.95)
    """Decay rates of the two running means, of the gradient and of its square."""
    shampoo_beta: Share | None = None
    """Decay rate of the running means of products of gradients; without: the second of `betas`."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    precondition_frequency: Count = 10
    """The directions are renewed every so many steps."""
    max_precondition_dim: Annotated[int, Field(ge=1)] = 10000
    """Sides of a matrix that are longer stay as they are."""
    precondition_1d: bool = False
    """Do it for vectors too."""


def _state_bytes(settings: SOAPSettings, parameter: torch.Tensor) -> int:
    """Two moments; and, of each side, a mean of products and the directions that follow."""
    vector = parameter.ndim < 2 and not settings.precondition_1d
    sides = () if vector else [side for side in parameter.shape if side <= settings.max_precondition_dim]
    return parameter.itemsize * (2 * parameter.numel() + 2 * sum(side * side for side in sides))


def _retyped(parameter: torch.Tensor, value: torch.Tensor, state: State) -> State:
    """All is in the parameter's type."""

    def cast(kept: Any) -> Any:
        if isinstance(kept, list):
            return [cast(one) for one in kept]
        return kept.to(parameter.dtype) if isinstance(kept, torch.Tensor) else kept

    return {key: cast(kept) for key, kept in state.items()}


KINDS = (
    OptimizerKind(
        SOAPSettings,
        of_library("pytorch_optimizer.SOAP"),
        _state_bytes,
        not_on={},
        retyped=_retyped,
        library="pytorch-optimizer",
        counts_steps=True,
        loses_small_steps=nothing_is_kept,
    ),
)
