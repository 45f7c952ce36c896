"""Block swap: seconds and memory of a micro-batch by the number of swapped blocks.

On a GPU: a Flux of full width with a third of its blocks, a LoRA of rank 16, one picture of 1024 x 1024, recomputed;
copies are hidden if the seconds stay the same. Without a GPU the same at tiny size, which only shows that it runs.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.flux import FluxOptions, FluxPipeline
from tests.utils.parallel import toy_flux
from utils.adapters.attach import attach, initialise
from utils.adapters.lora import LoraSettings
from utils.parallel.recompute import run_layer
from utils.parallel.swap import BlockSwap, SwapPlan, swappable

GIB = 2**30
REPETITIONS = 3
LARGE = {
    "in_channels": 64,
    "num_layers": 6,
    "num_single_layers": 13,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}
SMALL = {"num_layers": 2, "num_single_layers": 4}
LATENT = {"cuda": (1, 16, 128, 128), "cpu": (1, 4, 4, 6)}
TOKENS = {"cuda": 512, "cpu": 5}


def measure() -> Iterator[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        for recompute in (True, False):
            for share in (0.0, 0.5, 1.0):
                flux, layers = layers_of(Path(folder), device)
                yield timed(flux, layers, device, round(share * len(swappable(layers))), recompute)


def layers_of(folder: Path, device: torch.device) -> tuple[FluxPipeline, list[nn.Module]]:
    """A Flux with random weights on the CPU, and a LoRA."""
    config = {**toy_flux.CONFIG, **(LARGE if device.type == "cuda" else SMALL)}
    (folder / "transformer").mkdir(exist_ok=True)
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **config}))
    flux = FluxPipeline(FluxOptions(type="flux", dtype="bfloat16", diffusers_path=folder), seed=0)
    torch.manual_seed(0)
    denoiser, adapter = flux.weights.build_empty(), LoraSettings(type="lora", rank=16)
    attach(denoiser, flux.blocks, adapter)
    layers = flux.to_layers(denoiser)
    initialise(denoiser, layers, adapter, seed=0)
    for module in denoiser.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = torch.randn(parameter.shape, device=device, dtype=parameter.dtype) * 0.02
                setattr(module, name, nn.Parameter(values.cpu(), requires_grad=False))
    return flux, layers


def timed(flux: FluxPipeline, layers: list[nn.Module], device: torch.device, count: int, recompute: bool) -> str:
    """Trains some micro-batches with `count` blocks swapped; what they took, as text."""
    plan = SwapPlan.of(layers, count)
    swap = BlockSwap(layers, count, pinned=device.type == "cuda")
    for layer in layers:
        layer.to(device)
    swap.start(device)
    inputs = inputs_of(flux, layers, device)
    if device.type == "cuda":
        gc.collect()  # the layers of the run before
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 + REPETITIONS):
        begin = time.perf_counter()
        loss = run_layers(layers, swap, inputs, recompute).float().square().mean()
        loss.backward()
        number = loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
    return (
        f"{'recomputed' if recompute else 'kept'}, {count} of {len(swappable(layers))} blocks swapped: "
        f"{min(seconds[1:]):.3f} s, peak {peak:.2f} GiB, {plan.host_bytes / GIB:.2f} GiB on the host, "
        f"{plan.ring_bytes / GIB:.2f} GiB of buffers; loss {number:.6f}"
    )


def inputs_of(flux: FluxPipeline, layers: list[nn.Module], device: torch.device) -> Any:
    """A micro-batch of one sample on the device."""
    config = flux.parts.denoiser_config
    draw = torch.Generator().manual_seed(0)
    features = {
        "t5": torch.randn(1, TOKENS[device.type], config["joint_attention_dim"], generator=draw).bfloat16(),
        "clip_pooled": torch.randn(1, config["pooled_projection_dim"], generator=draw).bfloat16(),
    }
    stream = flux.prepare_inputs(features, torch.randn(LATENT[device.type], generator=draw), torch.tensor([0.5]))
    return type(stream)(*(field if field is None else field.to(device) for field in stream))


def run_layers(layers: list[nn.Module], swap: BlockSwap, stream: Any, recompute: bool) -> torch.Tensor:
    """The layers in a row, as a stage of the pipeline runs them."""
    with swap.forward_pass():
        for position, layer in enumerate(layers):
            again = recompute and getattr(layer, "recomputable", False)
            run = partial(run_layer, stream=stream, recompute=again, draws_random_numbers=False)
            stream = swap.run(position, layer, run, recomputed=again)
    return stream
