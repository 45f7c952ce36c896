"""Teaches the miniature Flux a shape that it has never seen, the star, and shows what changed.

    python examples/quickstart/run.py

It draws stars to train on and others to measure with, trains a LoRA by `deepspeed train.py`, and puts the
pictures from before and after training side by side. Everything is written under runs/quickstart.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "quickstart"
CONFIG = ROOT / "examples" / "quickstart" / "lora.toml"

ENLARGEMENT = 3
LABEL_WIDTH, LABEL_HEIGHT, GAP = 70, 44, 8


class StepFailed(Exception):
    """A step of the quickstart ended with `code`."""

    def __init__(self, step: str, code: int) -> None:
        super().__init__(f"quickstart: {step} failed with exit code {code}")
        self.code = code


def run_step(step: str, *command: str | Path) -> None:
    """Runs a command in the project's folder, its output going where ours goes."""
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The trainer got the same Ctrl-C: it stops its ranks by itself, and killing it would orphan them.
            code = process.wait() or 130
    if code != 0:
        raise StepFailed(step, code if code > 0 else 128 - code)


def draw_stars(folder: str, count: int, seed: int) -> None:
    command = [sys.executable, "examples/mini_flux/draw.py", "--out", RUNS / folder, "--shapes", "star"]
    run_step(f"drawing {folder}", *command, "--count", str(count), "--seed", str(seed))


def train() -> None:
    """Trains in two processes, one for each pipeline stage, on GPUs or on the CPU; a lone GPU takes both."""
    config, processes = CONFIG, 2
    if torch.cuda.device_count() == 1:
        config, processes = RUNS / "one_gpu.toml", 1
        text = CONFIG.read_text(encoding="utf-8")
        config.write_text(text.replace("pipeline_stages = 2", "pipeline_stages = 1"), encoding="utf-8")
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    run_step(
        "training",
        shutil.which("deepspeed", path=beside) or "deepspeed",
        f"--num_gpus={processes}",
        "train.py",
        "--config",
        config,
    )


def newest_run(runs: Path) -> Path:
    """The latest run folder: they are named by date and time."""
    return max(path.parent for path in runs.glob("*/metrics.jsonl"))


def newest_adapter(run: Path) -> Path:
    """The last exported adapter of a run."""
    return max(run.glob("*/adapter_model.safetensors"), key=lambda path: path.stat().st_mtime)


def first_and_last(metrics: Path, name: str) -> tuple[float, float]:
    """The first and the last value of the metric `name`."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    rows = sorted((row for row in rows if row["name"] == name), key=lambda row: row["step"])
    return rows[0]["value"], rows[-1]["value"]


def before_and_after(samples: Path) -> list[tuple[str, list[Path]]]:
    """A label and the sampled pictures, in the order of the prompts, for the first and the last step."""
    folders = sorted(samples.glob("step*"))
    return [(label, sorted(folder.glob("*.png"))) for label, folder in (("before", folders[0]), ("after", folders[-1]))]


def picture_of(rows: Sequence[tuple[str, Sequence[Path]]], prompts: Sequence[str]) -> Image.Image:
    """One row of enlarged pictures for each label, one column for each prompt."""
    pictures = [[Image.open(path).convert("RGB") for path in paths] for _, paths in rows]
    width, height = (side * ENLARGEMENT for side in pictures[0][0].size)
    size = LABEL_WIDTH + len(prompts) * (width + GAP), LABEL_HEIGHT + len(rows) * (height + GAP)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    lefts = [LABEL_WIDTH + column * (width + GAP) for column in range(len(prompts))]
    tops = [LABEL_HEIGHT + row * (height + GAP) for row in range(len(rows))]
    for left, prompt in zip(lefts, prompts, strict=True):
        pen.multiline_text((left, 4), textwrap.fill(prompt, width=26), fill="black", font=font)
    for top, (label, _), row in zip(tops, rows, pictures, strict=True):
        pen.text((GAP, top + height // 2), label, fill="black", font=font, anchor="lm")
        for left, picture in zip(lefts, row, strict=True):
            canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
    return canvas


def main() -> None:
    settings = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
    try:
        draw_stars("stars", count=120, seed=1)
        draw_stars("held_out_stars", count=12, seed=2)
        train()
    except StepFailed as failure:
        sys.stderr.write(f"{failure}\n")
        sys.exit(failure.code)

    run = newest_run(RUNS)
    metric = f"{settings['eval_datasets'][0]['name']}/loss"
    before, after = first_and_last(run / "metrics.jsonl", metric)
    picture = run / "before_and_after.png"
    picture_of(before_and_after(run / "samples"), settings["sampling"]["prompts"]).save(picture)
    sys.stdout.write(
        f"lora: {os.path.relpath(newest_adapter(run))}\n"
        f"eval loss: {before:.4f} -> {after:.4f}\n"
        f"picture: {os.path.relpath(picture)}\n"
    )


if __name__ == "__main__":
    main()
