"""The bytes of weights, and of what is kept beside those that are trained: gradients, optimizer state, averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

import optimizers
from utils.parallel.sharding import owners
from utils.parallel.travelling import ON_THE_WAY, buckets, summed_in
from utils.settings.schema import OptimizerSettings, Settings


@dataclass(frozen=True)
class Kept:
    """What a rank keeps of parameters that are trained, beside their weights.

    Attributes:
        averages: whether there are float32 averages on the device (an EMA on the GPU).
        float32_gradients: whether gradients are summed in float32.
        zero_stage, data_ranks: what is divided, and among how many.
        offload: whether the optimizer works in the host's memory.
        releases: whether a layer's gradients are let go before those of the next one come.

    What it is asked for are parameters of one denoiser, which outlives it.
    """

    optimizer: OptimizerSettings
    averages: bool = False
    float32_gradients: bool = False
    zero_stage: int = 0
    data_ranks: int = 1
    offload: bool = False
    releases: bool = False
    _states: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, settings: Settings, data_ranks: int) -> Kept:
        """As a run keeps it."""
        averages = settings.ema is not None and settings.ema.device == "gpu"
        zero_stage, offload = settings.zero_stage, settings.offload_optimizer
        releases = settings.optimizer.gradient_release
        return cls(settings.optimizer, averages, sums_in_float32(settings), zero_stage, data_ranks, offload, releases)

    def bytes_of(
        self,
        trained: Mapping[str, nn.Parameter],
        *,
        gradients: bool = True,
        among: Mapping[str, nn.Parameter] | None = None,
    ) -> tuple[int, int]:
        """On the device and in the host's memory, of the rank that has most of these parameters of a stage.

        Args:
            gradients: whether there are any, as there are in a step and not between two.
            among: all that the stage trains; default: these.
        """
        data_ranks = self.data_ranks if self.zero_stage else 1
        shares = [list(trained.values())] if data_ranks == 1 else self._shares(trained, among)
        divides_gradients = gradients and self.zero_stage > 1 and data_ranks > 1
        of_all = sum(map(self.gradient, trained.values())) if gradients else 0
        if gradients and self.data_ranks > 1 and not self.releases:
            of_all += sum(_largest_buckets(trained, ON_THE_WAY))
        found = [
            self._share(share, self._divided_gradients(share, trained) if divides_gradients else of_all)
            for share in shares
        ]
        return max(device for device, _ in found), max(host for _, host in found)

    def _shares(
        self, trained: Mapping[str, nn.Parameter], among: Mapping[str, nn.Parameter] | None
    ) -> list[list[nn.Parameter]]:
        """What each data rank steps of these parameters."""
        sizes = {name: parameter.numel() for name, parameter in (trained if among is None else among).items()}
        owner_of = owners(sizes, self.data_ranks)
        return [[p for name, p in trained.items() if owner_of[name] == rank] for rank in range(self.data_ranks)]

    def _share(self, share: Sequence[nn.Parameter], gradients: int) -> tuple[int, int]:
        state = sum(map(self._state, share))
        device = gradients + (4 * sum(parameter.numel() for parameter in share) if self.averages else 0)
        if not self.offload:
            return device + state, 0
        return device, state + sum(parameter.nbytes + self.gradient(parameter) for parameter in share)

    def _state(self, parameter: nn.Parameter) -> int:
        """The bytes of the optimizer's state of a parameter, of which plans ask many times."""
        found = self._states.get(id(parameter))
        if found is None:
            found = optimizers.find(self.optimizer.type).state_bytes(self.optimizer, parameter)
            self._states[id(parameter)] = found
        return found

    def sums_of(self, trained: Mapping[str, nn.Parameter], among: Mapping[str, nn.Parameter]) -> int:
        """The bytes of gradients that are summed over data ranks, at the owner that has most; see `bytes_of`."""
        return max(sum(map(_summed, share)) for share in self._shares(trained, among))

    def gradient(self, parameter: nn.Parameter) -> int:
        """The bytes of a parameter's gradient."""
        return gradient_size(parameter, float32=self.float32_gradients)

    def _divided_gradients(self, share: Sequence[nn.Parameter], trained: Mapping[str, nn.Parameter]) -> int:
        """Of a share, of the bucket that is being made, and of those on their way to their owners."""
        return sum(map(_summed, share)) + sum(_largest_buckets(trained, 1) + _largest_buckets(trained, ON_THE_WAY))


def _largest_buckets(trained: Mapping[str, nn.Parameter], count: int) -> list[int]:
    """The bytes of gradients that travel together: so many buckets, or all of them."""
    return sorted((sum(map(_summed, bucket)) for bucket in buckets(reversed(trained.values()))), reverse=True)[:count]


def _summed(parameter: nn.Parameter) -> int:
    """The bytes of a gradient that is summed over data ranks."""
    return parameter.numel() * summed_in(parameter).itemsize


def sums_in_float32(settings: Settings) -> bool:
    """Whether a run sums the gradients of micro-batches in float32, whatever type their parameters have."""
    return settings.gradient_accumulation_steps > 1 and optimizers.find(settings.optimizer.type).float32_gradients


def weight_bytes(layers: Sequence[nn.Module]) -> int:
    """The bytes of the weights of some layers, with their buffers, among them the scales of quantised weights."""
    return sum(held_by(layers).values())


def held_by(layers: Sequence[nn.Module]) -> dict[int, int]:
    """The bytes of each weight and buffer of some layers, by its number."""
    return {id(one): one.nbytes for layer in layers for one in (*layer.parameters(), *layer.buffers())}


def gradient_size(parameter: torch.Tensor, *, float32: bool) -> int:
    """The bytes of a parameter's gradient, which may be summed in float32."""
    return parameter.numel() * max(parameter.itemsize, torch.float32.itemsize if float32 else 0)
