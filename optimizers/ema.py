"""The exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from optimizers.adamw import in_parts
from optimizers.rounding import MASTER
from utils.settings.run_tables import EMASettings

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
        stepped: parameters by name as `optimizer` has them; only these are averaged here, and the others by other
            processes. Default: all, as they are.
        complete: brings the values of those that others average; all processes call it together.

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
        *,
        stepped: Mapping[str, nn.Parameter] | None = None,
        complete: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self._on_cpu = settings.device == "cpu"
        self.since = since
        self._parameters = dict(named_parameters)
        self._optimizer = optimizer
        self._stepped = self._parameters if stepped is None else stepped
        self._complete = complete
        self.averages = {
            name: self._value(name).to(self._place(self._parameters[name]), torch.float32, copy=True)
            for name in self._stepped
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Must be called after each step of the optimizer; `step` counts from 1 over the whole run."""
        decay = decay_at(self.settings, step - self.since)
        if decay is None:
            return
        names = {id(self._parameters[name]): name for name in self.averages}
        for some in in_parts(self._parameters[name] for name in self.averages):
            of_these = [names[id(parameter)] for parameter in some]
            averages = [self.averages[name] for name in of_these]
            own = [self._value(name) for name in of_these]
            values = [
                value.to(average.device, torch.float32, non_blocking=True)
                for value, average in zip(own, averages, strict=True)
            ]
            if self._on_cpu:
                _arrived(own)
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
            self._complete()
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        if values:
            torch._foreach_copy_([self._parameters[name] for name in values], list(values.values()))

    def _value(self, name: str) -> torch.Tensor:
        return self._optimizer.state.get(self._stepped[name], {}).get(MASTER, self._parameters[name]).detach()

    def _place(self, parameter: nn.Parameter) -> torch.device:
        return torch.device("cpu") if self._on_cpu else parameter.device


def _arrived(tensors: Iterable[torch.Tensor]) -> None:
    """Returns when asynchronous copies of these tensors are there for the CPU to read: one wait for all."""
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        torch.cuda.synchronize(device)
