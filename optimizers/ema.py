"""The exponential moving average of what is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

# By name: the decay after n updates and with `power`, before it is limited to the decay that is asked for.
_WARM_UPS: Mapping[str, Callable[[int, float], float]] = {
    "none": lambda n, power: 1.0,
    # TensorFlow's ExponentialMovingAverage, `num_updates`.
    "ratio": lambda n, power: (1 + n) / (10 + n),
    # Crowson's (k-diffusion); for power 1 the plain mean.
    "power": lambda n, power: 1.0 - (1 + n) ** -power,
}
WARM_UPS = tuple(_WARM_UPS)


@dataclass(frozen=True)
class EMASettings:
    """How the average follows.

    Attributes:
        decay: what is kept of the average at an update, once warmed up.
        warmup: how the decay rises to that, a name in WARM_UPS; n counts the updates before:
            "ratio" min(decay, (1 + n) / (10 + n)), "power" min(decay, 1 - (1 + n)^-power).
        power: of the warm-up; 2/3 is HunyuanDiT's.
        update_interval: steps from one update to the next.

    Raises:
        ValueError: a value is out of its range.
    """

    decay: float = 0.9999
    warmup: str = "power"
    power: float = 2 / 3
    update_interval: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"ema_decay must be at least 0 and below 1, and is {self.decay}")
        if self.warmup not in _WARM_UPS:
            raise ValueError(f"ema_warmup must be one of {', '.join(WARM_UPS)}, and is {self.warmup}")
        if self.power <= 0.0:
            raise ValueError(f"ema_power must be above 0, and is {self.power}")
        if self.update_interval < 1:
            raise ValueError(f"ema_update_interval must be at least 1, and is {self.update_interval}")

    def decay_at(self, step: int) -> float | None:
        """The decay of the update after `step` steps, the first being 1; None if there is no update."""
        assert step >= 1, step
        updates, rest = divmod(step, self.update_interval)
        return None if rest else min(self.decay, _WARM_UPS[self.warmup](updates - 1, self.power))


class EMA:
    """average <- decay * average + (1 - decay) * parameter, in float32, beside the parameters of this process.

    It is all state there is: the decay follows from the step. Parameters are known by name, so that a checkpoint's
    averages are found at any number of stages.

    Args:
        named_parameters: what is averaged, as it is at the start; names as in exports.
        settings: how.
        device: where the averages are kept; default: beside each parameter.
        values: parameter -> what is averaged for it, where that is not itself (a float32 master).
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        settings: EMASettings,
        device: torch.device | str | None = None,
        values: Callable[[nn.Parameter], torch.Tensor] = lambda parameter: parameter,
    ) -> None:
        self.settings = settings
        self._parameters = dict(named_parameters)
        self._values = values
        self._averages = {
            name: values(parameter).detach().to(device or parameter.device, torch.float32, copy=True)
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called after each step of the optimizer; `step` counts them from 1, over the whole run."""
        decay = self.settings.decay_at(step)
        if decay is None:
            return
        for name, parameter in self._parameters.items():
            average = self._averages[name]
            average.lerp_(self._values(parameter).detach().to(average.device, torch.float32), 1.0 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it the parameters have the values of the averages: for evaluation, sampling and export.

        No step may be taken within it. The parameters keep their memory, of which others may hold views.
        """
        kept = {
            name: parameter.detach().to(self._averages[name].device, copy=True)
            for name, parameter in self._parameters.items()
        }
        try:
            self._write(self._averages)
            yield
        finally:
            self._write(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name, float32; not copied."""
        return dict(self._averages)

    def load_state_dict(self, averages: Mapping[str, torch.Tensor]) -> None:
        """Takes the averages of this process' parameters from those of a whole run.

        Raises:
            ValueError: one is missing, or has another shape.
        """
        for name, average in self._averages.items():
            if name not in averages:
                raise ValueError(f"the checkpoint has no moving average of {name}; it was made without, or of others")
            if averages[name].shape != average.shape:
                shapes = f"{tuple(averages[name].shape)}, and the parameter {tuple(average.shape)}"
                raise ValueError(f"the checkpoint's moving average of {name} has shape {shapes}")
            average.copy_(averages[name])

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
