"""What runs and the files of their exports are called."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from utils.run.export import exports_in, remove_older_exports
from utils.run.file_names import FileNames
from utils.run.folder import new_name, runs_in
from utils.run.tensor_file import write_tensors
from utils.settings.rules import check_rules, remarks_on_run
from utils.settings.schema import Settings

ADAPTER, COMFYUI = "adapter_model.safetensors", "adapter_model_comfyui.safetensors"


def settings_of(**keys: Any) -> Settings:
    return Settings(
        **{
            "output_dir": "runs",
            "dataset": "data.toml",
            "model": {"type": "flux"},
            "optimizer": {"type": "adamw", "lr": 1e-3},
            **keys,
        }
    )


@pytest.mark.parametrize(
    ("keys", "usual", "name"),
    [
        ({}, ADAPTER, ADAPTER),
        ({}, COMFYUI, COMFYUI),
        ({"run_name": "fox"}, ADAPTER, "fox-step000500_ema.safetensors"),
        ({"run_name": "fox"}, COMFYUI, "fox-step000500_ema_comfyui.safetensors"),
        ({"run_name": "fox"}, "model_comfyui.safetensors", "fox-step000500_ema_comfyui.safetensors"),
        ({"run_name": "fox", "file_name": "adapter_model"}, ADAPTER, ADAPTER),
        ({"run_name": "fox", "file_name_comfyui": "{at} of {name}"}, COMFYUI, "step000500_ema of fox.safetensors"),
        ({"file_name_comfyui": "fox {at}"}, COMFYUI, "fox step000500_ema.safetensors"),
        ({"run_name": "fox"}, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
        ({"run_name": "{at}"}, ADAPTER, "{at}-step000500_ema.safetensors"),
    ],
)
def test_names_of_files(keys: dict[str, str], usual: str, name: str) -> None:
    assert FileNames.of(settings_of(**keys)).of_file(usual, "step500_ema") == name


@pytest.mark.parametrize("name", ["", "a/b", "..", ".fox", "fox ", "-fox", "fox.", "a:b", "a\nb", "x" * 101])
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="part of names of files"):
        settings_of(run_name=name)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"file_name": "{name}_{at}"}, "key `file_name`: has '{name}', which is run_name; set that too"),
        ({"file_name": "{step}"}, "key `file_name`: has '{step}'; what is filled in is {name} and {at}"),
        ({"file_name": "a", "file_name_comfyui": "a"}, "key `file_name_comfyui`: is that of the other file"),
        ({"save_n_epoch_ratio": 2}, "key `save_n_epoch_ratio`: is a number of exports over the `epochs`; set that"),
        ({"save_n_epoch_ratio": 2, "epochs": 4, "save_every_n_epochs": 1}, "says what save_every_n_epochs says too"),
    ],
)
def test_names_and_ratios_that_say_nothing_are_refused(keys: dict[str, Any], told: str) -> None:
    problems = [f"{problem.where}: {problem.message}" for problem in check_rules(settings_of(**keys), 1)]
    assert sum(told in problem for problem in problems) == 1, problems


def test_names_that_no_file_gets_are_told() -> None:
    told = {remark.where for remark in remarks_on_run(settings_of(file_name="a", file_name_comfyui="b"))}
    assert told == {"key `file_name`"}
    keys = {"file_name_comfyui": "b", "save_format": "diffusers"}
    assert {remark.where for remark in remarks_on_run(settings_of(**keys))} == {"key `file_name_comfyui`"}


@pytest.mark.parametrize(("ratio", "epochs", "every"), [(1, 10, 10), (3, 10, 3), (10, 10, 1), (20, 10, 1)])
def test_a_ratio_spreads_exports_over_the_epochs(ratio: int, epochs: int, every: int) -> None:
    assert settings_of(save_n_epoch_ratio=ratio, epochs=epochs).export_epochs == every


def test_a_run_has_its_name_and_its_copies_are_none(tmp_path: Path) -> None:
    first = tmp_path / new_name(tmp_path, "red_fox_2")
    first.mkdir()
    assert first.name.endswith("_red_fox_2")
    (first / "settings.toml").write_text('run_name = "red_fox_2"\n')
    for name, own in {
        f"{first.name}_2": "red_fox_2",
        f"{first.name}_old": "red_fox_2",
        "20260101_12-00-00_copy": None,
        "20260101_12-00-01": None,
        "20260101_12-00-01_2": None,
        "20260101_12-00-02_cat": "fox",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.toml").write_text(f'run_name = "{own}"\n' if own else "")
    (tmp_path / "20260101_12-00-03_fox").mkdir()
    runs = {first.name, f"{first.name}_2", "20260101_12-00-01", "20260101_12-00-01_2"}
    assert {run.name for run in runs_in(tmp_path)} == runs


def test_the_exports_of_the_latest_steps_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    steps = {"step10": 10, "step10_ema": 10, "epoch1": 20, "step30": 30, "best": 5, "epoch2_step40": 40}
    for age, (name, step) in enumerate(steps.items()):
        file = tmp_path / name / ADAPTER
        file.parent.mkdir()
        write_tensors(file, {"weight": torch.zeros(1)}, {"step": str(step)})
        # The latest step was exported first, as --export does.
        os.utime(file, (1000 - age, 1000 - age))
    remove_older_exports(tmp_path, 2)
    assert {made.folder.name for made in exports_in(tmp_path)} == {"best", "step30", "epoch2_step40"}
    told = [record.message.rpartition(" ")[2] for record in caplog.records]
    assert told == ["step10_ema", "step10", "epoch1"] or told == ["step10", "step10_ema", "epoch1"]
    remove_older_exports(tmp_path, 5)
    assert len(exports_in(tmp_path)) == 3
