"""Estimates what a stage holds (weights, gradients, optimizer state, activations) without allocating it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from utils.parallel.swap import SwapPlan
from utils.settings.schema import OptimizerSettings, Settings

GIB = 2**30


def estimate(
    settings: Settings,
    pipeline: BasePipeline,
    staged: StagedModel,
    encoders: Sequence[Encoder],
    buckets: Sequence[Bucket],
) -> str:
    """An estimate for each stage, as text. Weights, gradients and optimizer state are counted; for activations the
    micro-batch of the largest bucket runs through the layers on the meta device."""
    largest = max(buckets, key=lambda bucket: bucket.width * bucket.height * bucket.frames)
    title = f"estimated memory per rank, bucket {largest}"
    try:
        counted = _activations(settings, pipeline, staged, encoders, largest)
    except NotImplementedError:
        # Experts that are chosen by the values of a tensor cannot run without values.
        counted, title = [LayerActivations()] * len(staged.layers), f"{title}, without activations"
    averages = settings.ema is not None and settings.ema.device == "gpu"
    rows = []
    for stage, (start, stop) in enumerate(staged.bounds):
        layers = staged.stage_layers(stage)
        weights, state = held_bytes(layers, settings.optimizer, averages=averages)
        swap = SwapPlan.of(layers, staged.swapped[stage])
        weights += swap.ring_bytes - swap.tensor_bytes
        in_flight = min(settings.gradient_accumulation_steps, len(staged.bounds) - stage)
        activations = peak(counted[start:stop], in_flight)
        rows.append(
            f"  stage {stage} (layers {start} to {stop - 1}): {(weights + state + activations) / GIB:.2f} GiB = "
            f"weights {weights / GIB:.2f} + gradients and optimizer {state / GIB:.2f} + "
            f"activations {activations / GIB:.2f}" + _told(swap)
        )
    return "\n".join([f"{title}:", *rows])


def _told(swap: SwapPlan) -> str:
    if not swap.blocks:
        return ""
    return (
        f"; {len(swap.blocks)} swapped blocks share {swap.ring_bytes / GIB:.2f} GiB of the weights, and take "
        f"{swap.host_bytes / GIB:.2f} GiB of the host's memory"
    )


def held_bytes(layers: Sequence[nn.Module], optimizer: OptimizerSettings, *, averages: bool = False) -> tuple[int, int]:
    """The bytes of the weights of some layers, with their buffers, among them the scales of quantised weights; and the
    bytes of their gradients and optimizer state together. With `averages`, the latter include float32 averages of the
    trained parameters (an EMA on the GPU)."""
    held = {id(p): p for layer in layers for p in layer.parameters()}.values()
    trained = [p for p in held if p.requires_grad]
    kept_of = optimizers.find(optimizer.type).state_bytes
    state = sum(parameter.nbytes + kept_of(optimizer, parameter) for parameter in trained)
    state += 4 * sum(parameter.numel() for parameter in trained) if averages else 0
    buffers = {id(b): b for layer in layers for b in layer.buffers()}.values()
    return sum(tensor.nbytes for tensor in (*held, *buffers)), state


def _activations(
    settings: Settings, pipeline: BasePipeline, staged: StagedModel, encoders: Sequence[Encoder], bucket: Bucket
) -> list[LayerActivations]:
    """Of every layer, for one micro-batch of `bucket`."""
    batch = micro_batch_of(settings, bucket)
    # Ones, since zeros would be masks that hide all of the text.
    features = {
        name: torch.ones((batch, *shape), dtype=dtype)
        for encoder in encoders
        for name, (shape, dtype) in encoder.feature_shapes(bucket).items()
    }
    latent = torch.zeros((batch, *pipeline.latent_shape(bucket.width, bucket.height, bucket.frames)))
    stream = _on_meta(pipeline.prepare_inputs({**features, "latents": latent}, latent, torch.zeros(batch)))
    return count(
        staged.layers,
        {start for start, _ in staged.bounds},
        stream,
        [*staged.denoiser.parameters(), *staged.denoiser.buffers()],
        recomputed={
            start + position
            for start, stop in staged.bounds
            for position in recomputed_positions(staged.layers[start:stop], settings.recomputed_every)
        },
        offload=settings.offloads,
    )


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple):
        moved = [_on_meta(part) for part in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
