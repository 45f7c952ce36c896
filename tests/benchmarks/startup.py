"""From the command to the first step, for the miniature model, and what the time goes to.

Three launches with a filled cache: plain python, torchrun and deepspeed, each on one process. The reference is a python
that imports torch, diffusers' Flux and deepspeed and does nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.setting import ROOT, write_run

IMPORTS = (
    "import torch, deepspeed, peft, diffusers.models.transformers.transformer_flux, transformers.models.t5.modeling_t5"
)
LAUNCHERS = {
    "python": [sys.executable, "train.py"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "train.py"],
    "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=1", "train.py"],
}


def measure() -> Iterator[str]:
    reference = _seconds([sys.executable, "-c", IMPORTS])[0]
    yield f"imports alone: {reference:.1f} s"
    with tempfile.TemporaryDirectory() as folder:
        config = write_run(Path(folder), pictures=64, max_steps=1, steps_per_print=1)
        _seconds([*LAUNCHERS["python"], "--config", str(config), "--cache_only"])
        for name, command in LAUNCHERS.items():
            shutil.rmtree(Path(folder) / "runs" / "none", ignore_errors=True)
            whole, output = _seconds([*command, "--config", str(config)])
            ready = float(re.search(r"ready after ([\d.]+) s", output).group(1))
            yield f"{name}: ready after {ready:.1f} s ({ready / reference:.2f} of the imports), whole {whole:.1f} s"


def _seconds(command: list[str]) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return time.perf_counter() - started, done.stdout + done.stderr
