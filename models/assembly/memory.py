"""What a stage holds (weights, gradients, optimizer state, activations), told without allocating it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
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
from utils.parallel.swap_plan import BUFFERS, SwapPlan, aligned, counts
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
        host: the bytes of the host's memory that their weights take, and what belongs to those that are trained.
    """

    layers: tuple[int, int]
    weights: int
    state: int
    activations: int
    swap: SwapPlan
    host: int

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
            f"weights, and take {self.host / GIB:.2f} GiB of the host's memory"
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
    def _state_bytes(self) -> Callable[[Iterable[torch.Tensor]], int]:
        """The bytes of some trained parameters' gradients and optimizer state."""
        return partial(
            state_bytes,
            optimizer=self.settings.optimizer,
            averages=self.settings.ema is not None and self.settings.ema.device == "gpu",
            float32_gradients=sums_in_float32(self.settings),
        )

    @cached_property
    def _held(self) -> list[tuple[int, int]]:
        layers = [self.staged.stage_layers(stage) for stage in self._stages]
        return [(weight_bytes(one), self._state_bytes(trained_of(one))) for one in layers]

    @cached_property
    def _swaps(self) -> list[SwapPlan]:
        trained = self.settings.adapter is None
        return [SwapPlan.of_all(self.staged.stage_layers(stage), trained=trained) for stage in self._stages]

    @property
    def _stages(self) -> range:
        return range(len(self.staged.bounds))

    def _plan(self, settings: Settings, stage: int, swapped: int, counted: Sequence[LayerActivations]) -> StagePlan:
        start, stop = self.staged.bounds[stage]
        weights, state = self._held[stage]
        swap = self._swaps[stage].with_blocks(swapped)
        in_flight = min(settings.gradient_accumulation_steps, len(self.staged.bounds) - stage)
        travelling = swap.trained.values()
        away = sum(map(self._state_bytes, travelling))
        return StagePlan(
            layers=(start, stop - 1),
            weights=weights + swap.ring_bytes - swap.tensor_bytes,
            state=state - away + self._gradient_buffers(travelling),
            activations=peak(counted[start:stop], in_flight),
            swap=swap,
            host=swap.host_bytes + away,
        )

    def _gradient_buffers(self, blocks: Collection[Sequence[torch.Tensor]]) -> int:
        """The bytes in which the gradients of swapped blocks wait for their way to the host."""
        float32 = sums_in_float32(self.settings)
        sizes = (sum(aligned(gradient_size(p, float32=float32)) for p in block) for block in blocks)
        return min(BUFFERS, len(blocks)) * max(sizes, default=0)

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
    held = {id(tensor): tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    return sum(tensor.nbytes for tensor in held.values())


def trained_of(layers: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The trained parameters of some layers, each once."""
    held = {id(p): p for layer in layers for p in layer.parameters()}
    return [parameter for parameter in held.values() if parameter.requires_grad]


def state_bytes(
    trained: Iterable[torch.Tensor],
    optimizer: OptimizerSettings,
    *,
    averages: bool = False,
    float32_gradients: bool = False,
) -> int:
    """The bytes of the gradients and the optimizer state of trained parameters. With `averages` they include float32
    averages (an EMA on the GPU)."""
    kept_of = optimizers.find(optimizer.type).state_bytes
    return sum(
        gradient_size(p, float32=float32_gradients) + kept_of(optimizer, p) + (4 * p.numel() if averages else 0)
        for p in trained
    )


def gradient_size(parameter: torch.Tensor, *, float32: bool) -> int:
    """The bytes of a parameter's gradient, which may be summed in float32."""
    return parameter.numel() * max(parameter.itemsize, torch.float32.itemsize if float32 else 0)
