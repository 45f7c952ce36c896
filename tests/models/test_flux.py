"""Flux against diffusers: its layers in a row, what it is fed, and the pictures it draws.

Shapes: B batch, T image tokens, L text tokens, C channels, D width, h w latent cells, H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers import FluxPipeline as StockPipeline
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from PIL import Image
from torch import nn

from models.assembly.stage import load_stage
from models.flux import FluxPipeline, grid_positions, pack, unpack
from tests.models import tiny_flux
from tests.models.drawn_samples import draw_samples
from tests.models.tiny_folder import settings_of
from tests.processes import run_ranks
from utils.diffusion.seeds import generator, normal
from utils.settings.run_tables import SamplingSettings

CELL = 8
DEV, SCHNELL = {"guidance_embeds": True}, {"guidance_embeds": False}
PROMPTS = ["a red star on a white background", "a blue circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("dev"), **DEV)


@pytest.fixture(scope="module")
def schnell_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("schnell"), **SCHNELL)


def loaded(flux: FluxPipeline) -> tuple[nn.Module, list[nn.Module]]:
    """The denoiser with its weights, and its layers."""
    staged = load_stage(flux, settings_of(flux), stage=0)
    return staged.denoiser, staged.layers


def random_features(batch: int, control_hw: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    draw = generator(0, "features")
    features = {
        "t5": torch.randn(batch, tiny_flux.TEXT_TOKENS, 64, generator=draw),
        "clip_pooled": torch.randn(batch, 32, generator=draw),
    }
    if control_hw:
        features["control_latents"] = torch.randn(batch, 4, *control_hw, generator=draw)
    return features


def stock_arguments(features: dict, x_BChw: torch.Tensor, t_B: torch.Tensor, guidance: float | None) -> dict[str, Any]:
    """What diffusers' Flux and Kontext pipelines feed the transformer."""
    ids, tokens = [], []
    images = [x_BChw, features["control_latents"]] if "control_latents" in features else [x_BChw]
    for image, latents in enumerate(images):
        shape = latents.shape
        tokens.append(StockPipeline._pack_latents(latents, *shape))
        image_ids = FluxKontextPipeline._prepare_latent_image_ids(
            shape[0], shape[2] // 2, shape[3] // 2, torch.device("cpu"), torch.float32
        )
        image_ids[..., 0] = image
        ids.append(image_ids)
    return {
        "hidden_states": torch.cat(tokens, dim=1),
        "encoder_hidden_states": features["t5"],
        "pooled_projections": features["clip_pooled"],
        "timestep": t_B,
        "guidance": None if guidance is None else torch.full((len(t_B),), guidance),
        "img_ids": torch.cat(ids),
        "txt_ids": torch.zeros(features["t5"].shape[1], 3),
        "return_dict": False,
    }


@pytest.mark.parametrize(
    ("model", "control_hw"), [("dev", None), ("schnell", None), ("dev", (8, 4))], ids=["dev", "schnell", "kontext"]
)
@pytest.mark.parametrize("canvas_hw", [(4, 6), (8, 8)])
def test_layers_equal_the_whole_transformer(
    folder: Path, schnell_folder: Path, model: str, control_hw: tuple[int, int] | None, canvas_hw: tuple[int, int]
) -> None:
    guidance = 3.5 if model == "dev" else None
    flux = tiny_flux.pipeline(folder if model == "dev" else schnell_folder, guidance=3.5)
    features = random_features(2, control_hw)
    x_BChw, t_B = normal((2, 4, *canvas_hw), 0, "x"), torch.tensor([0.2513, 0.913])
    weights_BChw = normal((2, 4, *canvas_hw), 0, "loss")

    denoiser, layers = loaded(flux)
    stream = flux.prepare_inputs(features, x_BChw, t_B)
    for layer in layers:
        stream = layer(stream)
    (stream * weights_BChw).sum().backward()

    reference, _ = loaded(flux)
    (output_BTC,) = reference(**stock_arguments(features, x_BChw, t_B, guidance))
    tokens = canvas_hw[0] * canvas_hw[1] // 4
    expected = StockPipeline._unpack_latents(
        output_BTC[:, :tokens], canvas_hw[0] * CELL, canvas_hw[1] * CELL, vae_scale_factor=CELL
    )
    (expected * weights_BChw).sum().backward()

    assert torch.equal(stream, expected)
    gradients = {name: parameter.grad for name, parameter in denoiser.named_parameters()}
    for name, parameter in reference.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


def test_guidance_of_sampling_replaces_that_of_training(folder: Path, schnell_folder: Path) -> None:
    inputs = random_features(2, None), torch.zeros(2, 4, 4, 4), torch.zeros(2)
    flux = tiny_flux.pipeline(folder, guidance=1.5)
    assert flux.prepare_inputs(*inputs).guidance_B.tolist() == [1.5, 1.5]
    assert flux.prepare_inputs(*inputs, guidance=4.0).guidance_B.tolist() == [4.0, 4.0]
    assert flux.prepare_inputs(*inputs, guidance=0.0).guidance_B.tolist() == [0.0, 0.0]
    assert tiny_flux.pipeline(schnell_folder).prepare_inputs(*inputs, guidance=4.0).guidance_B is None


def test_bypassed_guidance_leaves_time_and_text(folder: Path) -> None:
    inputs = random_features(2, None), torch.zeros(2, 4, 4, 4), torch.tensor([0.3, 0.7])
    bypassing = tiny_flux.pipeline(folder, bypass_guidance_embedding=True)
    denoiser, layers = loaded(bypassing)
    unguided = CombinedTimestepTextProjEmbeddings(32, 32)
    missing, unexpected = unguided.load_state_dict(denoiser.time_text_embed.state_dict(), strict=False)
    assert not missing and all(name.startswith("guidance_embedder.") for name in unexpected)

    time_BD = layers[0](bypassing.prepare_inputs(*inputs)).time_BD
    guided = tiny_flux.pipeline(folder)
    guided_time_BD = loaded(guided)[1][0](guided.prepare_inputs(*inputs)).time_BD

    assert torch.equal(time_BD, unguided(inputs[2] * 1000, inputs[0]["clip_pooled"]))
    assert (time_BD - guided_time_BD).abs().mean() > 1e-2


@pytest.mark.parametrize("hw", [(4, 6), (6, 4)])
def test_tokens_are_packed_as_diffusers_packs_them(hw: tuple[int, int]) -> None:
    x_BChw = normal((2, 4, *hw), 0, "x")
    tokens_BTC = StockPipeline._pack_latents(x_BChw, 2, 4, *hw)
    ids_T3 = StockPipeline._prepare_latent_image_ids(2, hw[0] // 2, hw[1] // 2, torch.device("cpu"), torch.float32)

    assert torch.equal(pack(x_BChw), tokens_BTC)
    assert torch.equal(unpack(tokens_BTC, *hw), x_BChw)
    assert torch.equal(grid_positions(*hw, image=0), ids_T3)


def test_time_is_embedded_in_float32_under_bfloat16(folder: Path) -> None:
    """Two noise levels that bfloat16 cannot tell apart."""
    flux = tiny_flux.pipeline(folder, dtype="bfloat16")
    _, layers = loaded(flux)
    inputs = flux.prepare_inputs(random_features(2, None), torch.zeros(2, 4, 4, 4), torch.tensor([0.901, 0.9018]))
    inputs = inputs._replace(pooled_BD=torch.zeros(2, 32))
    low_BD, high_BD = layers[0](inputs).time_BD
    assert low_BD.dtype == torch.bfloat16
    assert not torch.equal(low_BD, high_BD)


def test_samples_of_a_picture_are_those_of_kontext(folder: Path, tmp_path: Path) -> None:
    width, height = 96, 64
    pixels = normal((8, 12, 3), 0, "picture").repeat_interleave(8, 0).repeat_interleave(8, 1)
    picture = Image.fromarray((pixels.clamp(-1, 1) * 127 + 128).to(torch.uint8).numpy())
    picture.save(tmp_path / "picture.png")
    sampling = SamplingSettings(
        prompts=PROMPTS,
        control_images=[tmp_path / "picture.png"],
        sample_every_n_steps=1,
        steps=4,
        width=width,
        height=height,
        seed=7,
        guidance=2.5,
    )
    painted = run_ranks(draw_samples, 2, tiny_flux.pipeline, folder, tmp_path / "cache", 2, sampling)
    stock = FluxKontextPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    for index in range(len(PROMPTS)):
        noise = normal((1, 4, height // CELL, width // CELL), 7, "sample", index)
        shown = sampling.model_copy(update={"prompts": PROMPTS[index:]})
        expected = tiny_flux.draw(stock, shown, noise, image=picture, _auto_resize=False, max_area=width * height)
        plain = tiny_flux.draw(tiny_flux.STOCK.from_pretrained(folder), shown, noise)
        assert (expected - plain).abs().mean() > 1e-3
        for latents in painted:
            torch.testing.assert_close(torch.from_numpy(latents[index]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "scheduler", "stages"),
    [
        (DEV, {"shift": 3.0}, 1),
        (DEV, {"use_dynamic_shifting": True, "base_shift": 0.4}, 2),
        (SCHNELL, {"use_dynamic_shifting": True, "shift_terminal": 0.1, "base_image_seq_len": 8}, 1),
    ],
    ids=["dev", "dev, shift by size, 2 stages", "schnell, shift by size"],
)
def test_samples_are_those_of_the_stock_pipeline(tmp_path: Path, model: dict, scheduler: dict, stages: int) -> None:
    width, height = 96, 64
    folder = tiny_flux.write_folder(tmp_path, scheduler=scheduler, **model)
    sampling = SamplingSettings(
        prompts=PROMPTS, sample_every_n_steps=1, steps=4, width=width, height=height, seed=7, guidance=2.5
    )
    painted = run_ranks(draw_samples, stages, tiny_flux.pipeline, folder, tmp_path / "cache", stages, sampling)

    stock = StockPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    for index, prompt in enumerate(sampling.prompts):
        noise_BChw = normal((1, 4, height // CELL, width // CELL), 7, "sample", index)
        tokens_BTC = stock(
            prompt,
            width=width,
            height=height,
            num_inference_steps=4,
            guidance_scale=2.5,
            output_type="latent",
            latents=pack(noise_BChw),
            max_sequence_length=tiny_flux.TEXT_TOKENS,
        ).images
        expected = StockPipeline._unpack_latents(tokens_BTC, height, width, CELL)
        assert (expected - noise_BChw).abs().mean() > 0.1
        for latents in painted:
            torch.testing.assert_close(torch.from_numpy(latents[index]), expected, rtol=1e-5, atol=1e-5)
