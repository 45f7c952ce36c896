"""Wan against diffusers: its layers in a row, its text, its latents, its files.

Shapes: B batch, C channels, F frames, H W pixels, f h w latent frames, height and width, L text tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers import WanPipeline as StockPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file
from transformers import UMT5EncoderModel

from models.foundation.text_encoders import load_tokenizer
from models.wan import WAN_LAYOUT, WanPipeline
from tests.models import tiny_wan
from tests.models.painted import paint
from tests.models.tiny_wan import CHANNELS, TEXT_TOKENS, TEXT_WIDTH
from tests.processes import run_ranks
from utils.dataset.batches import pad_ragged
from utils.diffusion.seeds import normal
from utils.settings.errors import SettingsError
from utils.settings.schema import SamplingSettings

CAPTIONS = ["a hiker  on a ridge", "", "two motorcycles &amp; a dog " * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.write_folder(tmp_path_factory.mktemp("wan"))


def whole(wan: WanPipeline) -> tuple[Any, list]:
    """The denoiser with its weights, and its layers."""
    denoiser = wan.load_denoiser()
    layers = wan.to_layers(denoiser)
    wan.fill(denoiser, wan.open_weights(denoiser), layers)
    return denoiser, layers


@pytest.mark.parametrize("canvas_fhw", [(1, 4, 6), (3, 8, 4)], ids=["still", "clip"])
def test_layers_equal_the_whole_transformer(folder: Path, canvas_fhw: tuple[int, int, int]) -> None:
    wan = tiny_wan.pipeline(folder)
    wan.check()
    lengths = (5, 11)
    text = [normal((length, TEXT_WIDTH), 0, "text", length) for length in lengths]
    x, t_B = normal((2, CHANNELS, *canvas_fhw), 0, "x"), torch.tensor([0.2513, 0.913])
    weights = normal((2, CHANNELS, *canvas_fhw), 0, "loss")

    denoiser, layers = whole(wan)
    stream = wan.prepare_inputs({"umt5": pad_ragged(text)}, x, t_B)
    for layer in layers:
        stream = layer(stream)
    (stream * weights).sum().backward()

    reference, _ = whole(wan)
    padded_BLD = torch.zeros(2, TEXT_TOKENS, TEXT_WIDTH)
    for row, features_LD in zip(padded_BLD, text, strict=True):
        row[: len(features_LD)] = features_LD
    (expected,) = reference(x, t_B * 1000, padded_BLD, return_dict=False)
    (expected * weights).sum().backward()

    assert torch.equal(stream, expected)
    gradients = {name: parameter.grad for name, parameter in denoiser.named_parameters()}
    for name, parameter in reference.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


def test_layers_hold_every_parameter_once(folder: Path) -> None:
    wan = tiny_wan.pipeline(folder)
    denoiser = wan.load_denoiser()
    held = [id(p) for layer in wan.to_layers(denoiser) for p in layer.parameters()]
    assert sorted(held) == sorted(id(p) for p in denoiser.parameters())


@torch.no_grad()
def test_text_is_that_of_the_stock_pipeline(folder: Path) -> None:
    wan = tiny_wan.pipeline(folder)
    encoder = wan.encoders()[1]
    encoder.load(torch.device("cpu"))
    made = encoder.encode(caption=CAPTIONS)
    umt5 = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    stock = StockPipeline(load_tokenizer(folder / "tokenizer"), umt5, None, None, None)
    stock_BLD = stock._get_t5_prompt_embeds(CAPTIONS, max_sequence_length=TEXT_TOKENS, device="cpu")
    for features_LD, expected_LD in zip(made["umt5"], stock_BLD, strict=True):
        torch.testing.assert_close(features_LD, expected_LD[: len(features_LD)])
        assert not expected_LD[len(features_LD) :].any()
    assert encoder.truncated == 1


@pytest.mark.parametrize("frames", [1, 9])
@torch.no_grad()
def test_latents_are_those_of_the_stock_autoencoder(folder: Path, frames: int) -> None:
    wan = tiny_wan.pipeline(folder, latents="mode")
    autoencoder = wan.encoders()[0]
    autoencoder.load(torch.device("cpu"))
    pixels_BCFHW = normal((2, 3, frames, 32, 48), 0, "pixels").clamp(-1, 1)
    latents = autoencoder.encode(pixels=pixels_BCFHW)["latents"]
    stock = AutoencoderKLWan.from_pretrained(folder / "vae")
    mean, std = (torch.tensor(tiny_wan.VAE[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    expected = stock.encode(pixels_BCFHW).latent_dist.mode()
    torch.testing.assert_close(latents, (expected - mean) / std)
    assert wan.latent_shape(48, 32, frames) == tuple(latents.shape[1:])
    decoded, stock_decoded = autoencoder.decode(latents), stock.decode(expected).sample.clamp(-1, 1)
    torch.testing.assert_close(decoded, stock_decoded, rtol=0, atol=1e-3)


def test_the_publishers_file_is_read_and_written(folder: Path, tmp_path: Path) -> None:
    wan = tiny_wan.pipeline(folder)
    denoiser, _ = whole(wan)
    tensors = {name: parameter.detach() for name, parameter in denoiser.named_parameters()}
    original = WAN_LAYOUT.to_original(tensors)
    again = convert_wan_transformer_to_diffusers({f"model.diffusion_model.{n}": t for n, t in original.items()})
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    save_file(original, tmp_path / "wan.safetensors")
    single, _ = whole(tiny_wan.pipeline(folder, transformer_path=tmp_path / "wan.safetensors"))
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in single.named_parameters())


@pytest.mark.parametrize(("guidance", "stages"), [(1.0, 1), (5.0, 2)])
def test_samples_are_those_of_the_stock_pipeline(folder: Path, tmp_path: Path, guidance: float, stages: int) -> None:
    """A clip of nine frames, without guidance and with that by a second prediction."""
    width, height, frames = 48, 32, 9
    sampling = SamplingSettings(
        prompts=["a hiker on a ridge"],
        negative_prompt="blurred",
        sample_every_n_steps=1,
        steps=4,
        width=width,
        height=height,
        frames=frames,
        seed=7,
        guidance=guidance,
    )
    painted = run_ranks(paint, stages, tiny_wan.pipeline, folder, tmp_path / "cache", stages, sampling)
    stock = StockPipeline(
        load_tokenizer(folder / "tokenizer"),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        AutoencoderKLWan.from_pretrained(folder / "vae"),
        UniPCMultistepScheduler.from_pretrained(folder / "scheduler"),
        WanTransformer3DModel.from_pretrained(folder / "transformer"),
    )
    stock.set_progress_bar_config(disable=True)
    noise = normal((1, CHANNELS, 3, height // 8, width // 8), 7, "sample", 0)
    expected = stock(
        sampling.prompts[0],
        sampling.negative_prompt,
        width=width,
        height=height,
        num_frames=frames,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=noise,
        max_sequence_length=TEXT_TOKENS,
        output_type="latent",
    ).frames
    assert (expected - noise).abs().mean() > 0.1
    for latents in painted:
        torch.testing.assert_close(torch.from_numpy(latents[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"in_channels": 12}, "starts from a picture"), ({"image_dim": 16, "added_kv_proj_dim": 24}, "starts from a")],
)
def test_another_variant_is_told(tmp_path: Path, changes: dict[str, int], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        tiny_wan.pipeline(tiny_wan.write_folder(tmp_path, **changes)).check()
