"""LTX-Video: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from models.foundation.checkpoints.layouts.ltx_video import LTX_VIDEO_LAYOUT
from models.foundation.checkpoints.recognition import recognised
from models.foundation.encoders.ltx_vae import ltx_latent_size
from models.foundation.layers.given import loss_weights
from tests import test_models as generic
from tests.models import tiny_ltx_video
from utils.diffusion.seeds import normal
from utils.errors import UserError

OTHER_NAMES = {
    "decoder.mid_block.": "decoder.up_blocks.0.",
    "decoder.up_blocks.0.": "decoder.up_blocks.1.",
    "decoder.up_blocks.1.upsamplers.0.": "decoder.up_blocks.2.",
    "decoder.up_blocks.1.": "decoder.up_blocks.3.",
    "encoder.down_blocks.0.downsamplers.0.": "encoder.down_blocks.1.",
    "encoder.down_blocks.0.": "encoder.down_blocks.0.",
    "encoder.down_blocks.1.": "encoder.down_blocks.3.",
    "encoder.mid_block.": "encoder.down_blocks.9.",
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}
"""What the VAE of 0.9.0 has at the beginning of its names in Lightricks' files, of the parts that the tiny one has."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ltx_video.write_folder(tmp_path_factory.mktemp("ltx_video"))


def test_the_publishers_names_are_those_that_the_stock_converter_reads(folder: Path) -> None:
    denoiser = generic.loaded(tiny_ltx_video.pipeline(folder)).denoiser
    tensors = {name: parameter.detach() for name, parameter in denoiser.named_parameters()}
    original = LTX_VIDEO_LAYOUT.to_original(tensors)
    assert not {"proj_in.weight", "time_embed.linear.weight"} & original.keys()
    again = convert_ltx_transformer_checkpoint_to_diffusers(original)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def lightricks_name(name: str) -> str:
    ours = next((start for start in OTHER_NAMES if name.startswith(start)), "")
    name = OTHER_NAMES.get(ours, "") + name.removeprefix(ours)
    return name.replace("resnets.", "res_blocks.").replace("conv_shortcut.conv.", "conv_shortcut.")


@pytest.mark.parametrize("prefix", ["vae.", ""])
def test_the_publishers_vae_is_read(tmp_path: Path, prefix: str) -> None:
    """With the denoiser in one file, and alone."""
    place = tiny_ltx_video.write_folder(tmp_path)
    tensors = load_file(place / "vae" / "diffusion_pytorch_model.safetensors")
    theirs = {prefix + lightricks_name(name): tensor + 1 for name, tensor in tensors.items()}
    beside = {"model.diffusion_model.patchify_proj.weight": torch.zeros(2)} if prefix else {}
    theirs[f"{prefix}per_channel_statistics.mean-of-stds"] = torch.ones(4)
    save_file({**theirs, **beside}, tmp_path / "ltxv.safetensors")
    autoencoder = tiny_ltx_video.pipeline(place, vae_path=tmp_path / "ltxv.safetensors").encoders()[0]
    autoencoder.check()
    autoencoder.load(torch.device("cpu"))
    read = autoencoder.vae.state_dict()
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name] + 1) for name in read)


def test_the_sizes_of_latents_are_those_that_the_configuration_gives() -> None:
    """0.9.5 halves once more than its sides say: there the configuration has them."""
    config = {"latent_channels": 128, "patch_size": 4, "spatio_temporal_scaling": [True] * 4}
    later = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    assert ltx_latent_size(config, 704, 512, 161) == (128, 11, 8, 11)
    assert ltx_latent_size({**config, **later}, 704, 512, 161) == (128, 21, 16, 22)
    assert ltx_latent_size({**config, "spatio_temporal_scaling": [True] * 3 + [False]}, 704, 512, 9)[1:] == (2, 16, 22)


def test_a_decoder_that_denoises_is_told_that_there_is_no_noise(tmp_path: Path) -> None:
    place = tiny_ltx_video.write_folder(tmp_path, vae={**tiny_ltx_video.VAE, "timestep_conditioning": True})
    ltx = tiny_ltx_video.pipeline(place)
    autoencoder = ltx.encoders()[0]
    autoencoder.load(torch.device("cpu"))
    latents = normal((2, *ltx.latent_shape(32, 64, 5)), 0, "latents")
    vae = autoencoder.vae
    raw = latents * (vae.latents_std / 0.8).view(-1, 1, 1, 1) + vae.latents_mean.view(-1, 1, 1, 1)
    decoded = [vae.decode(raw, torch.full((2,), time)).sample.clamp(-1, 1) for time in (0.0, 0.5)]
    torch.testing.assert_close(autoencoder.decode(latents), decoded[0], rtol=0, atol=1e-5)
    assert (decoded[0] - decoded[1]).abs().max() > 1e-3


@pytest.mark.parametrize("given", [(1, 0), (1, 1)])
def test_a_given_first_frame_has_no_noise_and_the_time_0(folder: Path, given: tuple[int, int]) -> None:
    """As the stock transformer with a time for each token, which the stock pipeline of picture to video gives it; that
    frame does not count, and a sample without a given one is as before."""
    ltx = tiny_ltx_video.pipeline(folder, first_frame_share=0.5)
    staged, shape = generic.loaded(ltx), (2, 4, 3, 4, 6)
    x_t, clean, weights = (normal(shape, 0, name) for name in ("x", "clean", "weights"))
    t_B, given_B = torch.tensor([0.2513, 0.913]), torch.tensor(given)
    features = {**tiny_ltx_video.features((5, 11)), "latents": clean, "given_frames": given_B}
    stream = ltx.prepare_inputs(features, x_t, t_B)
    for layer in staged.layers:
        stream = layer(stream)
    (stream * weights * loss_weights(given_B, 3)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in staged.denoiser.named_parameters()}

    seen, time_BT, counted = x_t.clone(), t_B[:, None].repeat(1, 3 * 4 * 6), torch.ones(shape)
    for sample in given_B.nonzero().flatten():
        seen[sample, :, 0], time_BT[sample, : 4 * 6] = clean[sample, :, 0], 0
        counted[sample, :, 0], counted[sample, :, 1:] = 0.0, 1.5
    reference = generic.loaded(ltx).denoiser
    expected = tiny_ltx_video.whole(reference, ltx, features, seen, time_BT)
    (expected * weights * counted).sum().backward()
    torch.testing.assert_close(stream, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_the_share_of_clips_from_their_first_frame(folder: Path) -> None:
    ltx = tiny_ltx_video.pipeline(folder, first_frame_share=0.25)
    clip, still = ltx.latent_shape(64, 32, 5), ltx.latent_shape(64, 32, 1)
    assert [ltx.given_frames(clip, quantile) for quantile in (0.0, 0.249, 0.25, 0.99)] == [1, 1, 0, 0]
    assert ltx.given_frames(still, 0.0) == 0
    assert tiny_ltx_video.pipeline(folder).given_frames(clip, 0.0) == 0


def test_the_shift_follows_all_frames(folder: Path) -> None:
    """Published: 0.95 at 1024 tokens, 2.05 at 4096, and linear between and beyond."""
    ltx = tiny_ltx_video.pipeline(folder)
    assert ltx.tokens((4, 13, 15, 22)) == 4290
    assert ltx.resolution_shift.mu(4290) == pytest.approx(2.05 + 1.1 * 194 / 3072)


def sample(frames: int, fps: float) -> Any:
    return SimpleNamespace(bucket=SimpleNamespace(frames=frames), fps=fps, media=SimpleNamespace(locator="fox.mp4"))


def test_the_model_is_told_the_frames_per_second_of_its_clips(folder: Path) -> None:
    ltx = tiny_ltx_video.pipeline(folder, frame_rate=12.5)
    entry, plain = (generic.loaded(one).layers[0] for one in (ltx, tiny_ltx_video.pipeline(folder)))
    assert (ltx.media.fps, entry.scale, plain.scale) == (12.5, (2 / 12.5, 8, 8), (2 / 25, 8, 8))
    assert not ltx.problems_of_data([sample(1, 0.0), sample(9, 12.5)])
    (problem,) = ltx.problems_of_data([sample(9, 12.5), sample(9, 25.0)])
    assert "is 25 for fox.mp4, and the model is told that clips have 12.5" in problem.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 16}, "takes latents of 16 channels and the VAE makes 4; give LTX-Video's own VAE"),
        ({"caption_channels": 8}, "takes text of 8 features and T5 makes 64; give T5-XXL"),
        ({"patch_size": 2}, "takes patches of 2 x 2 cells and 1 frames together"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, int], said: str) -> None:
    ltx = tiny_ltx_video.pipeline(tiny_ltx_video.write_folder(tmp_path, **changes))
    with pytest.raises(UserError, match=said):
        ltx.check()


@pytest.mark.parametrize("first", ["audio_patchify_proj.weight", "audio_proj_in.weight"])
def test_a_file_of_ltx_2_is_told_from_this_model(first: str) -> None:
    rest = ("patchify_proj.weight", "time_embed.emb.timestep_embedder.linear_1.weight")
    shapes = {name: (8, 8) for name in (first, *rest, "caption_projection.linear_1.weight")}
    assert recognised(shapes).what == "LTX-2"
