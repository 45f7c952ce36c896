"""Checks a run before anything is loaded; `--check` also prints what it will do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial

import optimizers
from models.assembly.data import check_data, choices_of, controls_of, encoders_of
from models.assembly.exports import check_exports, check_outputs
from models.assembly.memory import estimate
from models.assembly.prompts import check_encoders
from models.assembly.stage import StagedModel, load_existing_adapter, partition, read_presets
from models.base import BasePipeline
from models.foundation.checkpoints.folders import problems_of
from utils.dataset.collection import Collection, Source, collect, shortfalls
from utils.dataset.encoders import Encoder, items_wanted
from utils.dataset.epochs import Epochs, format_table, micro_batch_of
from utils.dataset.manifest import Scan
from utils.diffusion.training import faults
from utils.errors import Problem, UserError
from utils.quantised.linear import parameter_count
from utils.ranks import Ranks
from utils.run.metrics import check_account
from utils.settings.schema import Settings

VALUES = {"log_snr": 'timestep_sample_method = "log_snr"'}
"""How an option is written if only one of its values makes demands."""


def check_run(settings: Settings, ranks: Ranks, pipeline: BasePipeline) -> StagedModel:
    """Whether everything except the data fits, so that hours of encoding do not end in a mistake that could have been
    found before. Returns the denoiser without weights, adapted and cut as the settings ask.

    Raises:
        UserError: lists what does not fit.
    """
    if ranks.is_main:
        check_account(settings.monitoring)
    optimizers.check(settings.optimizer, ranks.device.type)
    if pipeline.block_format:
        pipeline.block_format.check()
    pipeline.check()
    staged = partition(pipeline, settings, pipeline.weights.build_empty())
    check_layers(pipeline, staged)
    read_presets(pipeline, staged.denoiser)
    load_existing_adapter(pipeline, settings, staged, layers=[])
    check_outputs(pipeline, settings)
    check_exports(pipeline, settings, staged)
    return staged


def check_layers(pipeline: BasePipeline, staged: StagedModel) -> None:
    """Whether the layers hold all that the denoiser's configuration asks for.

    Raises:
        UserError: they do not, since the model is a variant that is not trained here.
    """
    held = {id(parameter) for layer in staged.layers for parameter in layer.parameters()}
    left = [name for name, parameter in staged.denoiser.named_parameters() if id(parameter) not in held]
    if left:
        problem = pipeline.parts.misfit(
            f"asks for '{left[0]}' and {len(left) - 1} more tensors that this model's type does not use; such a "
            "variant is not trained here"
        )
        raise UserError([problem])


def plan_of(settings: Settings, ranks: Ranks, pipeline: BasePipeline, sources: Sequence[Source], scan: Scan) -> str:
    """The plan of the run, as text.

    Raises:
        UserError: lists all problems of the model's files and of the data.
    """
    staged, collections = None, []

    def check() -> None:
        nonlocal staged
        staged = check_run(settings, ranks, pipeline)

    def look() -> None:
        collections.extend(collect(sources, pipeline.media, scan, **choices_of(settings)))

    problems = problems_of([check, look])
    if problems:
        raise UserError(problems)
    return describe(settings, ranks, pipeline, staged, collections)


def describe(
    settings: Settings,
    ranks: Ranks,
    pipeline: BasePipeline,
    staged: StagedModel,
    collections: Sequence[Collection],
) -> str:
    """What the run will do with the collected data, as text."""
    encoders = encoders_of(pipeline, collections)
    check_encoders(encoders, controls_of(collections), pipeline, settings)
    check_data(pipeline, collections)
    trained = sum(p.numel() for p in staged.denoiser.parameters() if p.requires_grad)
    accumulation = settings.gradient_accumulation_steps
    epochs = Epochs(
        collections[0].samples, partial(micro_batch_of, settings), ranks.data_ranks, accumulation, settings.seed
    )
    buckets = sorted({sample.bucket for sample in collections[0].samples})
    micro = " or ".join(str(size) for size in sorted({micro_batch_of(settings, bucket) for bucket in buckets}))
    passes = settings.epochs or (None if settings.max_steps else 1)
    total = min(settings.max_steps or math.inf, epochs.first_step(passes) if passes else math.inf)
    facts = {
        "model": f"{settings.model.type}, {settings.adapter.type if settings.adapter else 'full fine-tune'}",
        "processes": f"{ranks.world_size} = {ranks.stages} stages x {ranks.data_ranks} data ranks",
        "global batch": f"{micro} per micro-batch x {accumulation} accumulated x {ranks.data_ranks} data ranks"
        + (f" = {int(micro) * accumulation * ranks.data_ranks}" if micro.isdigit() else ", by size"),
        "steps": f"{epochs.steps_in(0)} per epoch, {total} in all",
        "parameters": f"{parameter_count(staged.denoiser):,} in all, {trained:,} trained",
    }
    sections = [
        "\n".join(f"{name + ':':<14}{value}" for name, value in facts.items()),
        format_table(epochs.table()),
        *(f"evaluation '{c.source.name}': {len(c.samples)} samples" for c in collections[1:]),
        *(["\n".join(shortfalls(collections))] if shortfalls(collections) else []),
        estimate(settings, pipeline, staged, encoders, buckets),
        _cache_size(encoders, collections),
    ]
    return "\n\n".join(sections)


def _cache_size(encoders: Sequence[Encoder], collections: Sequence[Collection]) -> str:
    samples = [sample for collection in collections for sample in collection.samples]
    size = 0
    for encoder in encoders:
        # All items of one size take the same space.
        buckets = Counter(bucket for _, bucket in items_wanted(encoder, samples))
        for bucket, count in buckets.items():
            shapes = encoder.feature_shapes(bucket).values()
            size += count * sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
    return f"estimated cache on disk: {size / 2**20:.1f} MiB"


def check_training(pipeline: BasePipeline, file: str = "") -> None:
    """Whether the model's objective can honour what the options ask of timesteps, noise and loss.

    Args:
        file: where the options are written.

    Raises:
        UserError: it cannot, or some of them contradict each other.
    """
    found = faults(pipeline.options, pipeline.objective, pipeline.resolution_shift)
    problems = [Problem(file, f"[model] {VALUES.get(key, key)}".rstrip(), reason) for key, reason in found]
    if problems:
        raise UserError(problems)
