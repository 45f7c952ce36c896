"""What a stage holds (weights, gradients, optimizer state, activations), told without allocating it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

import optimizers
from models.assembly.activations import LayerActivations, count, peak
from models.assembly.stage import StagedModel
from models.base import BasePipeline
from utils.dataset.encoders import Encoder
from utils.dataset.epochs import micro_batch_of
from utils.dataset.samples import Bucket
from utils.parallel.recompute import recomputed_positions
from utils.parallel.sharding import buckets, owners, summed_in
from utils.parallel.swap import SwapPlan, counts
from utils.parallel.wire import map_tensors
from utils.settings.schema import OptimizerSettings, Settings

GIB = 2**30


@dataclass(frozen=True)
class StagePlan:
    """The bytes that a rank of one stage holds in training.

    Attributes:
        layers: the first and the last.
        weights: on the device, with the buffers of swapped blocks.
        state: gradients and optimizer state, as far as they are on the device; of the rank that has most.
        activations: at the peak.
        swap: which blocks are swapped.
        stepped: what the optimizer has in the host's memory.
    """

    layers: tuple[int, int]
    weights: int
    state: int
    activations: int
    swap: SwapPlan
    stepped: int = 0

    @property
    def total(self) -> int:
        """At the peak of a step."""
        return self.weights + self.state + self.activations

    def __str__(self) -> str:
        told = (
            f"(layers {self.layers[0]} to {self.layers[1]}): {self.total / GIB:.2f} GiB = weights "
            f"{self.weights / GIB:.2f} + gradients and optimizer {self.state / GIB:.2f} + "
            f"activations {self.activations / GIB:.2f}"
        )
        if self.stepped:
            told = f"{told}; the optimizer takes {self.stepped / GIB:.2f} GiB of the host's memory"
        if not self.swap.blocks:
            return told
        return (
            f"{told}; {len(self.swap.blocks)} swapped blocks share {self.swap.ring_bytes / GIB:.2f} GiB of the "
            f"weights, and take {self.swap.host_bytes / GIB:.2f} GiB of the host's memory"
        )


@dataclass(frozen=True)
class Kept:
    """What a rank keeps of parameters that are trained, beside their weights.

    Attributes:
        averages: whether there are float32 averages on the device (an EMA on the GPU).
        float32_gradients: whether gradients are summed in float32.
        zero_stage, data_ranks: what is divided, and among how many.
        offload: whether the optimizer works in the host's memory.
    """

    optimizer: OptimizerSettings
    averages: bool = False
    float32_gradients: bool = False
    zero_stage: int = 0
    data_ranks: int = 1
    offload: bool = False

    @classmethod
    def of(cls, settings: Settings, data_ranks: int) -> Kept:
        """As a run keeps it."""
        averages = settings.ema is not None and settings.ema.device == "gpu"
        zero_stage, offload = settings.zero_stage, settings.offload_optimizer
        return cls(settings.optimizer, averages, sums_in_float32(settings), zero_stage, data_ranks, offload)

    def bytes_of(self, trained: Mapping[str, nn.Parameter]) -> tuple[int, int]:
        """On the device and in the host's memory, of the rank that has most of these parameters of a stage."""
        data_ranks = self.data_ranks if self.zero_stage else 1
        owner_of = owners({name: parameter.numel() for name, parameter in trained.items()}, data_ranks)
        shares = [[p for name, p in trained.items() if owner_of[name] == rank] for rank in range(data_ranks)]
        divides_gradients = self.zero_stage > 1 and data_ranks > 1
        of_all = sum(map(self._gradient, trained.values()))
        found = [
            self._share(share, self._divided_gradients(share, trained) if divides_gradients else of_all)
            for share in shares
        ]
        return max(device for device, _ in found), max(host for _, host in found)

    def _share(self, share: Sequence[nn.Parameter], gradients: int) -> tuple[int, int]:
        kept_of = optimizers.find(self.optimizer.type).state_bytes
        state = sum(kept_of(self.optimizer, parameter) for parameter in share)
        device = gradients + (4 * sum(parameter.numel() for parameter in share) if self.averages else 0)
        if not self.offload:
            return device + state, 0
        return device, state + sum(parameter.nbytes + self._gradient(parameter) for parameter in share)

    def _gradient(self, parameter: nn.Parameter) -> int:
        least = torch.float32.itemsize if self.float32_gradients else 0
        return parameter.numel() * max(parameter.itemsize, least)

    def _divided_gradients(self, share: Sequence[nn.Parameter], trained: Mapping[str, nn.Parameter]) -> int:
        """Of a share, and of what is on its way to its owners: a bucket, and its copy."""
        on_the_way = [sum(map(_summed, bucket)) for bucket in buckets(reversed(trained.values()))]
        return sum(map(_summed, share)) + 2 * max(on_the_way, default=0)


def _summed(parameter: nn.Parameter) -> int:
    """The bytes of a gradient that is summed over data ranks."""
    return parameter.numel() * summed_in(parameter).itemsize


class Planner:
    """Plans of a denoiser without weights for training on some sizes, of which the largest counts.

    Args:
        encoders: those of the run, for the shapes of their features.
        data_ranks: among which state may be divided.
    """

    def __init__(
        self,
        settings: Settings,
        pipeline: BasePipeline,
        staged: StagedModel,
        encoders: Sequence[Encoder],
        buckets: Sequence[Bucket],
        data_ranks: int = 1,
    ):
        self.settings, self.staged = settings, staged
        self._data_ranks = data_ranks
        self._pipeline, self._encoders = pipeline, encoders
        self._counted: dict[tuple[int, bool], list[LayerActivations]] = {}
        self.bucket = max(buckets, key=lambda bucket: bucket.width * bucket.height * bucket.frames)

    def swapped(self, settings: Settings) -> list[int]:
        """The number of swapped blocks of every stage."""
        return counts(settings.blocks_to_swap, [self.staged.stage_layers(stage) for stage in self._stages])

    def plans(self, settings: Settings, swapped: Sequence[int]) -> list[StagePlan]:
        """One for each stage. Weights, gradients and optimizer state are counted; for activations the micro-batch of
        the largest bucket runs through the layers on the meta device."""
        counted = self._activations(settings)
        return [self._plan(settings, stage, number, counted) for stage, number in enumerate(swapped)]

    def least_swapped(self, settings: Settings, budget: float) -> list[int]:
        """The fewest swapped blocks with which each stage fits; all of its blocks if it never does."""
        activations, found = self._activations(settings), []
        for stage, swap in enumerate(self._swaps):
            numbers = range(len(swap.blocks) + 1)
            fits = (number for number in numbers if self._plan(settings, stage, number, activations).total <= budget)
            found.append(next(fits, len(swap.blocks)))
        return found

    def text(self, settings: Settings) -> str:
        """The plans, as text."""
        plans = self.plans(settings, self.swapped(settings))
        title = f"estimated memory per rank, bucket {self.bucket}:"
        return "\n".join([title, *(f"  stage {stage} {plan}" for stage, plan in enumerate(plans))])

    @cached_property
    def _held(self) -> list[tuple[int, tuple[int, int]]]:
        """Weights, and what is kept beside them on the device and in the host's memory, of every stage."""
        kept, staged = Kept.of(self.settings, self._data_ranks), self.staged
        stages = [staged.stage_layers(stage) for stage in self._stages]
        return [(weight_bytes(layers), kept.bytes_of(staged.trained(layers))) for layers in stages]

    @cached_property
    def _swaps(self) -> list[SwapPlan]:
        return [SwapPlan.of_all(self.staged.stage_layers(stage)) for stage in self._stages]

    @property
    def _stages(self) -> range:
        return range(len(self.staged.bounds))

    def _plan(self, settings: Settings, stage: int, swapped: int, counted: Sequence[LayerActivations]) -> StagePlan:
        start, stop = self.staged.bounds[stage]
        weights, (state, stepped) = self._held[stage]
        swap = self._swaps[stage].with_blocks(swapped)
        in_flight = min(settings.gradient_accumulation_steps, len(self.staged.bounds) - stage)
        return StagePlan(
            layers=(start, stop - 1),
            weights=weights + swap.ring_bytes - swap.tensor_bytes,
            state=state,
            activations=peak(counted[start:stop], in_flight),
            swap=swap,
            stepped=stepped,
        )

    def _activations(self, settings: Settings) -> list[LayerActivations]:
        """Of every layer, for one micro-batch."""
        key = settings.recomputed_every, settings.offloads
        if key not in self._counted:
            self._counted[key] = self._count(settings)
        return self._counted[key]

    def _count(self, settings: Settings) -> list[LayerActivations]:
        staged, bucket = self.staged, self.bucket
        batch = micro_batch_of(settings, bucket)
        # Ones, since zeros would be masks that hide all of the text.
        features = {
            name: torch.ones((batch, *shape), dtype=dtype)
            for encoder in self._encoders
            for name, (shape, dtype) in encoder.feature_shapes(bucket).items()
        }
        latent = torch.zeros((batch, *self._pipeline.latent_shape(bucket.width, bucket.height, bucket.frames)))
        inputs = self._pipeline.prepare_inputs({**features, "latents": latent}, latent, torch.zeros(batch))
        recomputed = {
            start + position
            for start, stop in staged.bounds
            for position in recomputed_positions(staged.layers[start:stop], settings.recomputed_every)
        }
        return count(
            staged.layers,
            {start for start, _ in staged.bounds},
            map_tensors(lambda tensor: tensor.to("meta"), inputs),
            [*staged.denoiser.parameters(), *staged.denoiser.buffers()],
            recomputed=recomputed,
            offload=settings.offloads,
        )


def sums_in_float32(settings: Settings) -> bool:
    """Whether a run sums the gradients of micro-batches in float32, whatever type their parameters have."""
    return settings.gradient_accumulation_steps > 1 and optimizers.find(settings.optimizer.type).float32_gradients


def weight_bytes(layers: Sequence[nn.Module]) -> int:
    """The bytes of the weights of some layers, with their buffers, among them the scales of quantised weights."""
    held = {id(p): p for layer in layers for p in layer.parameters()}.values()
    buffers = {id(b): b for layer in layers for b in layer.buffers()}.values()
    return sum(tensor.nbytes for tensor in (*held, *buffers))
