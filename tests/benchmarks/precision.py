"""Evaluation losses of the miniature Flux with its blocks in every precision, before and after a LoRA is trained on it.

Real runs: `known` are pictures of the shapes that the model was trained on, `stars` are of the shape that the LoRA
learns. The first evaluation, before the first step, is that of the base alone. The same pictures, noise and first
factors in every run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import toml

from tests.benchmarks.setting import MINI_FLUX, ROOT, write_run

STEPS, PICTURES = 60, 48
PRECISIONS = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2", "nf4")


def measure() -> Iterator[str]:
    yield f"blocks         known before    stars before    stars after {STEPS} steps"
    with tempfile.TemporaryDirectory() as name:
        folder, reference = Path(name), None
        sets = [_set(folder, "known", 7), _set(folder, "stars", 8, "--shapes", "star")]
        training = _set(folder, "training", 9, "--shapes", "star")["config"]
        for precision in PRECISIONS:
            losses = _losses(folder / precision, precision, sets, training)
            reference = reference or losses
            changes = [
                f"{one:.5f} {100 * (one / other - 1):+.2f}%" for one, other in zip(losses, reference, strict=True)
            ]
            yield f"{precision:14} {'  '.join(changes)}"


def _set(folder: Path, name: str, seed: int, *shapes: str) -> dict[str, str]:
    """An entry of `eval_datasets`, whose pictures are drawn into `folder`."""
    drawn = folder / name
    command = [sys.executable, MINI_FLUX / "draw.py", "--out", drawn, "--count", str(PICTURES), "--seed", str(seed)]
    subprocess.run([*command, *shapes], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    config = folder / f"{name}.toml"
    config.write_text(toml.dumps({"resolutions": [64], "directory": [{"path": str(drawn)}]}))
    return {"name": name, "config": str(config)}


def _losses(folder: Path, precision: str, sets: list[dict[str, str]], training: str) -> list[float]:
    """Of both sets at the first step, and of the second at the last."""
    folder.mkdir()
    config = write_run(
        folder,
        pictures=1,
        dataset=training,
        max_steps=STEPS,
        micro_batch_size_per_gpu=16,
        eval_datasets=sets,
        eval_every_n_steps=STEPS,
        eval_micro_batch_size_per_gpu=32,
        adapter={"type": "lora", "rank": 16},
        optimizer={"type": "adamw", "lr": 1e-3, "weight_decay": 0.0},
        model={
            "type": "flux",
            "dtype": "float32",
            "transformer_dtype": precision,
            "diffusers_path": str(MINI_FLUX),
            "max_sequence_length": 16,
        },
    )
    subprocess.run([sys.executable, "train.py", "--config", config], check=True, cwd=ROOT, capture_output=True)
    (metrics,) = folder.glob("runs/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = {(row["name"], row["step"]): row["value"] for row in rows}
    return [found["known/loss", 0], found["stars/loss", 0], found["stars/loss", STEPS]]
