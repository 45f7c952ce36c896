"""What a run will do, told before anything is loaded: `--check`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from models.base import BasePipeline
from models.foundation.outputs import sample_bucket
from models.foundation.placement import Blueprint, draw_up, load_existing_adapter
from models.foundation.weights import build_empty
from utils.dataset.buckets import Bucket, format_table, table
from utils.dataset.collection import Collection
from utils.dataset.encoding import Encoder
from utils.ranks import Ranks
from utils.settings.schema import Settings

GIB = 2**30
OPTIMIZER_STATE: dict[str, Callable[[torch.Tensor], int]] = {
    # Two moments in float32, and a master of what is shorter.
    "adamw": lambda parameter: parameter.numel() * (8 if parameter.itemsize >= 4 else 12),
    "adamw8bit": lambda parameter: parameter.numel() * 2,
    "sgd": lambda parameter: parameter.nbytes,
}
"""Bytes that an optimizer keeps of a parameter."""


def describe(settings: Settings, ranks: Ranks, pipeline: BasePipeline, collections: Sequence[Collection]) -> str:
    """The plan as text.

    Raises:
        SettingsError: the settings do not fit the model or its files.
    """
    blueprint = check_model(settings, pipeline)
    encoders = pipeline.encoders_for(any(collection.has_controls for collection in collections))
    parameters = list(blueprint.denoiser.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    micro, accumulation = settings.micro_batch_size_per_gpu, settings.gradient_accumulation_steps
    lines = table(collections[0].samples, micro, ranks.data_ranks, accumulation)
    steps = lines[-1].batches // accumulation
    epochs = settings.epochs or (math.inf if settings.max_steps else 1)
    total = min(settings.max_steps or math.inf, epochs * steps)
    facts = {
        "model": f"{settings.model.type}, {settings.adapter.type if settings.adapter else 'full fine-tune'}",
        "processes": f"{ranks.world_size} = {ranks.stages} stages x {ranks.data_ranks} data ranks",
        "global batch": f"{micro * accumulation * ranks.data_ranks} = {micro} per micro-batch x {accumulation} "
        f"accumulated x {ranks.data_ranks} data ranks",
        "steps": f"{steps} per epoch, {total} in all",
        "parameters": f"{sum(p.numel() for p in parameters):,} in all, {trained:,} trained",
    }
    sections = [
        "\n".join(f"{name + ':':<14}{value}" for name, value in facts.items()),
        format_table(lines),
        *(f"evaluation '{c.source.name}': {len(c.samples)} samples" for c in collections[1:]),
        _memory(settings, pipeline, blueprint, encoders, [line.bucket for line in lines if line.bucket]),
        _cache_size(encoders, collections),
    ]
    return "\n\n".join(sections)


def check_model(settings: Settings, pipeline: BasePipeline) -> Blueprint:
    """The denoiser without weights, adapted and cut as the settings ask, once all of the model's files are seen to fit:
    hours of encoding are not to end in a mistake that could be told before them.

    Raises:
        SettingsError: the settings do not fit the model or its files.
    """
    pipeline.check()
    empty = build_empty(pipeline.build_denoiser)
    pipeline.set_types(empty)
    pipeline.open_weights(empty)
    blueprint = draw_up(pipeline, settings, empty)
    load_existing_adapter(pipeline, settings, blueprint, layers=[])
    if settings.sampling.prompts:
        sample_bucket(pipeline, settings.sampling)
    return blueprint


def _cache_size(encoders: Sequence[Encoder], collections: Sequence[Collection]) -> str:
    samples = [sample for collection in collections for sample in collection.samples if sample.repeat == 0]
    captions = {sample.caption: sample for sample in samples}.values()
    size = sum(
        math.prod(shape) * dtype.itemsize
        for encoder in encoders
        for sample in (captions if encoder.reads == ("caption",) else samples)
        for shape, dtype in encoder.feature_shapes(sample.bucket).values()
    )
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
    rows = []
    for stage, (start, stop) in enumerate(blueprint.bounds):
        layers = blueprint.stage_layers(stage)
        weights, state = held_bytes(layers, settings.optimizer.type)
        in_flight = min(settings.gradient_accumulation_steps, len(blueprint.bounds) - stage)
        activations = in_flight * sum(kept[start:stop])
        rows.append(
            f"  stage {stage} (layers {start} to {stop - 1}): {(weights + state + activations) / GIB:.2f} GiB = "
            f"weights {weights / GIB:.2f} + gradients and optimizer {state / GIB:.2f} + "
            f"activations {activations / GIB:.2f}"
        )
    return "\n".join([f"{title}:", *rows])


def held_bytes(layers: Sequence[nn.Module], optimizer: str) -> tuple[int, int]:
    """Bytes of the weights of some layers, and of their gradients and optimizer state together."""
    held = {id(p): p for layer in layers for p in layer.parameters()}.values()
    trained = [p for p in held if p.requires_grad]
    state = sum(parameter.nbytes + OPTIMIZER_STATE[optimizer](parameter) for parameter in trained)
    return sum(p.nbytes for p in held), state


def _activations(
    settings: Settings, pipeline: BasePipeline, blueprint: Blueprint, encoders: Sequence[Encoder], bucket: Bucket
) -> list[int]:
    """Bytes that autograd keeps of each layer for one micro-batch of `bucket`."""
    batch = settings.micro_batch_size_per_gpu
    features = {
        name: torch.zeros((batch, *shape), dtype=dtype)
        for encoder in encoders
        for name, (shape, dtype) in encoder.feature_shapes(bucket).items()
    }
    latent = torch.zeros((batch, *pipeline.latent_shape(bucket.width, bucket.height, bucket.frames)))
    stream = _on_meta(pipeline.prepare_inputs(features, latent, torch.zeros(batch)))
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
