"""Everything that is done to a denoiser, in order: it is built without memory, its blocks may get quantised Linears, it
is adapted and cut; then this process's stage is filled with weights, presets and adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
from torch import nn

from models.assembly.in_full import named_in_full
from models.assembly.rates import Rates, freeze
from models.base import BasePipeline
from models.foundation.checkpoints.adapter_files import read_existing, read_ranks, read_updates
from models.foundation.checkpoints.first_weights import drawn_together
from utils import adapters
from utils.adapters import attach, in_full, mixed, presets
from utils.adapters.kinds import ModelNames, Update
from utils.adapters.presets import TensorSource
from utils.errors import UserError
from utils.parallel.attention import give_gradients_one_layout
from utils.parallel.compiling import compile_blocks
from utils.parallel.homes import BlockHomes
from utils.parallel.partition import (
    Bounds,
    balanced_bounds,
    lacking,
    of_stage,
    repeated_blocks,
    stage_bounds,
    within,
)
from utils.parallel.swap_plan import counts, numbers_of
from utils.parallel.teacher import Teacher
from utils.quantised.linear import parameter_count, quantise
from utils.ranks import Ranks
from utils.settings.model_schema import PresetAdapter
from utils.settings.schema import PLANNED, AdapterSettings, Settings

logger = logging.getLogger(__name__)

Preset = tuple[PresetAdapter, Mapping[str, Update]]


@dataclass(frozen=True)
class StagedModel:
    """A denoiser, still without weights, with its adapter attached and cut into stages.

    Attributes:
        denoiser: the whole module.
        layers: its layers in order; they share the denoiser's parameters.
        bounds: the half-open range of layers of every piece of a stage, in their order; see `of_stage`.
        swapped: of how many blocks of every stage the weights are in the host's memory.
        homes: where blocks of this process's stage are that have left it while it was loaded.
    """

    denoiser: nn.Module
    layers: list[nn.Module]
    bounds: Bounds
    swapped: list[int]
    homes: BlockHomes = field(default_factory=BlockHomes)

    @property
    def stages(self) -> int:
        return len(self.swapped)

    def stage_layers(self, stage: int) -> list[nn.Module]:
        return within(of_stage(self.bounds, stage, self.stages), self.layers)

    def trained(self, layers: list[nn.Module]) -> dict[str, nn.Parameter]:
        """The trainable parameters among `layers`, by name."""
        held = {id(parameter) for layer in layers for parameter in layer.parameters()}
        return {
            attach.base_name(name): parameter
            for name, parameter in self.denoiser.named_parameters()
            if parameter.requires_grad and id(parameter) in held
        }


def partition(pipeline: BasePipeline, settings: Settings, denoiser: nn.Module) -> StagedModel:
    """Puts quantised Linears into the blocks if the settings ask for them, attaches the adapter, freezes what is not to
    be trained or has no learning rate, and cuts the denoiser.

    Raises:
        UserError: patterns of what is trained or adapted are not used, or leave nothing; a rule for rates is not used;
            the stages do not fit the layers, or a stage has fewer blocks than are to be swapped.
    """
    if pipeline.block_format:
        quantise(denoiser, quantised_linears(pipeline, denoiser), pipeline.block_format)
    in_full = named_in_full(pipeline, denoiser)
    if settings.adapter:
        mixed.check(settings.adapter, pipeline.options)
        ranks = _ranks_of_existing(pipeline, settings.adapter, denoiser)
        attach.attach(denoiser, adapted_blocks(pipeline, settings.adapter), settings.adapter, ranks, in_full)
    elif in_full:
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(name in in_full)
    rates = Rates(settings, pipeline, denoiser)
    rates.check(denoiser)
    freeze(denoiser, rates)
    layers = pipeline.to_layers(denoiser)
    bounds = bounds_of(settings, layers)
    try:
        swapped = _swapped(settings, layers, bounds)
    except ValueError as error:
        raise UserError.of(str(error), where="key `blocks_to_swap`") from error
    return StagedModel(denoiser, layers, bounds, swapped)


def bounds_of(settings: Settings, layers: Sequence[nn.Module]) -> Bounds:
    """The range of layers of every piece of a stage; before a cut has been planned that waits for the data, that of
    equal numbers of parameters.

    Raises:
        UserError: the stages do not fit the layers.
    """
    if settings.pieces > 1 and settings.pipeline_stages * settings.pieces > len(layers):
        message = (
            f"{settings.pipeline_stages} stages of {settings.pieces} pieces are more than the model has layers, "
            f"{len(layers)}; take fewer of them"
        )
        raise UserError.of(message, where="pipeline_stages, pieces_per_stage")
    try:
        return stage_bounds(
            "parameters" if settings.partition_method in PLANNED else settings.partition_method,
            [parameter_count(layer) for layer in layers],
            settings.pipeline_stages * settings.pieces,
            settings.partition_split,
            weights_of_pieces(settings),
        )
    except ValueError as error:
        raise UserError.of(str(error), where="pipeline_stages, partition_split") from error


def weights_of_pieces(settings: Settings) -> list[float] | None:
    """What each piece of the model is to take, relative to the others; None: all alike."""
    return settings.stage_weights and settings.stage_weights * settings.pieces


def blocks_of_pieces(settings: Settings) -> list[int]:
    """How many blocks each piece must have at least, so that there are as many in every stage as it swaps."""
    numbers = numbers_of(settings.blocks_to_swap, settings.pipeline_stages)
    return [-(-number // settings.pieces) for number in numbers] * settings.pieces


def _swapped(settings: Settings, layers: Sequence[nn.Module], bounds: Bounds) -> list[int]:
    """The number of swapped blocks of every stage.

    Raises:
        ValueError: a stage has fewer; if the cut is planned later, it has in every cut.
    """
    stages = settings.pipeline_stages
    if not settings.cut_is_planned:
        of_stages = [within(of_stage(bounds, stage, stages), layers) for stage in range(stages)]
        return counts(settings.blocks_to_swap, of_stages)
    numbers = numbers_of(settings.blocks_to_swap, stages)
    if balanced_bounds(lacking(layers, blocks_of_pieces(settings)), len(layers), len(bounds)) is None:
        blocks = len(repeated_blocks(layers))
        raise ValueError(f"no cut of the model's {blocks} blocks has {numbers} blocks to swap in its stages; swap less")
    return numbers


def quantised_linears(pipeline: BasePipeline, denoiser: nn.Module) -> list[str]:
    """Names of the Linears whose weights are quantised: those of the repeated blocks that no rule of storage names."""
    rules = pipeline.storage
    return [
        name
        for name, module in denoiser.named_modules()
        # Who uses a subclass may look at its weight.
        if type(module) is nn.Linear
        and attach.is_within(name, pipeline.blocks)
        and not rules.is_named(f"{name}.weight")
    ]


def adapted_blocks(pipeline: BasePipeline, adapter: AdapterSettings) -> tuple[str, ...]:
    """The blocks in which modules are adapted.

    Raises:
        UserError: the settings ask for convolutions, and the model has none.
    """
    if adapter.convolutions and not pipeline.convolutional_blocks:
        raise UserError.of("this model's blocks have no convolutions; leave it out", where="[adapter] convolutions")
    return (*pipeline.blocks, *(pipeline.convolutional_blocks if adapter.convolutions else ()))


def _ranks_of_existing(
    pipeline: BasePipeline, adapter: AdapterSettings, denoiser: nn.Module
) -> Mapping[str, int] | None:
    """The rank of each module in the file of `init_from_existing`, if these are asked for.

    Raises:
        UserError: the file cannot be read.
    """
    if not getattr(adapter, "dim_from_weights", False):
        return None
    return read_ranks(adapter.init_from_existing, adapters.find(adapter.type), model_names(pipeline, denoiser))


def load_stage(
    pipeline: BasePipeline,
    settings: Settings,
    stage: int,
    homes_of: Callable[[StagedModel], BlockHomes] = lambda _: BlockHomes(),
    change: Callable[[StagedModel, list[nn.Module]], None] = lambda _, __: None,
    ranks: Ranks | None = None,
) -> StagedModel:
    """A staged model in which the layers of `stage` hold their weights, base and adapter.

    Args:
        homes_of: where blocks of the stage go, each before the next one is read; default: none goes.
        change: is called with layers that have all of it but what `init_from_existing` names, before they go.
        ranks: this process, if all ranks load together.

    Raises:
        UserError: a file does not fit the model or the adapter.
    """
    denoiser, source = _opened(pipeline, ranks or Ranks())
    give_gradients_one_layout(denoiser)
    staged = partition(pipeline, settings, denoiser)
    layers = staged.stage_layers(stage)
    given = read_presets(pipeline, denoiser)
    attach_presets(given, staged, layers)
    staged = replace(staged, homes=homes_of(staged))
    fused = [(updates, preset.weight) for preset, updates in given if preset.fused]
    source = presets.before_quantising(denoiser, source, fused)
    for some in _portions(layers, staged.homes):
        pipeline.weights.fill(denoiser, source, some)
        for updates, weight in fused:
            presets.fuse(denoiser, some, updates, weight)
        if settings.adapter:
            attach.initialise(denoiser, some, settings.adapter, pipeline.seed)
        change(staged, some)
    if settings.adapter:
        load_existing_adapter(pipeline, settings, staged, layers)
    if settings.compile:
        compile_blocks(layers)
    return staged


def _opened(pipeline: BasePipeline, ranks: Ranks) -> tuple[nn.Module, TensorSource]:
    """The whole denoiser, and the source of its weights. Only one that starts from scratch in a process that is alone
    has these already.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    weights = pipeline.weights
    if pipeline.options.from_scratch and ranks.world_size > 1:
        denoiser = weights.build_empty()
        return denoiser, drawn_together(weights, denoiser, ranks)
    denoiser = weights.build()
    return denoiser, weights.open(denoiser)


def _portions(layers: Sequence[nn.Module], homes: BlockHomes) -> Iterator[list[nn.Module]]:
    """The layers that are loaded together: each block that does not stay, which leaves before the next one is asked
    for; then all others."""
    leaving = list(homes.waiting)
    for position in leaving:
        yield [layers[position]]
        homes.take(position)
    yield [layer for position, layer in enumerate(layers) if position not in leaving]
    homes.complete()


def read_presets(pipeline: BasePipeline, denoiser: nn.Module) -> list[Preset]:
    """The `preset_adapters`, each with its updates.

    Raises:
        UserError: an adapter does not fit the model.
    """
    given = []
    for preset in pipeline.options.preset_adapters:
        updates = read_updates(preset.path, model_names(pipeline, denoiser))
        presets.check_fits(denoiser, updates, str(preset.path))
        if not preset.fused:
            presets.check_beside(denoiser, updates, str(preset.path))
        given.append((preset, updates))
    return given


def attach_presets(given: Sequence[Preset], staged: StagedModel, layers: list[nn.Module]) -> None:
    """Puts those presets beside the modules of `layers`, with or without weights, that are not fused."""
    for preset, updates in given:
        if not preset.fused:
            presets.attach_frozen(staged.denoiser, layers, updates, preset.weight)


def model_names(pipeline: BasePipeline, denoiser: nn.Module) -> ModelNames:
    """What the denoiser's modules are called, here and in the files of adapters."""
    return ModelNames(
        folder=pipeline.denoiser_folder,
        modules=attach.adaptable(denoiser),
        layout=pipeline.original_layout,
        shapes=presets.base_shapes(denoiser),
        beside=pipeline.weights.shapes_beside(),
        read=_base_reader(pipeline, denoiser),
    )


def _base_reader(pipeline: BasePipeline, denoiser: nn.Module) -> Callable[[str], torch.Tensor]:
    """What reads a parameter of the base as it is before training, with the presets that are fused; from its file,
    since a stage holds its own part alone, and a swapped block's weights are not at hand."""

    @cache
    def source() -> presets.FusedSource:
        given = read_presets(pipeline, denoiser)
        changes = presets.changes_of((updates, preset.weight) for preset, updates in given if preset.fused)
        return presets.FusedSource(pipeline.weights.anew(), changes)

    return lambda name: source().read(name)


def teacher_of(pipeline: BasePipeline, settings: Settings, staged: StagedModel) -> Teacher | None:
    """The model itself with empty captions, if guidance is folded into its targets; or without its adapter, if
    regularisation data uses its predictions as targets."""
    if settings.model.folded_guidance is not None:
        return Teacher(
            nullcontext, pipeline.maths.with_folded_guidance, inputs=lambda batch: (batch.empty, batch.labels)
        )
    if settings.regularisation_target == "data":
        return None
    return Teacher(partial(attach.switched_off, staged.denoiser), pipeline.maths.with_teacher_target)


def load_existing_adapter(
    pipeline: BasePipeline, settings: Settings, staged: StagedModel, layers: list[nn.Module]
) -> None:
    """Copies the adapter of `init_from_existing`, if one is named, into the factors of `layers`, and what it has for
    parameters that are trained in full into those; with no layers it is only checked.

    Raises:
        UserError: it does not fit the model or the run's adapter.
    """
    existing = settings.adapter and settings.adapter.init_from_existing
    if existing:
        kind, denoiser = adapters.find(settings.adapter.type), staged.denoiser
        named = set(in_full.divided(staged.trained(staged.layers))[1])
        names = model_names(pipeline, denoiser)
        factors, whole = read_existing(existing, kind, names, attach.scales(denoiser), named)
        attach.load(denoiser, layers, factors, str(existing))
        presets.check_fits(denoiser, whole, str(existing))
        in_full.load(denoiser, layers, whole)
        if (missing := sorted(named - set(whole))) and not layers:
            logger.info(
                "%s: has no values for %d parameters that [model] train names, which begin with those of the base: the "
                "first is '%s'",
                existing,
                len(missing),
                missing[0],
            )
