"""What a run will do, told before anything is loaded: `--check`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import optimizers
from models.base import BasePipeline
from models.foundation.files import problems_of
from models.foundation.outputs import check_outputs
from models.foundation.placement import Blueprint, apply_presets, draw_up, load_existing_adapter
from models.foundation.prompts import check_encoders
from models.foundation.weights import build_empty
from utils.dataset.collection import Collection, Source, check_encoder_names, collect, shortfalls
from utils.dataset.encoders import Encoder, items_wanted
from utils.dataset.epochs import Epochs, format_table, micro_batch_of
from utils.dataset.manifest import Scan
from utils.dataset.masks import MaskEncoder
from utils.dataset.samples import Bucket
from utils.ranks import Ranks
from utils.run.metrics import check_account
from utils.settings.errors import SettingsError
from utils.settings.schema import Settings

GIB = 2**30
OPTIMIZER_STATE: dict[str, Callable[[torch.Tensor], int]] = {
    # Two moments in float32, and a master of what is shorter.
    "adamw": lambda parameter: parameter.numel() * (8 if parameter.itemsize >= 4 else 12),
    "adamw8bit": lambda parameter: parameter.numel() * 2,
    "sgd": lambda parameter: parameter.nbytes,
}
"""Bytes that an optimizer keeps of a parameter."""


def check_run(settings: Settings, ranks: Ranks, pipeline: BasePipeline) -> Blueprint:
    """Whether everything but the data fits: hours of encoding are not to end in a mistake that could be told before
    them. The denoiser without weights, adapted and cut as the settings ask.

    Raises:
        SettingsError: with what does not.
    """
    if ranks.is_main:
        check_account(settings.monitoring)
    optimizers.check(settings.optimizer, ranks.device.type)
    pipeline.check()
    empty = build_empty(pipeline.build_denoiser)
    pipeline.set_types(empty)
    blueprint = draw_up(pipeline, settings, empty)
    apply_presets(pipeline, blueprint, layers=[])
    load_existing_adapter(pipeline, settings, blueprint, layers=[])
    check_outputs(pipeline, settings)
    return blueprint


def choices_of(settings: Settings) -> dict[str, Any]:
    """What the run's settings say of the collecting of data."""
    return {
        "max_failed_fraction": settings.max_failed_fraction,
        "caption_versions": settings.cache_text_embeddings,
    }


def plan_of(settings: Settings, ranks: Ranks, pipeline: BasePipeline, sources: Sequence[Source], scan: Scan) -> str:
    """The plan of the run, as text.

    Raises:
        SettingsError: with every problem of the model's files and of the data.
    """
    blueprint, collections = None, []

    def check() -> None:
        nonlocal blueprint
        blueprint = check_run(settings, ranks, pipeline)

    def look() -> None:
        collections.extend(collect(sources, pipeline.media, scan, **choices_of(settings)))

    problems = problems_of([check, look])
    if problems:
        raise SettingsError(problems)
    return describe(settings, ranks, pipeline, blueprint, collections)


def describe(
    settings: Settings,
    ranks: Ranks,
    pipeline: BasePipeline,
    blueprint: Blueprint,
    collections: Sequence[Collection],
) -> str:
    """What the run will do with data that is collected."""
    encoders = encoders_of(pipeline, collections)
    check_encoders(encoders, controls_of(collections), pipeline, settings)
    check_data(pipeline, collections)
    parameters = list(blueprint.denoiser.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
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
        "parameters": f"{sum(p.numel() for p in parameters):,} in all, {trained:,} trained",
    }
    sections = [
        "\n".join(f"{name + ':':<14}{value}" for name, value in facts.items()),
        format_table(epochs.table()),
        *(f"evaluation '{c.source.name}': {len(c.samples)} samples" for c in collections[1:]),
        *(["\n".join(shortfalls(collections))] if shortfalls(collections) else []),
        _memory(settings, pipeline, blueprint, encoders, buckets),
        _cache_size(encoders, collections),
    ]
    return "\n\n".join(sections)


def controls_of(collections: Sequence[Collection]) -> int:
    """How many control images a sample has."""
    return max(collection.controls for collection in collections)


def check_data(pipeline: BasePipeline, collections: Sequence[Collection]) -> None:
    """Whether the model can be trained on the collections.

    Raises:
        SettingsError: it cannot.
    """
    problems = [problem for collection in collections for problem in pipeline.problems_of_data(collection.samples)]
    if problems:
        raise SettingsError(problems)


def encoders_of(pipeline: BasePipeline, collections: Sequence[Collection]) -> list[Encoder]:
    """What encodes the collections: the model's encoders, and that of masks if there are any.

    Raises:
        SettingsError: the collections have what the model does not take.
    """
    encoders = pipeline.encoders_for(controls_of(collections))
    check_encoder_names(collections, encoders)
    masks = [MaskEncoder(pipeline.latent_shape)] if any(collection.has_masks for collection in collections) else []
    return [*encoders, *masks]


def _cache_size(encoders: Sequence[Encoder], collections: Sequence[Collection]) -> str:
    samples = [sample for collection in collections for sample in collection.samples]
    size = 0
    for encoder in encoders:
        # One sample's bucket stands for all items of its size.
        buckets = Counter(bucket for _, bucket in items_wanted(encoder, samples))
        for bucket, count in buckets.items():
            shapes = encoder.feature_shapes(bucket).values()
            size += count * sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
    return f"estimated cache on disk: {size / 2**20:.1f} MiB"


def _memory(
    settings: Settings,
    pipeline: BasePipeline,
    blueprint: Blueprint,
    encoders: Sequence[Encoder],
    buckets: Sequence[Bucket],
) -> str:
    """Per stage: weights, gradients and optimizer state by counting; activations by running the largest bucket's
    micro-batch through the layers on the meta device and adding up what autograd keeps."""
    largest = max(buckets, key=lambda bucket: bucket.width * bucket.height * bucket.frames)
    title = f"estimated memory per rank, bucket {largest}"
    try:
        kept = _activations(settings, pipeline, blueprint, encoders, largest)
    except NotImplementedError:
        # Experts that are chosen by a tensor's values cannot be run without values.
        kept, title = [0] * len(blueprint.layers), f"{title}, without activations"
    averages = settings.ema is not None and settings.ema.device == "gpu"
    rows = []
    for stage, (start, stop) in enumerate(blueprint.bounds):
        layers = blueprint.stage_layers(stage)
        weights, state = held_bytes(layers, settings.optimizer.type, averages=averages)
        in_flight = min(settings.gradient_accumulation_steps, len(blueprint.bounds) - stage)
        activations = in_flight * sum(kept[start:stop])
        rows.append(
            f"  stage {stage} (layers {start} to {stop - 1}): {(weights + state + activations) / GIB:.2f} GiB = "
            f"weights {weights / GIB:.2f} + gradients and optimizer {state / GIB:.2f} + "
            f"activations {activations / GIB:.2f}"
        )
    return "\n".join([f"{title}:", *rows])


def held_bytes(layers: Sequence[nn.Module], optimizer: str, *, averages: bool = False) -> tuple[int, int]:
    """Bytes of the weights of some layers, and of their gradients and optimizer state together; with `averages` in
    float32 of what is trained (an EMA that is kept on the GPU)."""
    held = {id(p): p for layer in layers for p in layer.parameters()}.values()
    trained = [p for p in held if p.requires_grad]
    state = sum(parameter.nbytes + OPTIMIZER_STATE[optimizer](parameter) for parameter in trained)
    state += 4 * sum(parameter.numel() for parameter in trained) if averages else 0
    return sum(p.nbytes for p in held), state


def _activations(
    settings: Settings, pipeline: BasePipeline, blueprint: Blueprint, encoders: Sequence[Encoder], bucket: Bucket
) -> list[int]:
    """Bytes that autograd keeps of each layer for one micro-batch of `bucket`."""
    batch = micro_batch_of(settings, bucket)
    # Ones, since zeros would be masks that show nothing of the text.
    features = {
        name: torch.ones((batch, *shape), dtype=dtype)
        for encoder in encoders
        for name, (shape, dtype) in encoder.feature_shapes(bucket).items()
    }
    latent = torch.zeros((batch, *pipeline.latent_shape(bucket.width, bucket.height, bucket.frames)))
    stream = _on_meta(pipeline.prepare_inputs({**features, "latents": latent}, latent, torch.zeros(batch)))
    parameters = {parameter.untyped_storage()._cdata for parameter in blueprint.denoiser.parameters()}
    return _run_layers(blueprint.layers, stream, parameters, settings.activation_checkpointing)


def _run_layers(layers: Sequence[nn.Module], stream: Any, parameters: set[int], recompute: bool) -> list[int]:
    kept_per_layer = []
    for layer in layers:
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                storages[storage._cdata] = storage.nbytes()
            return tensor

        given = _bytes(stream)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            stream = layer.to("meta")(stream)
        only_input = recompute and getattr(layer, "recomputable", False)
        kept_per_layer.append(given if only_input else sum(storages.values()))
    return kept_per_layer


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple):
        moved = [_on_meta(part) for part in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, tuple) else 0
