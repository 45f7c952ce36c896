"""Qwen-Image 2.1: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_qwen_image21_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from models.assembly.stage import load_stage
from models.qwen_image_21 import QWEN_21_LAYOUT
from tests.models import tiny_qwen_image_21 as tiny
from tests.models.tiny_folder import settings_of
from utils.diffusion.seeds import normal
from utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("qwen_image_21"))


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    pipeline = tiny.pipeline(folder, **options)
    denoiser = load_stage(pipeline, settings_of(pipeline), stage=0).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def test_comfyuis_names_are_those_that_the_stock_converter_reads(folder: Path) -> None:
    tensors = tensors_of(folder)
    original = QWEN_21_LAYOUT.to_original(tensors)
    assert "transformer_blocks.0.img_mlp.gate_up.weight" in original
    again = convert_qwen_image21_transformer_checkpoint_to_diffusers(original)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_comfyuis_file_is_read(folder: Path, tmp_path: Path, prefix: str) -> None:
    moved = {name: tensor + 1 for name, tensor in tensors_of(folder).items()}
    original = {prefix + name: tensor for name, tensor in QWEN_21_LAYOUT.to_original(moved).items()}
    save_file(original, tmp_path / "qwen.safetensors")
    read = tensors_of(folder, transformer_path=tmp_path / "qwen.safetensors")
    assert all(torch.equal(read[name], moved[name]) for name in moved)


def test_a_model_that_tells_the_text_the_pictures_time(tmp_path: Path) -> None:
    """`causal_condition = false`; with it, as the generic tests have it, the text is told that it has no noise."""
    folder = tiny.write_folder(tmp_path, causal_condition=False)
    pipeline = tiny.pipeline(folder)
    staged = load_stage(pipeline, settings_of(pipeline), stage=0)
    shape = (2, *pipeline.latent_shape(32, 64))
    features, x_t, t_B = tiny.features((5, 11)), normal(shape, 0, "x"), torch.tensor([0.25, 0.9])
    with torch.no_grad():
        stream = pipeline.prepare_inputs(features, x_t, t_B)
        for layer in staged.layers:
            stream = layer.eval()(stream)
        expected = tiny.whole(staged.denoiser, pipeline, features, x_t, t_B)
    torch.testing.assert_close(stream, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_opacity_is_a_channel_of_the_pixels(folder: Path) -> None:
    autoencoder = tiny.pipeline(folder, latents="mode").encoders()[0]
    assert autoencoder.reads == ("rgba",)
    autoencoder.load(torch.device("cpu"))
    latents = normal((1, tiny.CHANNELS, 1, 2, 4), 0, "latents")
    shown = autoencoder.decode(latents)
    mean, std = (torch.tensor(tiny.VAE[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    stock_B41HW = autoencoder.vae.decode(latents * std + mean).sample
    assert stock_B41HW[:, 3].std() > 1e-3
    opacity = (stock_B41HW[:, 3:] + 1) / 2
    torch.testing.assert_close(shown, stock_B41HW[:, :3] * opacity)


def test_levels_that_the_folder_names(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "sample_sigmas": [1.0, 0.7, 0.2]}))
    pipeline = tiny.pipeline(folder)
    assert pipeline.sampling_levels(3) == [1.0, 0.7, 0.2]
    assert pipeline.sampling_levels(4) == [1.0, 0.75, 0.5, 0.25]


def test_the_shift_is_that_of_the_folders_scheduler(folder: Path) -> None:
    shift = tiny.pipeline(folder).resolution_shift
    assert (shift.base_tokens, shift.max_tokens, shift.base_shift, shift.max_shift) == (256, 8192, 0.6, 0.9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 16}, "takes latents of 16 channels and the VAE makes 4; give the VAE of Qwen-Image 2.1"),
        ({"context_in_dim": 8}, "takes text of 8 features and Qwen3-VL makes 16; give Qwen3-VL 8B"),
        ({"patch_size": 2}, "has patches of side 2"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny.pipeline(tiny.write_folder(tmp_path, **changes)).check()


def test_a_processor_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path)
    (folder / "processor" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"processor/tokenizer_config\.json"):
        tiny.pipeline(folder).check()
