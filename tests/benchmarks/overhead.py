"""A training step of the trainer at one stage against a bare PyTorch loop.

Both train the same diffusers module in full, with the same optimizer on batches of the same shape; the trainer also
reads the cache, draws noise and timesteps, and writes its metrics. Blocks of steps alternate, so that whatever else the
machine does meets both; the ratio is that of the medians.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import models
import train
from models.assembly.data import cached_data, scan_of, sources_of
from models.assembly.trainer import build_trainer
from tests.benchmarks.setting import MINI_FLUX, write_run
from utils.parallel.backend import initialize_deepspeed
from utils.ranks import connect, disconnect, from_environment
from utils.run.checkpoint import ResumeFlags
from utils.run.in_use import RunLock
from utils.run.signals import StopRequests
from utils.run.trainer import Trainer

BLOCKS, STEPS = 12, 10
LIMIT = 1.05


def measure() -> Iterator[str]:
    # One core computes and another is free to read ahead, as beside a GPU.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = built_trainer(Path(folder))
        bare = bare_step(trainer)
        times: dict[str, list[float]] = {"trainer": [], "bare": []}
        with trainer.prefetched() as batches:
            for _ in range(BLOCKS + 1):
                times["trainer"].append(_block(lambda: trainer_step(trainer, batches)))
                times["bare"].append(_block(bare))
        trainer.parts.metrics.close()
        disconnect()
    medians = {name: statistics.median(values[1:]) / STEPS for name, values in times.items()}
    ratio = medians["trainer"] / medians["bare"]
    yield f"bare loop {1000 * medians['bare']:.1f} ms, trainer {1000 * medians['trainer']:.1f} ms a step"
    yield f"ratio {ratio:.3f} (limit {LIMIT:.2f}): {'ok' if ratio <= LIMIT else 'TOO SLOW'}"


def built_trainer(folder: Path, **keys: Any) -> Trainer:
    """The trainer of a run; `keys` are those of `write_run`."""
    config, ranks = write_run(folder, **keys), from_environment()
    settings, datasets = train.read_settings(config, ranks.world_size)
    pipeline = models.build(settings.model, settings.seed)
    connect(ranks)
    sources, stop = sources_of(settings, datasets), StopRequests()
    scan = scan_of(settings, sources, stop.raise_if_stopping)
    data = cached_data(settings, ranks, pipeline, sources, scan, owner=config)
    initialize_deepspeed()
    return build_trainer(settings, ranks, pipeline, data, stop, config, ResumeFlags(), RunLock())


def trainer_step(trainer: Trainer, batches: Iterator[Any]) -> None:
    done, values = trainer.step(batches)
    trainer.parts.metrics.scalars(values, done.step)
    trainer.progress = done.next_epoch() if trainer.ends_epoch(done) else done


def bare_step(trainer: Trainer) -> Any:
    """One step of a loop that does nothing but train: its batch lies ready."""
    device = trainer.parts.ranks.device
    model = FluxTransformer2DModel.from_pretrained(MINI_FLUX, subfolder="transformer", torch_dtype=torch.float32)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    ((inputs, labels, _),) = trainer.batches.step(0, 0)
    text_length = inputs.text_BLD.shape[1]
    arguments = {
        "hidden_states": inputs.x_BTC,
        "encoder_hidden_states": inputs.text_BLD,
        "pooled_projections": inputs.pooled_BD,
        "timestep": inputs.t_B,
        "txt_ids": inputs.positions_S3[:text_length],
        "img_ids": inputs.positions_S3[text_length:],
    }
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    target = torch.randn_like(arguments["hidden_states"])

    def step() -> None:
        prediction = model(**arguments, return_dict=False)[0]
        torch.nn.functional.mse_loss(prediction, target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _block(step: Any) -> float:
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
