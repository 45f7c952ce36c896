"""How often the host waits for the device in a step: once, for the numbers that are told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad

from optimizers.adamw import AdamW
from optimizers.ema import EMA
from tests.pretended_device import DEVICE, PretendedDevice
from tests.processes import run_ranks
from tests.utils.parallel import toy_flux
from utils.ranks import Ranks
from utils.settings.run_tables import EMASettings

STEPS, ACCUMULATION = 2, 2
WAYS = ((torch.float32, "norm"), (torch.bfloat16, "norm"), (torch.bfloat16, "layer"))
"""Types of the factors, and what is clipped."""


def engine_on(device: PretendedDevice, folder: Path, dtype: torch.dtype, clip_by: str) -> tuple[Any, Any, list]:
    """Of a LoRA with factors of this type, with its model and its trained parameters by name."""
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    initialize_deepspeed()
    flux = toy_flux.pipeline(folder)
    _, layers = toy_flux.denoiser_and_layers(flux, toy_flux.adapter())
    module = DenoiserPipeline(layers, [(0, len(layers))], flux.stream_type, flux.maths.loss, recompute=1)
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    for _, parameter in named:
        parameter.data = parameter.data.to(dtype)
    optimizer = AdamW([parameter for _, parameter in named], 1e-3, (0.9, 0.99), 1e-8, 0.0)
    keys = {"accumulation": ACCUMULATION, "clip_norm": 1.0, "clip_by": clip_by, "float32_gradients": True}
    engine = Engine(module, optimizer, **keys)
    with device:
        module.to(DEVICE)
    engine.device = DEVICE
    return engine, flux, named


def waits_of_steps(ranks: Ranks, folder: Path) -> dict[tuple, list[list[str]]]:
    """Job of a rank: what the steps wait for, by type of the factors, what is clipped, and place of the averages."""
    device, found = PretendedDevice(toy_flux.MICRO_BATCH), {}
    by_type = clip_grad._group_tensors_by_device_and_dtype
    clip_grad._group_tensors_by_device_and_dtype = lambda tensors: {
        (DEVICE, dtype): group for (_, dtype), group in by_type(tensors).items()
    }
    torch.cuda.synchronize = lambda device_: device.waits.append("synchronize")
    for dtype, clip_by in WAYS:
        engine, flux, named = engine_on(device, folder, dtype, clip_by)
        for place in ("gpu", "cpu"):
            with device:
                ema = EMA(named, EMASettings(decay=0.9, device=place), engine.basic_optimizer)
                found[dtype, clip_by, place] = [waits_of_step(device, engine, flux, ema, step) for step in range(STEPS)]
    assert not device.faults, device.faults
    return found


def waits_of_step(device: PretendedDevice, engine: Any, flux: Any, ema: EMA, step: int) -> list[str]:
    device.waits.clear()
    batches = [toy_flux.micro_batch(flux, step, 0, index) for index in range(ACCUMULATION)]
    result = engine.train_step(batches, step)
    ema.update(step + 1)
    assert result.loss > 0 and result.grad_norm > 0
    return list(device.waits)


def test_a_step_waits_once(tmp_path: Path) -> None:
    (found,) = run_ranks(waits_of_steps, 1, toy_flux.write_folder(tmp_path))
    assert len(found) == 2 * len(WAYS)
    for (_, _, place), steps in found.items():
        for waits in steps:
            # For averages on the CPU once more.
            copied = ["synchronize"] if place == "cpu" else []
            assert [wait.split()[0] for wait in waits] == ["tolist", *copied], waits
