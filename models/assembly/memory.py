"""What a stage holds (weights, gradients, optimizer state, activations), told without allocating it."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from models.assembly.activations import (
    LayerActivations,
    LayerRun,
    activations_of,
    in_pipeline,
    peak,
    run_layers,
    storages,
)
from models.assembly.divided_weights import DividedWeights
from models.assembly.kept import Kept, gradient_size, held_by
from models.assembly.live_bytes import ForwardRun, run_forward
from models.assembly.operations import LayerOperations, count_operations
from models.assembly.phases import Phases
from models.assembly.prompts import encoders_of_prompts, live_encoders, sample_bucket
from models.assembly.stage import StagedModel, bounds_of, teacher_of
from models.base import BasePipeline
from utils.dataset.encoders import Encoder
from utils.dataset.epochs import micro_batch_of
from utils.dataset.samples import Bucket
from utils.parallel.interleaved import InFlight, Layout, in_flight
from utils.parallel.partition import Bounds, Range, layers_text, of_stage, within
from utils.parallel.recompute import recomputed_positions
from utils.parallel.swap_plan import BUFFERS, SwapPlan, counts
from utils.parallel.transfers import aligned
from utils.parallel.wire import map_tensors
from utils.settings.sample_requests import requests_of
from utils.settings.schema import Settings

GIB = 2**30
PiecesOfStage = tuple[Range, ...]


@dataclass(frozen=True)
class StagePlan:
    """The bytes that a rank of one stage holds.

    Attributes:
        pieces: the layers of each.
        weights: on the device, with the buffers of swapped blocks.
        state: gradients and optimizer state, as far as they are on the device; of the rank that has most.
        activations: at the peak of training.
        swap: which blocks are swapped.
        host: the bytes of the host's memory that their weights take, and what belongs to those that are trained.
        stepped: those that the optimizer takes of it for what is not swapped.
        live: of text encoders whose features are not cached: their weights, and what they take at once.
        between: what is kept of `state` between two steps.
        evaluation, sampling: what is held at the peak of these, at which there are no gradients; 0 if a run has none.
        divided: what data ranks divide of the weights; `swap` says then whose pieces are in the host's memory.
    """

    pieces: PiecesOfStage
    weights: int
    state: int
    activations: int
    swap: SwapPlan
    host: int
    stepped: int = 0
    live: tuple[int, int] = (0, 0)
    between: int = 0
    evaluation: int = 0
    sampling: int = 0
    divided: DividedWeights = DividedWeights()

    @property
    def training(self) -> int:
        """At the peak of a step."""
        return self.weights + self.state + self.activations + sum(self.live)

    @property
    def total(self) -> int:
        """At the peak of a run."""
        return max(self.training, self.evaluation, self.sampling)

    def __str__(self) -> str:
        told = (
            f"({layers_text(self.pieces)}): {self.training / GIB:.2f} GiB = weights "
            f"{self.weights / GIB:.2f} + gradients and optimizer {self.state / GIB:.2f} + "
            f"activations {self.activations / GIB:.2f}"
        )
        if any(self.live):
            told = f"{told} + text encoders {sum(self.live) / GIB:.2f}"
        if self.stepped:
            told = f"{told}; the optimizer takes {self.stepped / GIB:.2f} GiB of the host's memory"
        if self.divided.blocks:
            pieces, buffers = self.divided.pieces / GIB, self.divided.buffers / GIB
            told = (
                f"{told}; of {self.divided.blocks} divided blocks a rank keeps {pieces:.2f} GiB of the weights, and "
                f"{buffers:.2f} GiB of buffers"
            )
            host = f"{len(self.swap.blocks)} of them take {self.host / GIB:.2f} GiB of the host's memory"
            return f"{told}; {host}" if self.swap.blocks else told
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
        buckets: how often each size is trained on, relative to the others.
        data_ranks: among which state may be divided.
        evaluated: the sizes of the data that is evaluated.
    """

    def __init__(
        self,
        settings: Settings,
        pipeline: BasePipeline,
        staged: StagedModel,
        encoders: Sequence[Encoder],
        buckets: Mapping[Bucket, float],
        data_ranks: int = 1,
        evaluated: Collection[Bucket] = (),
    ):
        self.settings, self.staged = settings, staged
        self._kept, self.data_ranks = Kept.of(settings, data_ranks), data_ranks
        self._divides = settings.divides_weights and data_ranks > 1
        self._pipeline, self._encoders = pipeline, encoders
        self._counted: dict[Hashable, list[LayerActivations]] = {}
        self._swaps: dict[PiecesOfStage, SwapPlan] = {}
        self._plans: dict[Hashable, StagePlan] = {}
        self._forwards: dict[tuple[Bucket, int], ForwardRun] = {}
        self._trained_sizes, self._evaluated = list(buckets), evaluated
        # Small ones may be in larger micro-batches.
        self.bucket = max(sorted(buckets), key=lambda one: one.pixels * micro_batch_of(settings, one))
        # Where most of the time goes.
        self.frequent = max(sorted(buckets), key=lambda bucket: bucket.pixels * buckets[bucket])

    def swapped(self, settings: Settings) -> list[int]:
        """The number of swapped blocks of every stage."""
        return counts(settings.blocks_to_swap, [self._layers(pieces) for pieces in self._stages(settings)])

    def bounds(self, settings: Settings) -> Bounds:
        """The range of layers of every piece."""
        return bounds_of(settings, self.staged.layers)

    def _stages(self, settings: Settings) -> list[PiecesOfStage]:
        stages = settings.pipeline_stages
        return [of_stage(self.bounds(settings), stage, stages) for stage in range(stages)]

    def plans(self, settings: Settings, swapped: Sequence[int]) -> list[StagePlan]:
        """One for each stage. Weights, gradients and optimizer state are counted; for activations the micro-batch of
        the largest bucket runs through the layers on the meta device."""
        stages = enumerate(zip(self._stages(settings), swapped, strict=True))
        return [
            self.plan_of(settings, stage, pieces, self._swap(pieces).with_blocks(number))
            for stage, (pieces, number) in stages
        ]

    def least_swapped(self, settings: Settings, budget: float) -> list[int]:
        """The fewest swapped blocks with which each stage fits; all of its blocks if it never does."""
        found = []
        for stage, pieces in enumerate(self._stages(settings)):
            swap = self._swap(pieces)
            fits = (
                number
                for number in range(len(swap.blocks) + 1)
                if self.plan_of(settings, stage, pieces, swap.with_blocks(number)).total <= budget
            )
            found.append(next(fits, len(swap.blocks)))
        return found

    def text(self, settings: Settings, plans: Sequence[StagePlan] | None = None) -> str:
        """The plans, as text."""
        plans = plans or self.plans(settings, self.swapped(settings))
        batch = micro_batch_of(self.settings, self.bucket)
        samples = f", {batch} samples at once" if batch > 1 else ""
        title = f"estimated memory per rank, bucket {self.bucket}{samples}:"
        stages = (f"  stage {stage} {plan}" for stage, plan in enumerate(plans))
        return "\n".join([title, *stages, *self.phases.lines(plans)])

    def plan_of(self, settings: Settings, stage: int, pieces: PiecesOfStage, swap: SwapPlan) -> StagePlan:
        """What a stage holds that has these layers, and of them these swapped."""
        # Whoever looks for a cut asks for the same layers in the place of many stages. A plan keeps its swap, so that
        # no other has the number of one of its blocks.
        key = pieces, tuple(map(id, swap.blocks.values()))
        if key not in self._plans:
            self._plans[key] = self._without_activations(pieces, swap)
        activations = [self._activations(settings, piece) for piece in pieces]
        ends = {end for piece in pieces for end in piece if 0 < end < len(self._runs)}
        message = max((sum(tensor.nbytes for tensor in self._runs[end - 1].leaving) for end in ends), default=0)
        return replace(self._plans[key], activations=peak(activations, _in_flight(settings, stage), message))

    def _without_activations(self, pieces: PiecesOfStage, swap: SwapPlan) -> StagePlan:
        """The same but for what a step makes, which depends on the stage, too."""
        travelling = {id(parameter) for block in swap.trained.values() for parameter in block}
        of_layers = within(pieces, self._trained)
        trained = {name: parameter for part in of_layers for name, parameter in part.items()}
        away = {name: parameter for name, parameter in trained.items() if id(parameter) in travelling}
        staying = {name: parameter for name, parameter in trained.items() if name not in away}
        divided = self._divided(pieces, swap, trained)
        state, stepped = self._kept.bytes_of(staying, gradients=not self._kept.releases, among=trained)
        if self._kept.releases:
            state += max(sum(map(self._kept.gradient, part.values())) for part in of_layers)
        # These are stepped where they are, without copies.
        at_home = replace(self._kept, offload=False)
        if divided.blocks:
            weights, buffers = self._weights(pieces) - divided.saved, 0
            sums = self._kept.sums_of(away, trained)
            # Those of a block leave when the one before it begins its backward pass.
            state += sums + max(sum(map(self._kept.gradient, part.values())) for part in of_layers)
            host = divided.on_host + sum(at_home.bytes_of(away, gradients=False, among=trained)) + sums
        else:
            weights = self._weights(pieces) + swap.ring_bytes - swap.tensor_bytes
            buffers = self._gradient_buffers(swap)
            host = swap.host_bytes + sum(at_home.bytes_of(away, among=trained))
        between = self._kept.bytes_of(staying, gradients=False, among=trained)[0] + buffers
        # While the averages are in the place of the parameters, these wait beside them.
        exchanged = self._exchanged(pieces, staying, divided) if self._kept.averages else 0
        # The first stage encodes captions, for training and for evaluation.
        live = self.phases.staying if pieces[0][0] == 0 else (0, 0)
        evaluation, sampling = self.phases.forward(pieces, weights + between + exchanged, live)
        return StagePlan(
            pieces=pieces,
            weights=weights,
            state=state + buffers,
            activations=0,
            live=live,
            between=between,
            evaluation=evaluation,
            sampling=sampling,
            swap=swap,
            host=host,
            stepped=stepped,
            divided=divided,
        )

    def _divided(self, pieces: PiecesOfStage, swap: SwapPlan, trained: Mapping[str, nn.Parameter]) -> DividedWeights:
        if not self._divides:
            return DividedWeights()
        in_full = self.settings.adapter is None
        every = self._swap(pieces)
        return DividedWeights.of(
            every.with_blocks(len(every.blocks)), swap.blocks, self._kept.data_ranks, trained if in_full else {}
        )

    def _exchanged(self, pieces: PiecesOfStage, staying: Mapping[str, nn.Parameter], divided: DividedWeights) -> int:
        """The bytes of these parameters, of which a rank has only its own where they are divided."""
        if not divided.blocks or self.settings.adapter:
            return sum(parameter.nbytes for parameter in staying.values())
        apart = {id(parameter) for block in self._swap(pieces).trained.values() for parameter in block}
        return divided.pieces + sum(p.nbytes for p in staying.values() if id(p) not in apart)

    def _weights(self, pieces: PiecesOfStage) -> int:
        """The bytes of a stage's weights and buffers; what several of its layers have counts once."""
        held: dict[int, int] = {}
        for layer in within(pieces, self._held):
            held.update(layer)
        return sum(held.values())

    @cached_property
    def _held(self) -> list[dict[int, int]]:
        """The bytes of each layer's weights and buffers, by their numbers."""
        return [held_by([layer]) for layer in self.staged.layers]

    @cached_property
    def _trained(self) -> list[dict[str, nn.Parameter]]:
        """The trained parameters of each layer."""
        names = {id(parameter): name for name, parameter in self.staged.trained(self.staged.layers).items()}
        return [
            {names[id(parameter)]: parameter for parameter in layer.parameters() if id(parameter) in names}
            for layer in self.staged.layers
        ]

    def _gradient_buffers(self, swap: SwapPlan) -> int:
        """The bytes in which the gradients of swapped blocks wait for their way to the host."""
        float32, blocks = self._kept.float32_gradients, swap.trained.values()
        sizes = [sum(aligned(gradient_size(p, float32=float32)) for p in block) for block in blocks]
        return min(BUFFERS, len(sizes)) * max(sizes, default=0)

    @cached_property
    def operations(self) -> list[LayerOperations]:
        """Of every layer, for one micro-batch of the size on which a run spends most time."""
        return count_operations(self.staged.layers, self.first_stream(self.frequent))

    @property
    def has_teacher(self) -> bool:
        """Whether a step has a second forward pass, for its targets."""
        return teacher_of(self._pipeline, self.settings, self.staged) is not None

    def _layers(self, pieces: PiecesOfStage) -> list[nn.Module]:
        return within(pieces, self.staged.layers)

    def _swap(self, pieces: PiecesOfStage) -> SwapPlan:
        """With all blocks of a stage."""
        if pieces not in self._swaps:
            plan_of = SwapPlan.of_divided if self._divides else SwapPlan.of_all
            self._swaps[pieces] = plan_of(self._layers(pieces), trained=self.settings.adapter is None)
        return self._swaps[pieces]

    def _activations(self, settings: Settings, piece: Range) -> Sequence[LayerActivations]:
        """Of a piece, for one micro-batch."""
        start, stop = piece
        how = {"recomputed": recomputed_positions(self.staged.layers[start:], settings.recomputed_every)}
        how["offload"], how["held"] = settings.offloads, self._held_storages
        key = start, settings.recomputed_every, settings.offloads
        # What a layer takes depends on those before it in its piece, and on none behind it.
        if key not in self._counted:
            self._counted[key] = activations_of(self._runs[start:], **how)
        if (key, stop) not in self._counted:
            how["recomputed"] = [position for position in how["recomputed"] if position < stop - start]
            how |= {"received": start > 0, "sent": stop < len(self._runs)}
            own, runs = self._counted[key][: stop - start], self._runs[start:stop]
            self._counted[key, stop] = in_pipeline(own, runs, **how)
        return self._counted[key, stop]

    @cached_property
    def _runs(self) -> list[LayerRun]:
        return run_layers(self.staged.layers, self.first_stream(self.bucket))

    @cached_property
    def _held_storages(self) -> Collection[int]:
        return storages([*self.staged.denoiser.parameters(), *self.staged.denoiser.buffers()]).keys()

    @cached_property
    def phases(self) -> Phases:
        """What a run does beside training."""
        settings = self.settings
        requests = requests_of(settings.sampling, self._pipeline.guided_by_second_prediction)
        sizes = [sample_bucket(self._pipeline, request.settings) for request in requests]
        sampled = max(sizes, key=lambda bucket: bucket.pixels, default=None)
        at_once = partial(micro_batch_of, settings, evaluating=True)
        evaluated = max(sorted(self._evaluated), key=lambda one: one.pixels * at_once(one), default=None)
        cached = max([*sorted(self._trained_sizes), *sorted(self._evaluated)], key=lambda one: one.pixels)
        live = live_encoders(settings, self._encoders)
        # Prompts are cached in any case.
        of_prompts = encoders_of_prompts(self._encoders, requests) if live and requests else []
        return Phases(
            self._encoders[0],
            cached=[encoder for encoder in self._encoders if encoder not in live or encoder in of_prompts],
            caching=(cached, settings.caching_batch_size),
            live=(live, self._most_captions),
            evaluated=self._forward(evaluated, at_once(evaluated)) if evaluated else None,
            sampled=self._forward(sampled, 1) if sampled else None,
            latent_shape=self._pipeline.latent_shape(sampled.width, sampled.height, sampled.frames)
            if sampled
            else None,
        )

    @property
    def _most_captions(self) -> int:
        """The most samples of a micro-batch."""
        trained = [micro_batch_of(self.settings, bucket) for bucket in self._trained_sizes]
        return max([*trained, *(micro_batch_of(self.settings, one, evaluating=True) for one in self._evaluated)])

    def _forward(self, bucket: Bucket, batch: int) -> ForwardRun:
        if (bucket, batch) not in self._forwards:
            self._forwards[bucket, batch] = run_forward(self.staged.layers, self.first_stream(bucket, batch))
        return self._forwards[bucket, batch]

    def first_stream(self, bucket: Bucket, batch: int | None = None) -> Any:
        """The first stream of a micro-batch of this size, on the meta device.

        Args:
            batch: its number of samples; default: as many as are trained together.
        """
        batch = batch or micro_batch_of(self.settings, bucket)
        # Ones, since zeros would be masks that hide all of the text.
        features = {
            name: torch.ones((batch, *shape), dtype=dtype)
            for encoder in self._encoders
            for name, (shape, dtype) in encoder.feature_shapes(bucket).items()
        }
        latent = torch.zeros((batch, *self._pipeline.latent_shape(bucket.width, bucket.height, bucket.frames)))
        inputs = self._pipeline.prepare_inputs({**features, "latents": latent}, latent, torch.zeros(batch))
        return map_tensors(lambda tensor: tensor.to("meta"), inputs)


def _in_flight(settings: Settings, stage: int) -> Collection[InFlight]:
    """What there is at the backward passes of a stage."""
    stages, micro_batches = settings.pipeline_stages, settings.gradient_accumulation_steps
    if settings.pieces == 1:
        return [(0, (min(micro_batches, stages - stage),), 0)]
    return in_flight(Layout(stages, settings.pieces, micro_batches), stage)
