"""What a stage holds (weights, gradients, optimizer state, activations), told without allocating it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

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
        state: gradients and optimizer state.
        activations: at the peak.
        swap: which blocks are swapped.
    """

    layers: tuple[int, int]
    weights: int
    state: int
    activations: int
    swap: SwapPlan

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
        if not self.swap.blocks:
            return told
        return (
            f"{told}; {len(self.swap.blocks)} swapped blocks share {self.swap.ring_bytes / GIB:.2f} GiB of the "
            f"weights, and take {self.swap.host_bytes / GIB:.2f} GiB of the host's memory"
        )


class Planner:
    """Plans of a denoiser without weights for training on some sizes, of which the largest counts.

    Args:
        encoders: those of the run, for the shapes of their features.
    """

    def __init__(
        self,
        settings: Settings,
        pipeline: BasePipeline,
        staged: StagedModel,
        encoders: Sequence[Encoder],
        buckets: Sequence[Bucket],
    ):
        self.settings, self.staged = settings, staged
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
    def _held(self) -> list[tuple[int, int]]:
        averages = self.settings.ema is not None and self.settings.ema.device == "gpu"
        counted = partial(
            held_bytes,
            optimizer=self.settings.optimizer,
            averages=averages,
            float32_gradients=sums_in_float32(self.settings),
        )
        return [counted(self.staged.stage_layers(stage)) for stage in self._stages]

    @cached_property
    def _swaps(self) -> list[SwapPlan]:
        return [SwapPlan.of_all(self.staged.stage_layers(stage)) for stage in self._stages]

    @property
    def _stages(self) -> range:
        return range(len(self.staged.bounds))

    def _plan(self, settings: Settings, stage: int, swapped: int, counted: Sequence[LayerActivations]) -> StagePlan:
        start, stop = self.staged.bounds[stage]
        weights, state = self._held[stage]
        swap = self._swaps[stage].with_blocks(swapped)
        in_flight = min(settings.gradient_accumulation_steps, len(self.staged.bounds) - stage)
        return StagePlan(
            layers=(start, stop - 1),
            weights=weights + swap.ring_bytes - swap.tensor_bytes,
            state=state,
            activations=peak(counted[start:stop], in_flight),
            swap=swap,
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


def held_bytes(
    layers: Sequence[nn.Module],
    optimizer: OptimizerSettings,
    *,
    averages: bool = False,
    float32_gradients: bool = False,
) -> tuple[int, int]:
    """The bytes of the weights of some layers, with their buffers, among them the scales of quantised weights; and the
    bytes of their gradients and optimizer state together. With `averages`, the latter include float32 averages of the
    trained parameters (an EMA on the GPU)."""
    held = {id(p): p for layer in layers for p in layer.parameters()}.values()
    trained = [p for p in held if p.requires_grad]
    kept_of = optimizers.find(optimizer.type).state_bytes
    least = torch.float32.itemsize if float32_gradients else 0
    state = sum(p.numel() * max(p.itemsize, least) + kept_of(optimizer, p) for p in trained)
    state += 4 * sum(parameter.numel() for parameter in trained) if averages else 0
    buffers = {id(b): b for layer in layers for b in layer.buffers()}.values()
    return sum(tensor.nbytes for tensor in (*held, *buffers)), state
