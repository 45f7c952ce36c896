"""An optimizer that is put together from a momentum and a second moment, most of which keep little state: subset norms
and momentum in a subspace (Nguyen and Nguyen 2024, "Subset-Norm and Subspace-Momentum: Faster Memory-Efficient Adaptive
Optimization with Convergence Guarantees"), and Muon's orthogonal updates."""

from __future__ import annotations

from math import ceil, sqrt
from typing import Any, Literal
from zlib import crc32

import torch
from torch import nn

from optimizers.adamw import HalfLifeSettings, with_master
from optimizers.adamw8bit_kahan import shortened
from optimizers.by_parameter import ByParameter
from optimizers.kinds import OptimizerKind
from optimizers.rounding import is_short
from optimizers.subspaces import PROJECTIONS
from utils.settings.values import Betas, Count, Positive


class GenericOptimSettings(HalfLifeSettings):
    """`type = "genericoptim"`: a momentum and a second moment of your choice, with little state.
    With a float32 master of each parameter that is kept in 16 bits."""

    type: Literal["genericoptim"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the two running means, of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    momentum_type: Literal["adam", "subspace", "none"] = "adam"
    """Running mean of gradients: of all weights; of a matrix in a subspace, outside of which a step goes by the
    gradient alone, and of all weights of a vector; or none."""
    second_moment_type: Literal["adam", "subset_norm", "muon", "none"] = "adam"
    """What an update is divided by: the mean square of each weight's gradient; the mean squared norm of the gradients
    of a subset of weights, which is larger, and so wants an `lr` larger by the root of the subset's size; nothing. Or a
    matrix's update is made orthogonal (Muon), and a vector has Adam's."""
    subset_size: Count | None = None
    """Weights that follow one another and share a norm; without: those of a row or column of a matrix, whichever are
    longer, and all of a vector."""
    rank: Count = 64
    """Dimensions of the subspace."""
    proj_type: Literal["svd", "topk", "uniform", "srht"] = "svd"
    """Subspace: of the gradient's largest singular values; of its rows with the largest norms, or of rows by chance; or
    by a subsampled randomized Hadamard transform. Rows are along a matrix's shorter side."""
    update_proj_gap: Count = 200
    """The subspace is chosen anew every so many steps; the momentum is carried into it."""
    stabilize: bool = False
    """Shorten the step of a parameter whose gradient outgrows the mean of its squares."""


class GenericOptim(ByParameter):
    """See the settings. State is in float32. What chance decides follows from a parameter's name and the step."""

    def __init__(self, params: Any, **keys: Any) -> None:
        super().__init__(params, keys)
        self._names = {
            id(parameter): name
            for group in self.param_groups
            for parameter, name in zip(
                group["params"], group.get("names") or map(str, range(len(group["params"]))), strict=False
            )
        }

    def taken(self, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        self.state[parameter].setdefault("seed", crc32(self._names[id(parameter)].encode()))
        return super().taken(parameter)

    def move(self, weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] = step = state.get("step", 0) + 1
        is_matrix = weight.ndim > 1
        update = self._momentum(gradient, state, group)
        rate = decay_rate = group["lr"]
        second = group["second_moment_type"]
        if second == "muon" and is_matrix:
            update, rate = _orthogonal(update, rate)
        elif second != "none":
            subsets = second == "subset_norm"
            square = gradient.square()
            if subsets:
                square = _by_subset(square, group["subset_size"])
            kept = state.setdefault("exp_avg_sq", torch.zeros_like(square))
            unbiased = kept.lerp_(square, 1 - group["betas"][1]) / (1 - group["betas"][1] ** step)
            if group["stabilize"]:
                rate = decay_rate = shortened(rate, square.sqrt(), unbiased, group["eps"])
            denominator = unbiased.sqrt_().add_(group["eps"])
            update = update / (_to_elements(denominator, weight, group["subset_size"]) if subsets else denominator)
        weight.mul_(1 - decay_rate * group["weight_decay"]).sub_(update * rate)

    @staticmethod
    def _momentum(gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        step, beta, kind = state["step"], group["betas"][0], group["momentum_type"]
        if kind == "none":
            return gradient
        if kind == "adam" or gradient.ndim < 2:
            mean = state.setdefault("exp_avg", torch.zeros_like(gradient))
            return mean.lerp_(gradient, 1 - beta) / (1 - beta**step)
        matrix = gradient.reshape(len(gradient), -1)
        rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        if (step - 1) % group["update_proj_gap"] == 0:
            draw = torch.Generator().manual_seed(state["seed"] * 2**16 + step)
            chosen = PROJECTIONS[group["proj_type"]](rows, min(group["rank"], len(rows)), draw)
            if "projection" in state:
                state["exp_avg"] = chosen @ state["projection"].T @ state["exp_avg"]
            state["projection"] = chosen
        projection = state["projection"]
        inside = projection @ rows
        mean = state.setdefault("exp_avg", torch.zeros_like(inside)).lerp_(inside, 1 - beta)
        update = projection.T @ (mean / (1 - beta**step)) + (rows - projection.T @ inside)
        return (update if rows is matrix else update.T).reshape(gradient.shape)


def _orthogonal(update: torch.Tensor, rate: float) -> tuple[torch.Tensor, float]:
    """A matrix's update with singular values near 1, and the rate with which it is as large as AdamW's (Liu et al.
    2025, "Muon is Scalable for LLM Training")."""
    from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _zeropower_via_newtonschulz

    matrix = update.reshape(len(update), -1)
    found = _zeropower_via_newtonschulz(matrix, (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5, EPS)
    return found.to(update.dtype).reshape(update.shape), rate * 0.2 * sqrt(max(matrix.shape))


def _by_subset(square: torch.Tensor, size: int | None) -> torch.Tensor:
    """Sums of squares over subsets."""
    if size is not None:
        lacking = -square.numel() % size
        return nn.functional.pad(square.flatten(), (0, lacking)).view(-1, size).sum(1)
    if square.ndim < 2:
        return square.sum().view(1)
    matrix = square.reshape(len(square), -1)
    return matrix.sum(int(matrix.shape[0] <= matrix.shape[1]), keepdim=True)


def _to_elements(by_subset: torch.Tensor, weight: torch.Tensor, size: int | None) -> torch.Tensor:
    """What belongs to the subset of each element."""
    if size is not None:
        return by_subset.repeat_interleave(size)[: weight.numel()].view(weight.shape)
    if weight.ndim < 2:
        return by_subset.expand(weight.numel()).view(weight.shape)
    return by_subset.expand(len(weight), weight.numel() // len(weight)).reshape(weight.shape)


def _state_bytes(settings: GenericOptimSettings, parameter: torch.Tensor) -> int:
    count, is_matrix = parameter.numel(), parameter.ndim > 1
    rows = min(len(parameter), count // len(parameter)) if is_matrix else 1
    kept = count * is_short(parameter)
    if settings.momentum_type == "subspace" and is_matrix:
        rank = min(settings.rank, rows)
        kept += rank * (rows + count // rows)
    elif settings.momentum_type != "none":
        kept += count
    second = settings.second_moment_type
    if second == "subset_norm":
        kept += ceil(count / settings.subset_size) if settings.subset_size else rows
    elif second == "adam" or (second == "muon" and not is_matrix):
        kept += count
    return kept * max(parameter.itemsize, torch.float32.itemsize)


KINDS = (
    OptimizerKind(
        GenericOptimSettings, GenericOptim, _state_bytes, not_on={}, retyped=with_master, float32_gradients=True
    ),
)
