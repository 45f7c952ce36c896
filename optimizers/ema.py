"""The exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from optimizers.adamw import MASTER, in_parts
from utils.settings.schema import EMASettings

# By name: the decay after n updates and with `power`, before it is limited to the requested decay.
_WARM_UPS: Mapping[str, Callable[[int, float], float]] = {
    "none": lambda n, power: 1.0,
    # TensorFlow's ExponentialMovingAverage, `num_updates`.
    "ratio": lambda n, power: (1 + n) / (10 + n),
    # Crowson's (k-diffusion); for power 1 the plain mean. HunyuanDiT's power is 2/3.
    "power": lambda n, power: 1.0 - (1 + n) ** -power,
}


def decay_at(settings: EMASettings, step: int) -> float | None:
    """The decay of the update after `step` steps of averaging, the first being 1; None if there is no update."""
    assert step >= 1, step
    updates, rest = divmod(step, settings.update_interval)
    return None if rest else min(settings.decay, _WARM_UPS[settings.warmup](updates - 1, settings.power))


class EMA:
    """average <- decay * average + (1 - decay) * parameter, in float32, beside the parameters of this process.

    For a 16-bit parameter with a float32 master in the optimizer's state, the master is averaged.

    Args:
        named_parameters: the parameters with their initial values; names as in exports.
        settings: how to average, and where the averages are kept.
        optimizer: the optimizer of the parameters.
        since: number of steps before averaging began.

    Attributes:
        averages: by parameter name. Together with `since` they are the whole state, since the decay follows from the
            step.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        settings: EMASettings,
        optimizer: torch.optim.Optimizer,
        since: int = 0,
    ) -> None:
        self.settings = settings
        self.since = since
        self._parameters = dict(named_parameters)
        self._optimizer = optimizer
        self.averages = {
            name: self._value(parameter).to(self._place(parameter), torch.float32, copy=True)
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Must be called after each step of the optimizer; `step` counts from 1 over the whole run."""
        decay = decay_at(self.settings, step - self.since)
        if decay is None:
            return
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for some in in_parts(self._parameters.values()):
            averages = [self.averages[names[id(parameter)]] for parameter in some]
            values = [
                self._value(parameter).to(average.device, torch.float32)
                for parameter, average in zip(some, averages, strict=True)
            ]
            torch._foreach_lerp_(averages, values, 1.0 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """A context in which the parameters have the values of the averages, for evaluation, sampling and export.

        No step may be taken and no checkpoint may be written within it. The parameters keep their memory, of which
        others may hold views.
        """
        kept = {
            name: parameter.detach().to(self._place(parameter), copy=True)
            for name, parameter in self._parameters.items()
        }
        try:
            self._write(self.averages)
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        torch._foreach_copy_(list(self._parameters.values()), [values[name] for name in self._parameters])

    def _value(self, parameter: nn.Parameter) -> torch.Tensor:
        return self._optimizer.state.get(parameter, {}).get(MASTER, parameter).detach()

    def _place(self, parameter: nn.Parameter) -> torch.device:
        return torch.device("cpu") if self.settings.device == "cpu" else parameter.device
