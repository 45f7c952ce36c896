"""From the command to the first step, for the miniature model, and what the time goes to.

Whole launches with a filled cache: plain python, torchrun and deepspeed, each with one process. The reference is a
python that imports the same libraries and does nothing. Then one start in its parts.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.setting import ROOT, write_run

IMPORTS = "import torch, torch._dynamo, deepspeed, peft, diffusers.models.transformers.transformer_flux, tensorboard"
LAUNCHERS = {
    "python": [sys.executable, "train.py"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "train.py"],
    "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=1", "train.py"],
}


def measure() -> Iterator[str]:
    reference = _seconds([sys.executable, "-c", IMPORTS])[0]
    yield f"imports alone: {reference:.1f} s"
    with tempfile.TemporaryDirectory() as folder:
        config = write_run(Path(folder), pictures=64, max_steps=1)
        _seconds([*LAUNCHERS["python"], "--config", str(config), "--cache_only"])
        for name, command in LAUNCHERS.items():
            whole, output = _seconds([*command, "--config", str(config)])
            ready = float(re.search(r"ready after ([\d.]+) s", output).group(1))
            yield f"{name}: ready after {ready:.1f} s ({ready / reference:.2f} of the imports), whole {whole:.1f} s"
        _, output = _seconds([sys.executable, "-m", "tests.benchmarks.startup", str(config)])
        yield from (line for line in output.splitlines() if re.match(r"\s+[\d.]+ s  ", line))


def parts(config: str) -> Iterator[tuple[str, float]]:
    """The parts of a start in this process, with their seconds."""
    started = time.perf_counter()

    def since() -> float:
        nonlocal started
        started, before = time.perf_counter(), started
        return started - before

    import train
    from utils import ranks as of_run
    from utils.parallel.backend import initialize_deepspeed

    yield "import of train.py and torch", since()
    ranks = of_run.from_environment()
    settings, datasets = train.read_settings(Path(config), ranks.world_size)
    yield "settings", since()
    import models
    from models.assembly import data, preflight, trainer
    from utils.run.checkpoint import ResumeFlags
    from utils.run.in_use import RunLock

    pipeline = models.build(settings.model, settings.seed)
    preflight.check_run(settings, ranks, pipeline)
    yield "import of diffusers, and what is checked before the data", since()
    of_run.connect(ranks)
    sources, stop = data.sources_of(settings, datasets), train.StopRequests()
    scan = data.scan_of(settings, sources, stop.raise_if_stopping)
    cached = data.cached_data(settings, ranks, pipeline, sources, scan, owner=Path(config))
    yield "data and cache, nothing to encode", since()
    initialize_deepspeed()
    yield "import of deepspeed", since()
    built = trainer.build_trainer(settings, ranks, pipeline, cached, stop, Path(config), ResumeFlags(), RunLock())
    yield "weights, engine, optimizer, TensorBoard", since()
    with built.prefetched() as batches:
        built.step(batches)
    yield "first step", since()
    built.parts.metrics.close()
    of_run.disconnect()


def _seconds(command: list[str]) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return time.perf_counter() - started, done.stdout


if __name__ == "__main__":
    for part, seconds in parts(sys.argv[1]):
        sys.stdout.write(f"  {seconds:.1f} s  {part}\n")
