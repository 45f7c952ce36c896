"""Small real runs of the miniature Flux: their files, their launch, and what they left."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import toml
import torch
from safetensors.torch import load_file, save_file

from tests.processes import run_command

ROOT = Path(__file__).parents[1]
MINI_FLUX = ROOT / "examples" / "mini_flux"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCKS = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}
"""Key of the transformer's configuration -> the list of blocks that it counts."""
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple")


def write_short_flux(folder: Path) -> Path:
    """The miniature Flux with half of its blocks, for what holds for any number of them."""
    for part in MINI_FLUX.iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    own, whole = folder / "transformer", MINI_FLUX / "transformer"
    own.mkdir()
    config = json.loads((whole / "config.json").read_text())
    left = {count: config[count] // 2 for count in BLOCKS}
    (own / "config.json").write_text(json.dumps({**config, **left}))
    beginnings = tuple(f"{BLOCKS[count]}.{number}." for count in BLOCKS for number in range(left[count], config[count]))
    weights = load_file(whole / WEIGHTS)
    save_file({name: tensor for name, tensor in weights.items() if not name.startswith(beginnings)}, own / WEIGHTS)
    return folder


def config_writer(tmp_path: Path, pictures: Path, flux: Path) -> Callable[..., Path]:
    """Writes a run's TOML; keys given as `section__key` change one key, None leaves it out."""

    def write(directory: Path = pictures, data: Mapping[str, Any] | None = None, **changes: Any) -> Path:
        dataset = {
            "resolutions": [64],
            "enable_ar_bucket": True,
            "directory": [{"path": str(directory)}],
            **(data or {}),
        }
        (tmp_path / "data.toml").write_text(toml.dumps(dataset))
        config: dict[str, Any] = {
            "output_dir": str(tmp_path / "runs"),
            "dataset": str(tmp_path / "data.toml"),
            "max_steps": 6,
            "micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "warmup_steps": 2,
            "lr_scheduler": "cosine",
            "checkpoint_every_n_steps": 3,
            "model": {"type": "flux", "dtype": "float32", "diffusers_path": str(flux), "max_sequence_length": 16},
            "adapter": {"type": "lora", "rank": 4, "dropout": 0.2},
            "optimizer": {"type": "adamw", "lr": 1e-2},
        }
        for name, value in changes.items():
            table, _, key = name.rpartition("__")
            place = config.setdefault(table, {}) if table else config
            place[key] = value
            if value is None:
                del place[key]
        (tmp_path / "run.toml").write_text(toml.dumps(config))
        return tmp_path / "run.toml"

    return write


def launch(
    config: Path | list[Path],
    *words: str,
    processes: int = 1,
    stop_after: str | None = None,
    ends_others: bool = False,
    taken: socket.socket | None = None,
    receives: int = signal.SIGTERM,
    prepare: Callable[[int], None] | None = None,
) -> tuple[list[int], str]:
    configs = config if isinstance(config, list) else [config]
    log = configs[0].parent / "log.txt"
    log.unlink(missing_ok=True)
    words = ["--config", *map(str, configs), *words]
    how = {"ends_others": ends_others, "taken": taken, "receives": receives, "prepare": prepare}
    codes = run_command(words, processes, log, stop_after, **how)
    return codes, log.read_text()


def only_run(config: Path) -> Path:
    (run,) = [p for p in (config.parent / "runs").iterdir() if re.match(r"\d{8}_", p.name)]
    return run


def metrics(run: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["value"] for line in lines if line["name"] == name}


def newest_export(run: Path) -> dict[str, torch.Tensor]:
    (export,) = [p for p in run.iterdir() if re.match(r"(step|epoch)\d+$", p.name)]
    return load_file(export / "adapter_model.safetensors")


def rewind(run: Path) -> None:
    """Makes a run of six steps look as if it had been stopped after its checkpoint at step 3."""
    for leftover in (run / "global_step6", *run.glob("epoch*"), *run.glob("step*")):
        shutil.rmtree(leftover)
    (run / "latest").write_text("global_step3")
