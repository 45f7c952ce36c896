"""Samples with values of their own, prompts that change while a run goes on, and what is drawn beside a run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from tests.runs import metrics, only_run
from tests.utils.run.test_goes_on import run_here
from utils.errors import UserError
from utils.run.trainer import Trainer


def picture(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def test_samples_with_values_of_their_own_and_a_file_that_changes(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file is good, changes, is spoilt, and is gone; training goes on, and what was good is drawn."""
    caplog.set_level(logging.INFO)
    file = tmp_path / "prompts.txt"
    file.write_text("a red picture --w 32 --s 3 --d 5\n")
    later = {
        1: "a red picture --w 32 --s 3 --d 5\na blue picture --h 32 --ss euler\n",
        2: "a blue picture --h 33\n",
        3: None,
    }
    step = Trainer.step

    def stepped(trainer: Trainer, batches: object) -> object:
        done, values = step(trainer, batches)
        text = later[done.step]
        file.unlink() if text is None else file.write_text(text)
        return done, values

    monkeypatch.setattr(Trainer, "step", stepped)
    sampling = {
        "prompts": ["a green picture"],
        "samples": [{"prompt": "a green picture", "adapter_scale": 0.0}, {"prompt": "a red picture", "seed": 5}],
        "prompt_file": str(file),
        "sample_every_n_steps": 1,
        "sample_before_first_step": True,
        "width": 64,
        "height": 64,
        "steps": 2,
    }
    assert run_here(write_config(max_steps=3, checkpoint_every_n_steps=None, sampling=sampling))
    run = only_run(write_config()) / "samples"
    at_first = ["00_a_green_picture", "01_a_green_picture", "02_a_red_picture", "03_a_red_picture"]
    names = {path.name: [file.stem for file in sorted(path.glob("*.png"))] for path in run.glob("step*")}
    assert names["step000000"] == at_first
    assert names["step000001"] == names["step000002"] == names["step000003"] == [*at_first, "04_a_blue_picture"]
    sizes = [Image.open(one).size for one in sorted((run / "step000003").glob("*.png"))]
    assert sizes == [(64, 64)] * 3 + [(32, 64), (64, 32)]

    # Without the adapter nothing changes, though it is trained.
    changes = [picture(run / "step000000" / f"{n}.png") - picture(run / "step000003" / f"{n}.png") for n in at_first]
    moved = [np.abs(change).max() for change in changes]
    assert moved[1] == 0 and moved[0] > 0 and moved[2] > 0
    said = caplog.text
    assert f"prompts are read anew from {file}: there are 5 samples now" in said
    assert "line 2 --ss: is not used: it is a sampler" in said
    assert said.count(f"{file} cannot be used, and the samples stay those before: {file}: line 1 width, height: ") == 1
    assert "multiples of 16; set 64 x 32 instead of 64 x 33" in said
    assert f"before: {file}: cannot be read: No such file or directory" in said

    text = Image.open(run / "step000003" / "03_a_red_picture.png").info["parameters"]
    prompt, line = text.splitlines()
    assert prompt == "a red picture"
    for part in ("Steps: 3", "CFG scale: 3.5", "Seed: 5, Size: 32x64", "Training step: 3", f"Run: {run.parent.name}"):
        assert part in line, line
    assert "Place: 0" in Image.open(run / "step000003" / "00_a_green_picture.png").info["parameters"]
    assert Image.open(run / "sheet.png").size[0] > 4 * 32


def test_a_score_that_cannot_be_measured_is_told_once(
    write_config: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = tmp_path / "clip"
    clip.mkdir()
    sampling = {"prompts": ["a"], "sample_every_n_steps": 1, "width": 32, "height": 32, "steps": 1}
    config = write_config(max_steps=2, checkpoint_every_n_steps=None, sampling={**sampling, "clip_path": str(clip)})
    assert run_here(config)
    assert caplog.text.count("no samples/clip_score is measured") == 1
    assert not metrics(only_run(config), "samples/clip_score")


def test_a_checkpoints_samples_are_those_of_the_run_and_of_the_stock_pipeline(
    write_config: Callable[..., Path], short_flux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the averages, which the samples of this run have, and the seed of a sample."""
    keys = {"sample_every_n_steps": 100, "width": 64, "height": 32, "steps": 2, "guidance": 2.0}
    asked = {"prompts": ["a red picture"], "samples": [{"prompt": "a blue picture", "seed": 5, "steps": 3}], **keys}
    config = write_config(max_steps=2, sampling=asked, ema={"decay": 0.5, "warmup": "none"}, optimizer__lr=0.1)
    assert run_here(config)
    run = only_run(config)
    of_run = {file.name: file.read_bytes() for file in (run / "samples" / "step000002").iterdir()}
    assert run_here(config, "--sample_only", str(run))
    assert {file.name: file.read_bytes() for file in (run / "samples_only" / "step000002").iterdir()} == of_run

    stock = FluxPipeline.from_pretrained(short_flux)
    stock.set_progress_bar_config(disable=True)
    call = {"prompt": "a blue picture", "width": 64, "height": 32, "num_inference_steps": 3, "guidance_scale": 2.0}
    call |= {"max_sequence_length": 16, "output_type": "np"}
    plain = stock(**call, generator=torch.Generator().manual_seed(5)).images[0] * 255
    stock.load_lora_weights(run / "epoch1_ema", weight_name="adapter_model.safetensors")
    # PEFT's layers come ready for training, with the dropout of this run.
    stock.transformer.eval()
    expected = stock(**call, generator=torch.Generator().manual_seed(5)).images[0] * 255
    drawn = picture(run / "samples_only" / "step000002" / "01_a_blue_picture.png")
    assert np.abs(drawn - expected).max() < 1.0 < np.abs(drawn - plain).max()

    # Of an export too, in either layout, by a config of another rank.
    other = write_config(max_steps=2, sampling=asked, adapter__rank=2, pipeline_stages=1)
    elsewhere = shutil.copy(run / "epoch1_ema" / "adapter_model_comfyui.safetensors", run.parent / "fox.safetensors")
    for export, folder in ((run / "epoch1_ema", run), (elsewhere, run.parent)):
        place = folder / "samples_only" / export.stem
        assert run_here(other, "--sample_only", str(export))
        drawn = picture(place / "01_a_blue_picture.png")
        assert np.abs(drawn - expected).max() < 1.0 < np.abs(drawn - plain).max()
        text = Image.open(place / "01_a_blue_picture.png").info["parameters"]
        assert f"Run: {export.name}" in text and "Training step" not in text
    with pytest.raises(UserError, match=r"looks like an adapter: give it as \[adapter\]"):
        run_here(write_config(sampling=asked, adapter=None), "--sample_only", str(run / "epoch1_ema"))

    with pytest.raises(SystemExit):
        run_here(config, "--sample_only", str(run), "--export", str(run))
    assert "--export does nothing else; leave --sample_only out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"\[sampling\]: there is nothing to draw for --sample_only"):
        run_here(write_config(ema={}), "--sample_only", str(run))


def test_samples_of_an_exported_model_are_those_of_its_run(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = {"prompts": ["a red picture"], "sample_every_n_steps": 100, "width": 64, "height": 32, "steps": 2}
    keys = {"adapter": None, "optimizer__lr": 1e-3, "sampling": sampling}
    assert run_here(write_config(max_steps=1, **keys))
    run = only_run(write_config())
    (of_run,) = (run / "samples" / "step000001").glob("*.png")
    for name in ("step1", "step1/model_comfyui.safetensors"):
        assert run_here(write_config(**keys), "--sample_only", str(run / name))
        drawn = run / "samples_only" / name.removesuffix(".safetensors").replace("/", "_") / of_run.name
        assert (picture(drawn) == picture(of_run)).all()
    with pytest.raises(UserError, match=r"has a whole model \(transformer\), and the config has an \[adapter\]"):
        run_here(write_config(sampling=sampling), "--sample_only", str(run / "step1"))
    (run / "step1" / "text_encoder").mkdir()
    (run / "step1" / "text_encoder" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has 2 parts of a model, text_encoder, transformer"):
        run_here(write_config(**keys), "--sample_only", str(run / "step1"))
