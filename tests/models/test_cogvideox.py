"""CogVideoX: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXFunControlPipeline, CogVideoXTransformer3DModel, DDIMScheduler
from safetensors.torch import load_file, save_file

from models.foundation.checkpoints.recognition import recognised
from models.foundation.encoders.cogvideox_vae import with_noise
from models.foundation.encoders.vae import content_of
from tests import test_models as generic
from tests.models import tiny_cogvideox as tiny
from tests.models import tiny_cogvideox_15_i2v as tiny_i2v
from tests.models.batches import batch_of
from tests.models.drawn_samples import draw_here, sampling_of
from tests.models.tiny_folder import certain_of
from utils.dataset.masks import MaskEncoder
from utils.diffusion.schedules import NoiseSchedule
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.settings.run_tables import SamplingSettings

OF_5B = {"use_rotary_positional_embeddings": True}
WITH_TABLE = {"in_channels": 8, "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
OF_TABLE = (24, 16, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("cogvideox"))


@pytest.fixture(scope="module")
def i2v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_i2v.write_folder(tmp_path_factory.mktemp("cogvideox_15_i2v"))


@pytest.fixture(scope="module")
def table_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cogvideox_table")
    return tiny.write_folder(place, tiny_i2v.STOCK, **WITH_TABLE)


def sample(width: int, height: int, frames: int) -> Any:
    bucket = SimpleNamespace(width=width, height=height, frames=frames)
    return SimpleNamespace(bucket=bucket, media=SimpleNamespace(locator="fox.mp4"))


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "module", "sizes"), [(OF_5B, tiny, [(16, 32, 5), (24, 16, 1)]), (WITH_TABLE, tiny_i2v, [OF_TABLE])]
)
def test_a_5b_is_the_stock_module(
    tmp_path: Path, changes: dict[str, Any], module: ModuleType, sizes: list[tuple[int, int, int]]
) -> None:
    """With rotary positions, which are scaled to the grid of its own size, and with a learned table beside them, which
    the stock module has read from the same files."""
    model = generic.Model("", tiny.write_folder(tmp_path, **changes), module)
    pipeline, stock = model.pipeline(), CogVideoXTransformer3DModel.from_pretrained(tmp_path / "transformer")
    for size in sizes:
        batch = batch_of(model, pipeline, size)
        made = generic.output(pipeline, generic.loaded(pipeline).layers, batch)
        assert torch.equal(made, module.whole(stock, pipeline, batch.features, batch.x_t, batch.t_B))


@torch.no_grad()
def test_a_learned_table_is_read_exported_and_for_one_size_alone(table_folder: Path, tmp_path: Path) -> None:
    model = generic.Model("", table_folder, tiny_i2v)
    pipeline = model.pipeline()
    pipeline.check()
    name = "patch_embed.pos_embedding"
    before = load_file(table_folder / "transformer" / "diffusion_pytorch_model.safetensors")[name].float()
    assert torch.equal(generic.loaded(pipeline).denoiser.patch_embed.pos_embedding, before)
    written = generic.moved(model, tmp_path, None, "both").denoiser.patch_embed.pos_embedding
    assert (written - before).abs().mean() > 1e-2
    again = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "transformer")
    assert torch.equal(again.patch_embed.pos_embedding, written)
    assert torch.equal(load_file(tmp_path / generic.DENOISER_COMFYUI)[name], written)

    assert not pipeline.problems_of_data([sample(*OF_TABLE)])
    (problem,) = pipeline.problems_of_data([sample(*OF_TABLE), sample(16, 24, 9)])
    assert "16 x 24 with 9 frames: this model's table of positions is for 24 x 16 with 9 frames" in problem.message
    assert problem.message.endswith("set these: size_buckets = [[24, 16, 9]]")
    (problem,) = pipeline.problems_of_samples(SamplingSettings(prompts=[""], width=24, height=16, frames=5))
    assert "24 x 16 with 5 frames" in problem.message
    (problem,) = pipeline.problems_of_data([sample(24, 16, 1)])
    assert "still pictures" in problem.message


def test_the_noise_is_that_of_the_stock_scheduler(folder: Path, tmp_path: Path) -> None:
    """With what its configuration says, and with what it leaves out."""
    assert tiny.pipeline(folder).objective.schedule == NoiseSchedule(zero_terminal_snr=True, snr_divisor=3.0)
    for keys in ({"snr_shift_scale": 3.0, "rescale_betas_zero_snr": True}, {"snr_shift_scale": 1.0}, {}):
        stock = CogVideoXDDIMScheduler(**keys)
        schedule = NoiseSchedule.from_config(stock.config)
        torch.testing.assert_close(schedule.abar_N, stock.alphas_cumprod, rtol=1e-10, atol=1e-12)
    for part in folder.iterdir():
        if part.name != "scheduler":
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text('{"_class_name": "CogVideoXDPMScheduler", "prediction_type": "v_prediction"}')
    assert tiny.pipeline(tmp_path).objective.schedule == NoiseSchedule(snr_divisor=3.0)
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match="is of DDIMScheduler, and CogVideoX has the noise of CogVideoXDDIMScheduler"):
        tiny.pipeline(tmp_path).check()


@torch.no_grad()
def test_first_frames_are_those_of_the_stock_pipeline(i2v_folder: Path) -> None:
    """At the scale that CogVideoX 1.5 was trained with, with zeros behind them, also before the clip's own frames; in
    training with noise, in samples without."""
    pipeline, stock = tiny_i2v.pipeline(i2v_folder), generic.Model("", i2v_folder, tiny_i2v).stock()
    encoder = pipeline.encoders()[-1]
    encoder.load(torch.device("cpu"))
    pixels_BCFHW = normal((2, 3, 5, 16, 24), 0, "pixels").clamp(-1, 1)
    features = {**tiny.features((5, 11)), **encoder.encode(pixels=pixels_BCFHW)}
    stock.vae.encode, x_t = certain_of(stock.vae), normal((2, *pipeline.latent_shape(24, 16, 5)), 0, "x")
    shown = {}
    for name, pictures in (("drawn", pixels_BCFHW[:, :, 0]), ("trained", with_noise(pixels_BCFHW[:, :, :1])[:, :, 0])):
        # The stock pipeline counts a frame that fills up as part of the clip.
        _, expected = stock.prepare_latents(pictures, 2, 4, 7, 16, 24, torch.float32)
        told = {"latents": x_t} if name == "trained" else {}
        inputs = pipeline.prepare_inputs({**features, **told}, x_t, torch.tensor([0.2, 0.9]))
        shown[name] = inputs.x_BfChw[:, :, 4:]
        torch.testing.assert_close(shown[name], expected, rtol=1e-4, atol=1e-5)
    assert 1e-3 < (shown["drawn"] - shown["trained"])[:, 0].abs().mean()

    plain = tiny_i2v.pipeline(i2v_folder, noised_picture=False)
    assert plain.encoders()[-1].outputs == ["first_frame_latents"]
    assert plain.encoders()[-1].fingerprint != encoder.fingerprint
    inputs = plain.prepare_inputs({**features, "latents": x_t}, x_t, torch.tensor([0.2, 0.9]))
    assert torch.equal(inputs.x_BfChw[:, :, 4:], shown["drawn"])


def test_the_noise_on_pictures_follows_from_each_alone() -> None:
    pixels = torch.zeros(64, 3, 1, 16, 16)
    pixels += torch.linspace(-0.5, 0.5, 64).view(-1, 1, 1, 1, 1)
    noise = with_noise(pixels) - pixels
    assert torch.equal(noise[5:7], with_noise(pixels[5:7]) - pixels[5:7])
    assert content_of(pixels[0]) != content_of(pixels[1])
    strengths = noise.flatten(1).std(dim=1).log()
    assert strengths.mean() == pytest.approx(-3, abs=0.2) and strengths.std() == pytest.approx(0.5, abs=0.15)
    assert noise.mean().abs() < math.exp(-3) / 10


@torch.no_grad()
def test_a_copy_of_the_first_frame_comes_before_the_clip(i2v_folder: Path) -> None:
    """As in the publisher's training; the stock pipeline cuts the frame off before it decodes."""
    pipeline = tiny_i2v.pipeline(i2v_folder, latents="mode")
    autoencoder = pipeline.encoders()[0]
    autoencoder.load(torch.device("cpu"))
    pixels_BCFHW = normal((2, 3, 5, 16, 24), 0, "pixels").clamp(-1, 1)
    latents = autoencoder.encode(pixels=pixels_BCFHW)["latents"]
    expected = autoencoder.vae.encode(pixels_BCFHW).latent_dist.mode() * 0.8
    assert tuple(latents.shape[1:]) == pipeline.latent_shape(24, 16, 5) == (4, 4, 8, 12)
    torch.testing.assert_close(latents, torch.cat([expected[:, :, :1], expected], dim=2), rtol=1e-4, atol=1e-5)
    decoded = autoencoder.vae.decode(expected / 0.8).sample.clamp(-1, 1)
    torch.testing.assert_close(autoencoder.decode(latents), decoded, rtol=0, atol=1e-4)

    mask = torch.linspace(0, 1, 5).view(1, 1, 5, 1, 1).expand(1, 1, 5, 16, 24)
    encoder = MaskEncoder(pipeline.latent_shape, pipeline.frame_groups)
    assert encoder.encode(mask)["loss_mask"][0, 0, :, 0, 0].tolist() == pytest.approx([0, 0, 3 / 8, 7 / 8])


def test_samples_from_a_picture_are_those_of_the_stock_pipeline(i2v_folder: Path) -> None:
    """By DPM-Solver++, whose steps draw noise."""
    model = generic.Model("cogvideox_15_i2v", i2v_folder, tiny_i2v)
    pipeline, sampling = model.pipeline(), sampling_of(tiny_i2v, "a hiker on a ridge")
    shape = (1, *pipeline.latent_shape(sampling.width, sampling.height, sampling.frames))
    noise = normal(shape, 7, "sample", 0)
    expected = tiny_i2v.draw(model.stock(), sampling, noise)
    assert (expected - noise).abs().mean() > 0.1
    latents = draw_here(pipeline, generic.loaded(pipeline).layers, sampling, noise)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_what_is_trained_follows_from_the_folder(folder: Path, i2v_folder: Path, table_folder: Path) -> None:
    text, later, table = (tiny.pipeline(place) for place in (folder, i2v_folder, table_folder))
    assert [one.starts_from_picture for one in (text, later, table)] == [False, True, True]
    assert [(one.media.max_frames, one.media.fps) for one in (text, later, table)] == [(9, 8), (17, 16), (9, 8)]
    assert [one.places for one in (text, later)] == [None, (18, 20)]
    assert later.too_large(84, 72) and not later.too_large(80, 72)
    assert text.media.spatial == text.media.temporal == 4


PARTS = {
    "down_blocks.": "down.",
    "up_blocks.0.": "up.1.",
    "up_blocks.1.": "up.0.",
    "resnets.": "block.",
    "mid_block.block.0.": "mid.block_1.",
    "mid_block.block.1.": "mid.block_2.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
    "conv_shortcut.": "nin_shortcut.",
}
"""What the stock converter reads in the publisher's files of the VAE, for the two blocks of the tiny one."""


def test_the_publishers_vae_is_read(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    theirs = {"loss.logvar": torch.zeros(2)}
    for name, tensor in tensors.items():
        for ours, part in PARTS.items():
            name = name.replace(ours, part)
        theirs[name] = tensor + 1
    assert not theirs.keys() & {name for name in tensors if "block" in name}
    save_file(theirs, tmp_path / "3d-vae.safetensors")
    autoencoder = tiny.pipeline(folder, vae_path=tmp_path / "3d-vae.safetensors").encoders()[0]
    autoencoder.check()
    autoencoder.load(torch.device("cpu"))
    read = autoencoder.vae.state_dict()
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name] + 1) for name in read)


def test_files_of_the_publishers_training_are_known() -> None:
    names = ("mixins.patch_embed.text_proj.weight", "mixins.adaln_layer.adaLN_modulations.0.1.weight")
    shapes = {f"model.diffusion_model.{name}": (8, 8) for name in names}
    assert "convert_cogvideox_to_diffusers" in recognised(shapes).fits


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 8, "stock": CogVideoXFunControlPipeline}, "takes 8 channels for latents of 4, and is of Cog"),
        ({"in_channels": 9}, "takes 9 channels for latents of 4, and is of CogVideoX-Fun"),
        ({"out_channels": 8, "in_channels": 8}, "gives latents of 8 channels and the VAE makes 4"),
        ({"text_embed_dim": 8}, "takes text of 8 features and T5 makes 64; give T5-XXL"),
        ({"patch_size_t": 2}, "2 frames together, without rotary positions"),
        ({"patch_size": 4}, "takes patches of 4 x 4 cells and 1 frames together"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny.pipeline(tiny.write_folder(tmp_path, **changes)).check()
