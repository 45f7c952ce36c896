"""A small real run that benchmarks time: the miniature Flux on drawn pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import toml

ROOT = Path(__file__).parents[2]
MINI_FLUX = ROOT / "examples" / "mini_flux"


def write_run(folder: Path, pictures: int = 256, **keys: Any) -> Path:
    """Draws pictures into `folder` and writes the TOML of a full fine-tune of the miniature Flux on them."""
    drawn = folder / "pictures"
    command = [sys.executable, MINI_FLUX / "draw.py", "--out", drawn, "--count", str(pictures), "--seed", "1"]
    subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    (folder / "data.toml").write_text(toml.dumps({"resolutions": [64], "directory": [{"path": str(drawn)}]}))
    config = {
        "output_dir": str(folder / "runs"),
        "dataset": str(folder / "data.toml"),
        "epochs": 1000,
        "micro_batch_size_per_gpu": 32,
        "caching_batch_size": 32,
        "model": {"type": "flux", "dtype": "float32", "diffusers_path": str(MINI_FLUX), "max_sequence_length": 16},
        "optimizer": {"type": "adamw", "lr": 1e-4, "weight_decay": 0.0},
        "monitoring": {"enable_tensorboard": True},
        **keys,
    }
    path = folder / "run.toml"
    path.write_text(toml.dumps(config))
    return path
