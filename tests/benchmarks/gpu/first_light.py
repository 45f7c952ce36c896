"""Every model type at a tiny size in bfloat16, LoRA and in full: cache, three steps, recomputed or not, evaluation, a
sample, an export, a checkpoint.

Samples are stills where a model makes some, so that PyAV is needed by FramePack alone.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import toml

import models
from tests.benchmarks.setting import MINI_FLUX, ROOT
from tests.models.tiny_folder import tiny

ADAPTERS: dict[str, dict[str, Any] | None] = {"LoRA": {"type": "lora", "rank": 4}, "full": None}
RECOMPUTE = {"LoRA": "offload", "full": "auto"}
STEPS, PICTURES, SECONDS = 3, 8, 110


def measure() -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, MINI_FLUX / "draw.py", "--out", folder / "pictures", "--count", str(PICTURES)]
        subprocess.run([*command, "--seed", "1"], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            running = {pool.submit(_trained, model, folder): model for model in models.available()}
            # As they are done, so that one that hangs hides none.
            yield from ((running[one], one.result()) for one in as_completed(running))


def _trained(model: str, folder: Path) -> str:
    """What came of the runs of a model, which share a process."""
    log = folder / f"{model}.log"
    command = [sys.executable, "-m", __name__, model, str(folder)]
    with log.open("w") as file:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            code = -1
    found = {name: _losses(folder / f"{model} {name}") for name in ADAPTERS}
    good = [name for name, losses in found.items() if len(losses) == STEPS and all(map(math.isfinite, losses))]
    if code or len(good) < len(ADAPTERS):
        sys.stdout.write(f"{model}: exit code {code}\n{log.read_text()[-3000:]}\n")
        return f"FAILED, exit code {code}; trained: {', '.join(good) or 'nothing'}"
    return "; ".join(f"{name} {' '.join(f'{loss:.3f}' for loss in losses)}" for name, losses in found.items())


def _losses(place: Path) -> list[float]:
    lines = [line for path in place.glob("runs/*/metrics.jsonl") for line in path.read_text().splitlines()]
    rows = map(json.loads, lines)
    return [row["value"] for row in rows if row["name"] == "train/loss"]


def _write_run(model: str, adapter: str, data: dict[str, Any], folder: Path) -> Path:
    """The file of a run with a dataset."""
    place = folder / f"{model} {adapter}"
    (place / "model").mkdir(parents=True)
    module = tiny(model)
    module.write_folder(place / "model")
    for name in ("data", "seen"):
        (place / f"{name}.toml").write_text(toml.dumps(data))
    options = module.pipeline(place / "model").options.model_dump(mode="json", exclude_unset=True)
    config = {
        "output_dir": str(place / "runs"),
        "dataset": str(place / "data.toml"),
        "max_steps": STEPS,
        "micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "activation_checkpointing": RECOMPUTE[adapter],
        "eval_datasets": [{"name": "seen", "config": str(place / "seen.toml")}],
        "eval_every_n_steps": STEPS,
        "model": {**options, "dtype": "bfloat16"},
        "optimizer": {"type": "adamw", "lr": 1e-3},
        "sampling": {"prompts": ["a red star"], "steps": 2, "sample_every_n_steps": STEPS, **module.SAMPLING},
    }
    if "frames" in config["sampling"] and not module.pipeline(place / "model").starts_from_picture:
        config["sampling"]["frames"] = 1
    if ADAPTERS[adapter]:
        config["adapter"] = ADAPTERS[adapter]
    (place / "run.toml").write_text(toml.dumps(config))
    return place / "run.toml"


def _main(model: str, folder: Path) -> int:
    import train

    data = {"resolutions": [64], "directory": [{"path": str(folder / "pictures")}]}
    data |= getattr(tiny(model), "dataset_of", lambda pictures: {})(folder / "pictures")
    return max(train.main(["--config", str(_write_run(model, adapter, data, folder))]) for adapter in ADAPTERS)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], Path(sys.argv[2])))
