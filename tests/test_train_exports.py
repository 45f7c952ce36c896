"""Weights for other programs from runs that are over."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import train as train_py
from tests.runs import only_run
from utils.errors import UserError
from utils.ranks import Ranks, disconnect
from utils.run.signals import StopRequests

EMA = {"warmup": "none", "decay": 0.5}


def run(config: Path, *words: str) -> None:
    try:
        arguments = train_py.parse_arguments(["--config", str(config), *words])
        assert train_py.run(arguments, Ranks(), StopRequests(), 0.0)
    finally:
        disconnect()


def files_of(export: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(export)): load_file(path) for path in export.rglob("*.safetensors")}


def assert_same(export: Path, other: Path) -> None:
    ours, theirs = files_of(export), files_of(other)
    assert ours.keys() == theirs.keys() and ours
    for name, tensors in ours.items():
        assert tensors.keys() == theirs[name].keys()
        assert all(torch.equal(tensor, theirs[name][key]) for key, tensor in tensors.items()), name


@pytest.mark.parametrize("adapter", [{"type": "lora", "rank": 4}, None], ids=["lora", "full"])
def test_a_checkpoint_is_exported_as_the_run_would_have(
    write_config: Callable[..., Path], adapter: dict | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The adapter with some weights that are trained in full beside it."""
    keys = {"adapter": adapter, "max_steps": 1, "checkpoint_every_n_steps": 1}
    keys["model__train"] = ["x_embedder", "norm_q"] if adapter else []
    run(write_config(**keys, ema=EMA))
    folder = only_run(write_config(**keys))
    names, before = ("step1", "step1_ema"), folder / "before"
    before.mkdir()
    for name in names:
        shutil.move(folder / name, before)
    # Any number of stages, one process.
    stages = {"pipeline_stages": 2, "stage_weights": [2, 1]}
    run(write_config(**keys, ema=EMA, **stages), "--export", str(folder / "global_step1"))
    for name in names:
        assert_same(folder / name, before / name)
    weights, averages = (files_of(folder / name).popitem()[1] for name in names)
    assert any(not torch.equal(tensor, averages[name]) for name, tensor in weights.items())
    shutil.rmtree(folder / "step1_ema")
    caplog.clear()
    smaller = {"save_dtype": "bfloat16", "save_format": "comfyui"}
    run(write_config(**keys, **smaller), "--export", str(folder))
    assert "the moving averages" in caplog.text and not (folder / "step1_ema").exists()
    # What this does not write stays as it was.
    rewritten, first = files_of(folder / "step1"), files_of(before / "step1")
    for name, tensors in rewritten.items():
        assert (torch.bfloat16 in {tensor.dtype for tensor in tensors.values()}) is ("comfyui" in name)
    assert rewritten.keys() == first.keys()


def test_what_is_no_checkpoint_of_this_config_is_not_exported(write_config: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="--export: no such folder '/nowhere'"):
        run(write_config(), "--export", "/nowhere")


def test_a_finished_run_exports_what_is_lacking(
    write_config: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    keys = {"max_steps": 2, "checkpoint_every_n_steps": 2, "save_format": "diffusers"}
    config = write_config(**keys)
    run(config)
    folder = only_run(config)
    assert f"done at step 2, epochs completed: 1\n  weights:    {folder / 'epoch1'}" in caplog.text
    weights = files_of(folder / "epoch1")
    caplog.clear()
    run(config, "--resume_from_checkpoint", str(folder))
    assert "goes on from: global_step2, at step 2, epoch 2" in caplog.text
    assert "nothing is left to train: 1 epochs are done" in caplog.text
    assert f"what is asked for has been exported: {folder / 'epoch1'}" in caplog.text
    assert not list(folder.glob("step*"))
    run(write_config(**{**keys, "save_format": "both"}), "--resume_from_checkpoint", str(folder))
    exported = files_of(folder / "step2")
    assert set(exported) == {"adapter_model.safetensors", "adapter_model_comfyui.safetensors"}
    again = exported["adapter_model.safetensors"]
    assert all(torch.equal(again[name], tensor) for name, tensor in weights["adapter_model.safetensors"].items())


def test_a_named_run_keeps_its_newest_exports_and_says_what_it_is(
    write_config: Callable[..., Path], pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    keys = {"run_name": "fox", "max_steps": 3, "checkpoint_every_n_steps": 1, "save_every_n_steps": 1}
    data = {"directory": [{"path": str(pictures), "trigger_word": "sks"}]}
    count = len(list(pictures.glob("*.png")))
    config = write_config(data=data, **keys, keep_exports=2, ema=EMA)
    run(config)
    folder = only_run(config)
    assert folder.name.endswith("_fox")
    assert "for diffusers and comfyui; those of the newest 2 steps are kept" in caplog.text
    assert "removed an older export, as keep_exports = 2 asks: step1" in caplog.text
    exports = {path.name for path in folder.iterdir() if path.name.startswith(("step", "epoch"))}
    assert exports == {"epoch1", "epoch1_ema", "step3", "step3_ema"}
    files = {
        "step3": {"fox-step000003.safetensors", "fox-step000003_comfyui.safetensors"},
        "step3_ema": {"fox-step000003_ema.safetensors", "fox-step000003_ema_comfyui.safetensors"},
    }
    headers = {}
    for name, expected in files.items():
        assert files_of(folder / name).keys() == expected
        for file in expected:
            headers[file] = header_of(folder / name / file)
    for file, header in headers.items():
        assert header["modelspec.architecture"] == "flux-1-schnell/lora" and header["ss_epoch"] == "2"
        assert (header["ss_network_dim"], header["ss_seed"], header["ss_steps"]) == ("4", "0", "3")
        assert (header["modelspec.trigger_phrase"], header["ss_num_train_images"]) == ("sks", str(count))
        assert json.loads(header["ss_dataset_dirs"]) == {pictures.name: {"n_repeats": 1.0, "img_count": count}}
        assert header["ss_output_name"] == file.removesuffix(".safetensors")
        assert not any(str(config.parent) in text or str(pictures.parent) in text for text in header.values())
    # An export of a checkpoint afterwards says the same, and a run in a folder of that name is found again.
    shutil.rmtree(folder / "step3")
    run(config, "--export", str(folder / "global_step3"))
    assert files_of(folder / "step3").keys() == files["step3"]
    for file in files["step3"]:
        again = header_of(folder / "step3" / file)
        times = {"modelspec.date", "ss_training_finished_at"}
        assert {key: again[key] for key in again if key not in times} == {
            key: text for key, text in headers[file].items() if key not in times
        }
    caplog.clear()
    run(config, "--resume_from_checkpoint")
    assert "what is asked for has been exported" in caplog.text


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()
