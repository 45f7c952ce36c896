"""Mistakes of the user's, told in one screen before anything is loaded."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs import (
    MINI_FLUX,
    config_writer,
    launch,
    only_run,
)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"adapter__alpha": 8.0}, r"\[adapter\] alpha = 8.0 \(checkpoint: not set\)"),
        ({"seed": 5}, r"seed = 5 \(checkpoint: 0\)"),
        ({"optimizer__lr": 1e-3}, "pass --reset_optimizer_params"),
    ],
)
def test_resuming_as_another_run_is_refused(
    stopped: tuple[Path, dict[str, Any]], write_config: Callable[..., Path], changes: dict[str, Any], told: str
) -> None:
    run, keys = stopped
    codes, log = launch(write_config(**keys, **changes), "--resume_from_checkpoint", str(run))
    assert codes == [1]
    assert re.search(told, log), log


@pytest.fixture(scope="module")
def stopped(pictures: Path, short_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with a checkpoint, and the keys that it was made with."""
    folder = tmp_path_factory.mktemp("stopped")
    keys: dict[str, Any] = {"max_steps": 1, "checkpoint_every_n_steps": 1}
    config = config_writer(folder, pictures, short_flux)(**keys)
    assert launch(config)[0] == [0]
    return only_run(config), keys


def test_check_without_a_launcher_plans_one_pipeline(write_config: Callable[..., Path]) -> None:
    codes, log = launch(write_config(pipeline_stages=3), "--check")
    assert codes == [0], log
    assert "3 = 3 stages x 1 data ranks" in log
    assert log.count("stage ") >= 3


def test_a_port_that_is_taken_ends_all_processes_at_once(write_config: Callable[..., Path]) -> None:
    """What holds it takes connections and does not answer: who waits inside of a library for that heeds a launcher."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        codes, log = launch(write_config(), processes=2, ends_others=True, taken=other)
        told = f"the port {other.getsockname()[1]} is taken"
    # Nobody had to kill the second.
    assert codes == [1, -signal.SIGTERM], log
    assert log.count("error:") == 1 and told in log and "Traceback" not in log


MISTAKES: dict[str, tuple[dict[str, Any], list[str], int, str]] = {
    "unknown key": ({"optimizer__learning_rate": 1e-4}, [], 1, r"\[optimizer\].*learning_rate.*\blr\b"),
    "wrong type": ({"epochs": "ten"}, [], 1, r"epochs.*ten"),
    "missing path": ({"dataset": "/nowhere/data.toml"}, [], 1, r"dataset.*/nowhere/data.toml"),
    "stages": ({"pipeline_stages": 2}, [], 1, r"pipeline_stages.*2"),
    "stages of two": ({"pipeline_stages": 3}, [], 2, r"pipeline_stages.*3"),
    "split": (
        {"pipeline_stages": 2, "partition_method": "manual", "partition_split": [1, 2]},
        [],
        2,
        r"partition_split.*\[1, 2\]",
    ),
    "split beyond the layers": (
        {"pipeline_stages": 2, "partition_method": "manual", "partition_split": [50]},
        [],
        2,
        r"partition_split.*5 layers",
    ),
    "no checkpoint": ({}, ["--resume_from_checkpoint"], 2, r"no run with a checkpoint"),
    "no such checkpoint": ({}, ["--resume_from_checkpoint", "/nowhere"], 1, r"no such folder '/nowhere'"),
    "not a lora": (
        {"adapter__init_from_existing": str(MINI_FLUX / "vae" / "diffusion_pytorch_model.safetensors")},
        [],
        2,
        r"no LoRA factors.*",
    ),
    "unknown model": ({"model__type": "fluks"}, [], 1, r"fluks.*flux"),
    "weights of DDPM": ({"model__min_snr_gamma": 5.0}, [], 1, r"run\.toml\n.*\[model\] min_snr_gamma.*flow matching"),
    "noise twice": (
        {"model__noise_offset": 0.1, "model__multires_noise_iterations": 6},
        [],
        1,
        r"run\.toml\n.*\[model\].*noise_offset and multires_noise_iterations both",
    ),
    "no timestep": ({"model__min_t": 0.6, "model__max_t": 0.6}, [], 1, r"run\.toml\n.*\[model\].*min_t and max_t"),
    "negative shift": ({"model__shift": -1.0}, [], 2, r"run\.toml\n.*\[model\] shift.*greater than 0.*-1"),
    "unused": ({"model__huber_c": 0.2}, [], 1, r"run\.toml\n.*\[model\] huber_c.*loss_type"),
    "not a weight": ({"model__weighting_scheme": "mode"}, [], 1, r'\[model\].*timestep_sample_method = "mode"'),
    "no parent's data": (
        {"regularisation_target": "parent"},
        [],
        1,
        r"run\.toml\n.*regularisation_target.*no directory",
    ),
    "nothing to adapt": ({"adapter__include": ["nothing"]}, [], 1, r"\[adapter\].*nothing to adapt"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("check", [False, True], ids=["run", "check"])
def test_a_mistake_is_told_in_one_screen(write_config: Callable[..., Path], mistake: str, check: bool) -> None:
    changes, words, processes, expected = MISTAKES[mistake]
    if check and (words or mistake == "stages"):
        pytest.skip("--check opens no checkpoints, and plans for as many processes as there are stages")
    words = [*words, *(["--check"] if check else [])]
    codes, log = launch(write_config(**changes), *words, processes=processes, ends_others=True)
    assert codes[0] == 1, log
    assert re.search(expected, log, re.DOTALL), log
    assert "Traceback" not in log
    told = log[log.index("error:") :]
    assert len(told.splitlines()) < 30
