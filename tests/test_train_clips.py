"""Clips and pictures trained together, from files to a LoRA that the stock pipeline loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline as StockPipeline
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from tests.models import tiny_wan
from tests.runs import launch, metrics, only_run
from utils.diffusion.seeds import normal
from utils.media.writing import write_clip


@pytest.fixture
def mixed(pictures: Path, tmp_path: Path) -> dict:
    """The pictures, and two clips: 30 frames at 24 fps are 20 at 16 fps."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(2):
        pixels_CFHW = normal((3, 1, 8, 8), number, "clip").repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1)
        write_clip(torch.cat([pixels_CFHW.roll(shift, 3) for shift in range(30)], dim=1), 24, folder / f"{number}.mp4")
        (folder / f"{number}.txt").write_text(f"clip number {number}")
    return {"frame_buckets": [9, 17], "directory": [{"path": str(pictures)}, {"path": str(folder)}]}


def test_clips_and_pictures_train_together(write_config: Callable[..., Path], mixed: dict, tmp_path: Path) -> None:
    model = tmp_path / "wan"
    model.mkdir()
    tiny_wan.write_folder(model)
    config = write_config(
        data=mixed,
        model={"type": "wan", "dtype": "float32", "diffusers_path": str(model), "max_sequence_length": 24},
        adapter={"type": "lora", "rank": 4},
        optimizer={"type": "adamw", "lr": 1e-2},
        micro_batch_size_per_gpu=1,
        image_micro_batch_size_per_gpu=4,
        pipeline_stages=2,
        max_steps=12,
    )
    codes, log = launch(config, processes=2)
    assert codes == [0, 0], log
    assert "cache vae: wanted=9 reused=0 encoded=9" in log
    assert "30 frames at 24 fps = 20 at 16 fps, bucket 17" in log
    run = only_run(config)
    losses = metrics(run, "train/loss")
    assert len(losses) == 12 and sum(list(losses.values())[-4:]) < sum(list(losses.values())[:4])

    (export,) = [path for path in run.iterdir() if path.name.startswith(("epoch", "step"))]
    inputs = normal((1, 4, 3, 4, 6), 0, "x"), torch.tensor([300.0]), normal((1, 24, 16), 0, "text")
    stock = StockPipeline(None, None, None, None, WanTransformer3DModel.from_pretrained(model / "transformer"))
    with torch.no_grad():
        (before,) = stock.transformer(*inputs, return_dict=False)
        stock.load_lora_weights(export, weight_name="adapter_model.safetensors")
        (loaded,) = stock.transformer(*inputs, return_dict=False)
        merged = WanTransformer3DModel.from_pretrained(model / "transformer")
        factors = load_file(export / "adapter_model.safetensors")
        for name in factors:
            if name.endswith("lora_A.weight"):
                module = merged.get_submodule(name.removeprefix("transformer.").removesuffix(".lora_A.weight"))
                module.weight += factors[name.replace("lora_A", "lora_B")] @ factors[name]
        (expected,) = merged(*inputs, return_dict=False)
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-5)
    assert (loaded - before).abs().max() > 1e-3
    assert (export / "adapter_model_comfyui.safetensors").exists()
