"""Training steps at full size, batch 1: seconds, memory against the plan, share of the card's matrix rate. LoRA of rank
32 of Flux and Wan 14B, and Wan 1.3B in full; and the same work in a plain loop over diffusers and PEFT.

The weights are random: the work is the same as with real ones.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.gpu.environment import matrix_rate
from tests.benchmarks.gpu.timing import GIB, median_seconds
from tests.models.sized import FullSize

RANK, STEPS, TOKENS = 32, 3, 512
CASES: dict[str, dict[str, Any]] = {
    "Flux, recompute": {"activation_checkpointing": True},
    "Wan 1.3B in full, recompute, all 30 blocks swapped": {
        "of": "WAN_SMALL",
        "in_full": True,
        "activation_checkpointing": True,
        "blocks_to_swap": 30,
    },
    "Wan 1.3B in full, recompute, offload_optimizer": {
        "of": "WAN_SMALL",
        "in_full": True,
        "activation_checkpointing": True,
        "offload_optimizer": True,
    },
    "Flux, recompute, 30 of 57 blocks swapped": {"activation_checkpointing": True, "blocks_to_swap": 30},
    "Flux": {},
    "Flux, recompute, compiled": {"activation_checkpointing": True, "compile": True},
    "Flux, recompute with offload": {"activation_checkpointing": "offload"},
    "Flux, recompute, all 57 blocks swapped": {"activation_checkpointing": True, "blocks_to_swap": 57},
    "Flux, recompute, float8": {"activation_checkpointing": True, "model": {"transformer_dtype": "float8"}},
    "Flux, recompute, nf4": {"activation_checkpointing": True, "model": {"transformer_dtype": "nf4"}},
    "Flux, recompute, plain loop of diffusers and PEFT": {"plain": True},
    "Wan 14B, recompute": {"of": "WAN", "activation_checkpointing": True},
    "Wan 14B, recompute with offload": {"of": "WAN", "activation_checkpointing": "offload"},
}
"""Name -> settings that differ, those of [model] in `model`; `of` is the model in tests/models/full_size.py, Flux if it
is missing; `in_full` is without an adapter; `plain` is the loop. What has never been measured comes early, since the
time may be over before the last."""
SECONDS = 100
"""For one case; compiling may take all of it."""


def measure() -> Iterator[tuple[str, str]]:
    rate, operations = matrix_rate(), {}
    # All import at once what they need, and then begin one after the other.
    workers = {name: _worker(keys) for name, keys in CASES.items()}
    for name, worker in workers.items():
        try:
            said, complaints = worker.communicate("go\n", timeout=SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            yield name, f"FAILED, took more than {SECONDS} s"
            continue
        lines = said.strip().splitlines()
        if worker.returncode or not lines:
            sys.stdout.write(complaints[-3000:] + "\n")
            errors = [line for line in complaints.splitlines() if "Error" in line]
            yield name, f"FAILED, {errors[-1] if errors else worker.returncode}"
            continue
        found = json.loads(lines[-1])
        # What is compiled cannot be counted, and does the same.
        plain = json.dumps({key: value for key, value in CASES[name].items() if key != "compile"})
        operations.setdefault(plain, found["operations"])
        yield name, _told({**found, "operations": operations[plain]}, rate)


def _worker(keys: dict[str, Any]) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", __name__, json.dumps(keys)], text=True, **pipes)


def _told(found: dict[str, Any], rate: float) -> str:
    share = found["operations"] / found["seconds"] / rate
    planned = f", planned {found['planned']:.1f}" if found["planned"] else ""
    return (
        f"{found['seconds']:.3f} s a step, {found['operations'] / found['seconds'] / 1e12:.0f} TFLOP/s ({share:.2f} of "
        f"the matrix rate), peak {found['peak']:.1f} GiB{planned}, loss {found['loss']:.3f}; first "
        f"step {found['first']:.1f} s"
    )


def _measured(step: Callable[[], float], planned: float, *, counts: bool = True) -> dict[str, Any]:
    """The time and the memory of a step; with `counts` its operations, too."""
    began = time.perf_counter()
    loss = step()
    first = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(step, runs=STEPS, warm_up=1)
    peak = torch.cuda.max_memory_allocated() / GIB
    counter = FlopCounterMode(display=False)
    if counts:
        with counter:
            step()
    return {
        "seconds": seconds,
        "peak": peak,
        "planned": planned,
        "operations": counter.get_total_flops(),
        "loss": loss,
        "first": first,
    }


def trained(model: FullSize, folder: Path, keys: dict[str, Any]) -> tuple[Callable[[], float], float]:
    """A step of the trainer's engine, on a stage that is loaded as in a run, which gives its loss; and the GiB that are
    planned for it."""
    from models.assembly import memory, trainer
    from models.assembly.placement import shares_of
    from models.assembly.rates import Rates
    from models.assembly.stage import load_stage, partition
    from optimizers import build
    from optimizers.adamw import AdamWSettings
    from optimizers.parameter_groups import groups_of
    from tests.benchmarks.gpu.random_models import micro_batch, random_pipeline
    from utils.adapters.lora import LoraSettings
    from utils.parallel.attention import set_kernels
    from utils.parallel.backend import initialize_deepspeed
    from utils.ranks import connect, from_environment
    from utils.settings.schema import Settings

    ranks = from_environment()
    connect(ranks)
    set_kernels()
    initialize_deepspeed()
    pipeline = random_pipeline(model, folder, **keys.pop("model", {}))
    settings = Settings(
        output_dir=folder,
        dataset=folder,
        model=pipeline.options,
        adapter=None if keys.pop("in_full", False) else LoraSettings(type="lora", rank=RANK),
        optimizer=AdamWSettings(type="adamw", lr=1e-4),
        **keys,
    )
    empty = partition(pipeline, settings, pipeline.weights.build_empty())
    planner = memory.Planner(settings, pipeline, empty, model.encoders, {model.bucket: 1})
    planned = planner.plans(settings, planner.swapped(settings))[0].total / GIB
    staged = load_stage(pipeline, settings, 0)
    shares = shares_of(settings, ranks, staged, staged.trained(staged.layers))
    rates = Rates(settings, pipeline, staged.denoiser)
    how = {"lr": settings.optimizer.lr, "weight_decay": settings.optimizer.weight_decay}
    groups = groups_of(shares.stepped.items(), **how, own_lr=rates.lr, own_decay=rates.weight_decay)
    engine = trainer._engine(settings, ranks, pipeline, staged, build(groups, settings.optimizer), shares)
    batch = micro_batch(model, pipeline)
    return lambda: engine.train_step([batch], 0).loss, planned


def _plain() -> dict[str, Any]:
    """The same of Flux with nothing but diffusers, PEFT and torch: what their examples do."""
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig
    from torch.nn.functional import mse_loss

    from models.flux import FluxPipeline, grid_positions
    from tests.benchmarks.gpu.random_models import drawn

    # As in the trainer; with cuDNN's kernels Flux's gradients are wrong here.
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    model.to_empty(device="cuda").to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(drawn(parameter.shape))
    model.requires_grad_(False)
    blocks = "|".join(FluxPipeline.blocks)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and re.match(rf"({blocks})\.", name)
    ]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules="|".join(map(re.escape, names))))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    bfloat16 = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = {
        "hidden_states": torch.randn(1, 4096, 64, **bfloat16),
        "encoder_hidden_states": torch.randn(1, TOKENS, 4096, **bfloat16),
        "pooled_projections": torch.randn(1, 768, **bfloat16),
        "timestep": torch.full((1,), 0.5, device="cuda"),
        "guidance": torch.ones(1, device="cuda"),
        "txt_ids": torch.zeros(TOKENS, 3, device="cuda"),
        "img_ids": grid_positions(128, 128, image=0).cuda(),
    }
    target = torch.randn(1, 4096, 64, device="cuda")

    def step() -> float:
        loss = mse_loss(model(**inputs, return_dict=False)[0].float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return _measured(step, 0.0)


def _main(keys: dict[str, Any]) -> None:
    # As in a run.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    import diffusers  # noqa: F401
    import peft  # noqa: F401

    import models.assembly.trainer  # noqa: F401
    from tests.models import full_size

    if not sys.stdin.readline():
        # Whoever would read what is found is gone.
        return
    with tempfile.TemporaryDirectory() as folder:
        if keys.pop("plain", False):
            found = _plain()
        else:
            model = getattr(full_size, keys.pop("of", "FLUX"))
            counts = not keys.get("compile")
            found = _measured(*trained(model, Path(folder), keys), counts=counts)
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
