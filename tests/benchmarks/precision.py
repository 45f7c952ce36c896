"""Evaluation losses of the miniature Flux with its blocks, and then its text encoders, in every precision.

With its blocks before and after a LoRA is trained on it; with its text encoders before, and how far the features are
from those in float32.

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
import torch

from models.flux import FluxOptions, FluxPipeline
from tests.benchmarks.setting import MINI_FLUX, ROOT, write_run

STEPS, PICTURES, TEXT_TOKENS = 60, 48, 16
PRECISIONS = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2", "nf4", "int4")


def measure() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = [_set(folder, "known", 7), _set(folder, "stars", 8, "--shapes", "star")]
        training = _set(folder, "training", 9, "--shapes", "star")["config"]
        yield f"blocks         known before    stars before    stars after {STEPS} steps"
        reference = _losses(folder / "reference", sets, training)
        for precision in PRECISIONS:
            yield _line(precision, _losses(folder / precision, sets, training, transformer_dtype=precision), reference)
        yield "text encoders  known before    stars before    distance of CLIP's and T5's features"
        captions = [file.read_text(encoding="utf-8") for file in sorted((folder / "known").glob("*.txt"))]
        whole = _features(captions, "float32")
        for precision in PRECISIONS:
            losses = _losses(folder / f"texts {precision}", sets, training, steps=1, text_encoder_dtype=precision)[:2]
            near = _features(captions, precision)
            distances = [f"{(near[key] - whole[key]).norm() / whole[key].norm():.4f}" for key in whole]
            yield f"{_line(precision, losses, reference[:2])}  {'  '.join(distances)}"


def _line(precision: str, losses: list[float], reference: list[float]) -> str:
    """Losses, and their change."""
    changes = [f"{one:.5f} {100 * (one / other - 1):+.2f}%" for one, other in zip(losses, reference, strict=True)]
    return f"{precision:14} {'  '.join(changes)}"


def _features(captions: list[str], precision: str) -> dict[str, torch.Tensor]:
    """What the text encoders make of the captions, by name, in float32."""
    keys = {"type": "flux", "dtype": "float32", "text_encoder_dtype": precision}
    pipeline = FluxPipeline(FluxOptions(**keys, diffusers_path=MINI_FLUX, max_sequence_length=TEXT_TOKENS))
    features: dict[str, torch.Tensor] = {}
    for encoder in pipeline.encoders()[1:]:
        encoder.load(torch.device("cpu"))
        features |= {name: feature.float() for name, feature in encoder.encode(caption=captions).items()}
    return features


def _set(folder: Path, name: str, seed: int, *shapes: str) -> dict[str, str]:
    """An entry of `eval_datasets`, whose pictures are drawn into `folder`."""
    drawn = folder / name
    command = [sys.executable, MINI_FLUX / "draw.py", "--out", drawn, "--count", str(PICTURES), "--seed", str(seed)]
    subprocess.run([*command, *shapes], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    config = folder / f"{name}.toml"
    config.write_text(toml.dumps({"resolutions": [64], "directory": [{"path": str(drawn)}]}))
    return {"name": name, "config": str(config)}


def _losses(
    folder: Path, sets: list[dict[str, str]], training: str, *, steps: int = STEPS, **model: str
) -> list[float]:
    """Of both sets at the first step, and of the second at the last.

    Args:
        model: further keys of [model].
    """
    folder.mkdir()
    config = write_run(
        folder,
        pictures=1,
        dataset=training,
        max_steps=steps,
        micro_batch_size_per_gpu=16,
        eval_datasets=sets,
        eval_every_n_steps=steps,
        eval_micro_batch_size_per_gpu=32,
        adapter={"type": "lora", "rank": 16},
        optimizer={"type": "adamw", "lr": 1e-3, "weight_decay": 0.0},
        model={
            "type": "flux",
            "dtype": "float32",
            "diffusers_path": str(MINI_FLUX),
            "max_sequence_length": TEXT_TOKENS,
            **model,
        },
    )
    subprocess.run([sys.executable, "train.py", "--config", config], check=True, cwd=ROOT, capture_output=True)
    (metrics,) = folder.glob("runs/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = {(row["name"], row["step"]): row["value"] for row in rows}
    return [found["known/loss", 0], found["stars/loss", 0], found["stars/loss", steps]]
