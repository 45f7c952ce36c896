"""The distance between a prediction and its target: one number per sample.

Shapes: B batch, `...` the latent's own dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Labels(NamedTuple):
    """The labels with which the last stage compares its prediction.

    Attributes:
        target: (B, ...), float32.
        weight: factor on the error, (B, 1, ...): per sample, or also per latent cell.
        delta: (B, 1, ...), the width of losses that have one; see `Loss.delta`.
        regularising: (B,), which samples are regularisation data, whose target may become the output of a teacher.
        captioned: (B,), which samples come with their caption.
        variational: (clean, x_t, t_B), for `learned_variance.variational_bound`.
        levels: for what is told of a step: (B,), the quantile of each sample's noise level among all that are trained,
            and (B,), the factor in `weight` by which samples of micro-batches of other sizes count alike.
    """

    target: torch.Tensor
    weight: torch.Tensor
    delta: torch.Tensor | None = None
    regularising: torch.Tensor | None = None
    captioned: torch.Tensor | None = None
    variational: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    levels: tuple[torch.Tensor, torch.Tensor] | None = None


def _square(error: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """e^2."""
    return error.square()


def _absolute(error: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """|e|."""
    return error.abs()


def _huber(error: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """e^2 / 2 where |e| < d, else d (|e| - d / 2). Huber 1964; `torch.nn.HuberLoss`."""
    size = error.abs()
    return torch.where(size < delta, 0.5 * error.square(), delta * (size - 0.5 * delta))


def _smooth_l1(error: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`_huber` / d: slope 1 for large errors. Girshick 2015; `torch.nn.SmoothL1Loss`."""
    return _huber(error, delta) / delta


def _pseudo_huber(error: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """2 d (sqrt(e^2 + d^2) - d): e^2 where |e| << d, 2 d |e| where |e| >> d. Charbonnier et al. 1997; "huber" of kohya
    and SimpleTuner, scaled as the squared error. Khrapov et al. 2024 brought it to diffusion."""
    # sqrt(e^2 + d^2) - d would lose the digits of a small e.
    return 2.0 * delta * error.square() / ((error.square() + delta.square()).sqrt() + delta)


LOSSES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": _square,
    "mae": _absolute,
    "huber": _huber,
    "smooth_l1": _smooth_l1,
    "pseudo_huber": _pseudo_huber,
}
WITHOUT_DELTA = ("mse", "mae")


def _constant(c: float, t_B: torch.Tensor, snr_B: torch.Tensor) -> torch.Tensor:
    """c."""
    return torch.full_like(t_B, c)


def _exponential(c: float, t_B: torch.Tensor, snr_B: torch.Tensor) -> torch.Tensor:
    """c^t: from 1 at the clean picture to c at noise."""
    return c**t_B


def _by_snr(c: float, t_B: torch.Tensor, snr_B: torch.Tensor) -> torch.Tensor:
    """(1 - c) / (1 + SNR^(-1/2))^2 + c."""
    return (1.0 - c) / (1.0 + snr_B.rsqrt()).square() + c


# Of d over the noise levels. Khrapov et al. 2024 ("Improving diffusion models' data-corruption resistance using
# scheduled pseudo-Huber loss"); kohya's `huber_schedule`.
SCHEDULES: Mapping[str, Callable[[float, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "constant": _constant,
    "exponential": _exponential,
    "snr": _by_snr,
}


@dataclass(frozen=True)
class Loss:
    """A loss and its width.

    Attributes:
        loss_type: a name in LOSSES.
        huber_c: c of the schedule.
        huber_schedule: how the width follows the noise level, a name in SCHEDULES.
        huber_scale: factor on the width.

    Raises:
        ValueError: a value is out of its range.
    """

    loss_type: str = "mse"
    huber_c: float = 0.1
    huber_schedule: str = "snr"
    huber_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, table in (("loss_type", LOSSES), ("huber_schedule", SCHEDULES)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}, and is {getattr(self, name)}")
        for name in ("huber_c", "huber_scale"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"{name} must be above 0, and is {getattr(self, name)}")

    def delta(self, t_B: torch.Tensor, snr_B: torch.Tensor) -> torch.Tensor | None:
        """The width (B,) at noise levels t_B in [0, 1], whose signal-to-noise ratios are snr_B; None if it has none.

        `Labels.delta` is this over the sample, (B, 1, ...).
        """
        if self.loss_type in WITHOUT_DELTA:
            return None
        return self.huber_scale * SCHEDULES[self.huber_schedule](self.huber_c, t_B, snr_B)

    def __call__(self, prediction: torch.Tensor, labels: Labels) -> torch.Tensor:
        """The weighted mean error of every sample (B,), in float32."""
        assert (labels.delta is None) == (self.loss_type in WITHOUT_DELTA), self.loss_type
        error = prediction.float() - labels.target.float()
        delta = torch.ones_like(error) if labels.delta is None else labels.delta
        return mean_of_samples(LOSSES[self.loss_type](error, delta) * labels.weight)


def mean_of_samples(values: torch.Tensor) -> torch.Tensor:
    """The mean of each sample (B,), in float32.

    Without gradients, as in evaluation, it is added up in float64: in float32 threads and GPUs add up the values of one
    sample in another order than those of several, and its last digit would depend on the batch.
    """
    wide = values.dtype if torch.is_grad_enabled() else torch.float64
    return values.flatten(1).mean(1, dtype=wide).to(values.dtype)
