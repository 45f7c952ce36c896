"""Sana: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from models.foundation.checkpoints.recognition import recognised
from tests.models import tiny_sana as tiny
from tests.models.tiny_folder import encoded_as_loaded
from utils.diffusion.seeds import normal
from utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("sana"))


@torch.no_grad()
def test_captions_are_in_small_letters_and_counted_without_the_instruction(folder: Path) -> None:
    """Of 64 tokens that are seen, two are not the caption's: the first, and the instruction's last."""
    encoder = tiny.pipeline(folder).encoders()[1]
    encoder.load(torch.device("cpu"))
    letters = [" A Hiker on THE ridge ", "a" * 62, "a" * 63]
    made = encoded_as_loaded(encoder, letters)
    expected = tiny.prompt_features(tiny.STOCK.from_pretrained(folder), letters)
    for number, features in enumerate(expected):
        torch.testing.assert_close(made["gemma2"][number], features["gemma2"], rtol=1e-4, atol=1e-5)
    assert [len(text) for text in made["gemma2"]] == [2 + len("a hiker on the ridge"), 64, 64]
    assert encoder.truncated == 1


@torch.no_grad()
def test_a_picture_has_one_latent(folder: Path) -> None:
    pixels = normal((1, 3, 1, 32, 64), 0, "pixels").clamp(-1, 1)
    made: dict[str, torch.Tensor] = {}
    for draw in ("sample", "mode", "distribution"):
        autoencoder = tiny.pipeline(folder, latents=draw).encoders()[0]
        autoencoder.load(torch.device("cpu"))
        made |= {f"{draw} {name}": tensor for name, tensor in autoencoder.encode(pixels=pixels).items()}
    assert torch.equal(made["sample latents"], made["mode latents"])
    assert torch.equal(made["distribution latents_mean"], made["mode latents"])
    assert not made["distribution latents_std"].any()


def test_the_scheduler_is_of_the_class_that_the_folder_names(folder: Path, tmp_path: Path) -> None:
    assert type(tiny.pipeline(folder).scheduler()).__name__ == "DPMSolverMultistepScheduler"
    other = tiny.write_folder(tmp_path)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(other / "scheduler")
    assert type(tiny.pipeline(other).scheduler()) is FlowMatchEulerDiscreteScheduler
    DDPMScheduler().save_pretrained(other / "scheduler")
    with pytest.raises(UserError, match="is of DDPMScheduler; one of DPMSolverMultistepScheduler or"):
        tiny.pipeline(other).check()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance_embeds": True}, "is of Sana Sprint"),
        ({"patch_size": 2}, "has patches of side 2"),
        ({"out_channels": 8}, "takes latents of 4 channels, gives 8, and the VAE makes 4"),
        ({"caption_channels": 8}, "takes text of 8 features and Gemma makes 16"),
    ],
)
def test_models_that_are_not_trained(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny.pipeline(tiny.write_folder(tmp_path, **changes)).check()


def test_the_publishers_file_is_told() -> None:
    shapes = {"blocks.0.mlp.depth_conv.conv.weight": (11200, 1, 3, 3), "attention_y_norm.weight": (2240,)}
    assert "give the folder that is called diffusers" in recognised(shapes).fits
