"""MiniMax-H3: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLMiniMaxH3, MiniMaxH3Transformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_minimax_h3_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_minimax_h3_transformer_checkpoint_to_diffusers
from diffusers.modular_pipelines import PipelineState
from diffusers.modular_pipelines.minimax_h3.before_denoise import patchify_video_latents
from diffusers.modular_pipelines.minimax_h3.encoders import (
    MiniMaxH3FL2VATextEncoderStep,
    encode_vae_condition,
)
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file

from models.assembly.sample_checks import check_sampling
from models.foundation.checkpoints.layouts.minimax_h3 import MINIMAX_H3_LAYOUT
from models.foundation.encoders.minimax_h3_vae import MINIMAX_H3, frame_groups, minimax_h3_latent_size
from models.foundation.encoders.vae import picture_noise
from models.minimax_h3 import MiniMaxH3Pipeline
from tests import test_models as generic
from tests.models import tiny_minimax_h3 as tiny
from tests.models.batches import Batch
from utils.dataset.batches import SampleReader
from utils.dataset.encoding import CacheJob, fill
from utils.dataset.samples import Bucket, version_of_prompt
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.ranks import Ranks
from utils.settings.schema import SamplingSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("minimax_h3"))


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    denoiser = generic.loaded(tiny.pipeline(folder, **options)).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def alone(
    stock: MiniMaxH3Transformer3DModel, text_LF: torch.Tensor, x_Cfhw: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """What the stock module makes of one sample, as its pipeline has it."""
    ids, tags, videos, sounds, lines, *_ = tiny.layout(torch.ones(len(text_LF)), x_Cfhw[None])
    output_1VN, _ = stock(
        hidden_states=patchify_video_latents(x_Cfhw[None], (1, 2, 2))[None],
        audio_hidden_states=torch.empty(1, 0, tiny.SOUND),
        encoder_hidden_states=text_LF[None],
        timestep=1 - t[None],
        timestep_indices=torch.zeros(len(tags), dtype=torch.long),
        token_tags=tags,
        position_ids=ids,
        video_indices=videos,
        audio_indices=sounds,
        text_indices=lines,
        return_dict=False,
    )
    _, frames, height, width = x_Cfhw.shape
    return rearrange(
        output_1VN, "1 (f h w) (c p q) -> c f (h p) (w q)", f=frames, h=height // 2, w=width // 2, p=2, q=2
    )


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(5, 11), (7, 7), (4, 0)])
def test_samples_of_a_batch_are_as_they_are_alone(folder: Path, lengths: tuple[int, int]) -> None:
    """Each with its own text and its own time, in the stock module as it is; of one the caption may be empty."""
    h3, features = tiny.pipeline(folder), tiny.features(lengths)
    x_t, t_B = normal((2, *h3.latent_shape(48, 32, 8)), 0, "x"), torch.tensor([0.2513, 0.913])
    made = generic.output(h3, generic.loaded(h3).layers, Batch(features, x_t, t_B))
    stock = tiny.STOCK.from_pretrained(folder).transformer.eval()
    for number, length in enumerate(lengths):
        text_LF = features["qwen3_vl"][number, :length]
        if length:
            expected = alone(stock, text_LF, x_t[number], t_B[number])
            torch.testing.assert_close(made[number], expected, rtol=1e-4, atol=1e-5)
        else:
            # The stock attention makes nothing of no text.
            one = Batch(tiny.features((0,)), x_t[number, None], t_B[number, None])
            torch.testing.assert_close(made[number, None], generic.output(h3, generic.loaded(h3).layers, one))
    with_other_neighbour = {name: rows.roll(1, 0) for name, rows in features.items()}
    swapped = generic.output(h3, generic.loaded(h3).layers, Batch(with_other_neighbour, x_t.roll(1, 0), t_B.roll(1, 0)))
    torch.testing.assert_close(swapped.roll(1, 0), made, rtol=1e-4, atol=1e-5)


def test_an_empty_caption_goes_through_the_cache(folder: Path, tmp_path: Path) -> None:
    """It has no tokens."""
    encoder = tiny.pipeline(folder).encoders()[1]
    versions = [version_of_prompt(caption, Bucket(48, 32, 8)) for caption in ("", "a fox")]
    fill(encoder, [version.sample for version in versions], CacheJob(tmp_path, folder, Ranks()))
    with SampleReader([encoder], tmp_path) as reader:
        read = [reader.read(version) for version in versions]
    assert [tuple(one["qwen3_vl"].shape) for one in read] == [(0, tiny.TEXT_WIDTH), (5, tiny.TEXT_WIDTH)]
    assert [len(one["qwen3_vl_mask"]) for one in read] == [0, 5]


@torch.no_grad()
def test_a_picture_there_and_back(folder: Path) -> None:
    """Its latent is that of the stock VAE, which decodes none; it is decoded as the first frame of a clip is, whose
    latent frame is alone in its group."""
    h3 = tiny.pipeline(folder, latents="mode")
    autoencoder, stock = h3.encoders()[0], tiny.PixelVae.from_pretrained(folder / "vae")
    autoencoder.load(torch.device("cpu"))
    pixels_BCFHW = normal((2, 3, 1, 32, 48), 0, "pixels").clamp(-1, 1)
    latents = autoencoder.encode(pixels=pixels_BCFHW)["latents"]
    assert tuple(latents.shape[1:]) == h3.latent_shape(48, 32, 1) == (4, 1, 8, 12)
    mean, std = (torch.tensor(tiny.VAE[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    z = stock.encode(pixels_BCFHW).latent_dist.mode()
    torch.testing.assert_close(latents, (z - mean) / std, rtol=1e-4, atol=1e-5)
    decoded = autoencoder.decode(latents)
    group = AutoencoderKLMiniMaxH3.from_pretrained(folder / "vae")._decode_clip(z)
    mean, std = stock._units()
    assert group.shape[2] == 2
    torch.testing.assert_close(decoded, ((group[:, :, 1:] * std + mean) * 2 - 1).clamp(-1, 1), rtol=0, atol=1e-4)


def test_the_vae_may_be_a_file_of_its_publisher(folder: Path, tmp_path: Path) -> None:
    """ComfyUI has the same: heads' queries, keys and values in turn, the gate of a network first, and its mask."""
    stock = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    renamed = {
        "down_blocks.": "down.",
        "resnets.": "block.",
        "downsamplers.0.": "downsample.",
        "conv_shortcut": "nin_shortcut",
        "proj_in": "x_embedder",
        "to_out.0": "to_out",
        "ff.net.0.proj": "ff.w1",
        "ff.net.2": "ff.w2",
    }
    theirs = {"decoder.mask_token": torch.ones(1, 1, 16), "latents_mean": torch.ones(4), "latents_std": torch.ones(4)}
    for name, tensor in stock.items():
        if ".attn.to_k." in name or ".attn.to_v." in name:
            continue
        if ".attn.to_q." in name:
            three = [stock[name.replace("to_q", part)].unflatten(0, (2, 8)) for part in ("to_q", "to_k", "to_v")]
            name, tensor = name.replace("to_q", "to_qkv"), torch.stack(three, dim=1).flatten(0, 2)
        if ".ff.net.0." in name:
            tensor = torch.cat([tensor[len(tensor) // 2 :], tensor[: len(tensor) // 2]])
        for ours, own in renamed.items():
            name = name.replace(ours, own)
        theirs[name] = tensor.contiguous()
    assert "encoder.down.0.downsample.conv.weight" in theirs and "decoder.x_embedder.weight" in theirs
    save_file(theirs, tmp_path / "vae.safetensors")
    read = MINIMAX_H3.load(folder, tmp_path / "vae.safetensors", torch.float32).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in stock.items())


def test_the_vae_computes_in_float32(folder: Path) -> None:
    h3 = tiny.pipeline(folder, dtype="bfloat16")
    assert [encoder.dtype for encoder in h3.encoders()] == [torch.float32, torch.bfloat16]


def test_the_lengths_of_clips(folder: Path) -> None:
    published = MiniMaxH3Pipeline.media
    assert [published.frames(count) for count in (1, 21, 22, 38, 39, 124, 400)] == [1, 1, 22, 22, 39, 124, 345]
    assert published.describe_frames() == "1, 22, 39 ... up to 345 frames"
    h3, of_vae = tiny.pipeline(folder), {"clip_length": 17, "token_drop": 3, "latent_channels": 24}
    of_vae |= {"spatial_downsample_factors": (2, 2, 2, 2, 1, 1), "temporal_downsample_factors": (1, 2, 2, 1, 1, 1)}
    # Every 17 frames the groups begin anew.
    assert frame_groups(of_vae, 39) == [1, 4, 4, 4, 4] * 2 + [1, 4] and frame_groups(of_vae, 1) == [1]
    assert minimax_h3_latent_size(of_vae, 64, 32, 39) == (24, 12, 2, 4)
    assert h3.frame_groups(13) == [1, 2, 2] * 2 + [1, 2]
    media = h3.media
    assert (media.spatial, [media.frames(count) for count in (1, 7, 8, 12, 13)]) == (8, [1, 1, 8, 8, 13])


@torch.no_grad()
@pytest.mark.parametrize("kept", [(0,), (0, -1)])
def test_key_frames_are_read_as_by_the_stock_pipeline(folder: Path, kept: tuple[int, ...]) -> None:
    """Of clips whose last frame is another than the first: labels and pictures before the caption, and latents."""
    h3 = tiny.pipeline(folder, from_first_frame=True, to_last_frame=len(kept) > 1)
    _, text, vae = h3.encoders()
    levels_BCFHW = (normal((2, 3, 8, 32, 48), 0, "clips").clamp(-1, 1) * 127 + 128).to(torch.uint8)
    pixels_BCFHW, levels_BFHWC = levels_BCFHW / 127.5 - 1, levels_BCFHW.permute(0, 2, 3, 4, 1)
    captions, clips = ["a fox", ""], dict.fromkeys(text.reads[1:], pixels_BCFHW)
    for encoder in (text, vae):
        encoder.load(torch.device("cpu"))
    read, drawn = text.encode(caption=captions, **clips), vae.encode(**clips)["key_frame_latents"]
    stock = tiny.STOCK.from_pretrained(folder)
    plain = AutoencoderKLMiniMaxH3.from_pretrained(folder / "vae")
    for number, caption in enumerate(captions):
        pictures = [Image.fromarray(levels_BFHWC[number, frame].numpy()) for frame in kept]
        state = PipelineState()
        state.set("prompt", caption)
        state.set("keyframes", pictures)
        _, state = MiniMaxH3FL2VATextEncoderStep()(stock, state)
        torch.testing.assert_close(read["qwen3_vl"][number], state.get("prompt_embeds")[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(read["qwen3_vl_kinds"][number], state.get("text_token_tags"))
        for place, frame in enumerate(kept):
            levels = levels_BCFHW[number, None, :, [frame]]
            units = stock.pixel_mean, stock.pixel_std, stock.keyframe_encode_seed
            clean = encode_vae_condition(plain, levels, *units)[0, :, 0]
            noise = picture_noise(pixels_BCFHW[number, None, :, [frame]], clean[None, :, None])[0, :, 0]
            # On average, since one of many numbers may be rounded to another one of float16.
            assert (drawn[number, :, place] - torch.lerp(clean, noise, 0.001)).abs().mean() < 1e-5
    shapes = {name: shape for one in (text, vae) for name, (shape, _) in one.feature_shapes(Bucket(48, 32, 8)).items()}
    assert shapes["key_frame_latents"] == tuple(drawn.shape[1:])
    assert shapes["qwen3_vl"] >= tuple(read["qwen3_vl"][0].shape)


def test_clips_from_key_frames_are_not_made_of_stills(folder: Path) -> None:
    h3, keys = tiny.pipeline(folder, from_first_frame=True), {"prompts": ["a fox"], "guidance": 1.0, "frames": 8}
    still = SimpleNamespace(bucket=Bucket(48, 32, 1), media=SimpleNamespace(locator="still.png"))
    (problem,) = h3.problems_of_data([still])
    assert "1 of the samples are still pictures" in problem.message and not tiny.pipeline(folder).problems_of_data(
        [still]
    )
    with pytest.raises(UserError, match="this model makes what it makes of a picture: give one for each prompt"):
        check_sampling(h3, SamplingSettings(**keys, width=48, height=32))


def test_the_settings_of_the_processor_are_asked_for(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path)
    shutil.rmtree(folder / "processor")
    tiny.pipeline(folder).check()
    with pytest.raises(UserError, match="processor"):
        tiny.pipeline(folder, from_first_frame=True).check()


def test_the_publishers_names_are_those_that_the_stock_converter_reads(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tensors_of(folder)
    original = MINIMAX_H3_LAYOUT.to_original(tensors)
    again = convert_minimax_h3_transformer_checkpoint_to_diffusers(dict(original), config={})
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    # Files have the angles too, of which nothing is needed.
    file = {f"diffusion_model.{name}": tensor.contiguous() + 1 for name, tensor in original.items()}
    file["diffusion_model.rope.inv_freq"] = torch.ones(2)
    save_file(file, tmp_path / "minimax_h3.safetensors")
    read = tensors_of(folder, transformer_path=tmp_path / "minimax_h3.safetensors")
    assert all(torch.equal(read[name], tensors[name] + 1) for name in tensors)


def test_comfyuis_names_of_adapters_are_those_that_diffusers_reads(folder: Path) -> None:
    targets = dict(MINIMAX_H3_LAYOUT.targets(tensors_of(folder)))
    theirs = {
        "diffusion_model.blocks.1.attn.qkv_proj",
        "diffusion_model.blocks.1.attn.out_proj",
        "diffusion_model.blocks.1.mlp.fc1",
        "diffusion_model.blocks.1.mlp.fc2",
        "diffusion_model.blocks.1.adaln_proj.linear",
        "diffusion_model.token_refiner.blocks.0.mlp.fc1",
    }
    factors = {f"{name}.lora_{part}.weight": torch.ones(6, 6) for name in theirs for part in "AB"}
    converted = {
        name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        for name in _convert_non_diffusers_minimax_h3_lora_to_diffusers(factors)
        if ".lora_B" not in name
    }
    ours = {part for name in theirs for part in targets[name.removeprefix("diffusion_model.")].modules}
    assert ours == converted and len(ours) == 8


def test_a_pruned_file_is_told(folder: Path, tmp_path: Path) -> None:
    original = MINIMAX_H3_LAYOUT.to_original(tensors_of(folder))
    pruned = {name: tensor.contiguous() for name, tensor in original.items() if "time_embedder" not in name}
    save_file({**pruned, "adaln_t_table": torch.ones(3)}, tmp_path / "pruned.safetensors")
    with pytest.raises(UserError, match="it looks like MiniMax-H3 with a table in place .* give a file that has"):
        tiny.pipeline(folder, transformer_path=tmp_path / "pruned.safetensors").check()


def test_guidance_of_samples_is_to_be_said(folder: Path) -> None:
    """It is distilled: the default would guide what needs none."""
    h3 = tiny.pipeline(folder)
    keys = {"prompts": ["a fox"], "steps": 3, "width": 48, "height": 32, "frames": 8}
    with pytest.raises(UserError, match="guidance: is 3.5 where it is not given, .*set it to 1.0, or to more"):
        check_sampling(h3, SamplingSettings(**keys))
    check_sampling(h3, SamplingSettings(**keys, guidance=1.0))
    check_sampling(h3, SamplingSettings(**keys, guidance=2.0, negative_prompt="blurred"))


def test_one_prediction_less_than_steps(folder: Path) -> None:
    """And each at a noise level of the stock scheduler."""
    scheduler = tiny.pipeline(folder).scheduler()
    scheduler.set_timesteps(num_inference_steps=4)
    levels = [5 * level / (1 + 4 * level) for level in (1.0, 2 / 3, 1 / 3)]
    torch.testing.assert_close(scheduler.timesteps / 1000, torch.tensor(levels))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 8}, "takes latents of 8 channels and the VAE makes 4"),
        ({"text_dim": 8}, "takes text of 8 features behind layer 50 of its text encoder, and that has 52 layers of 16"),
        ({"layers": 50}, "and that has 50 layers of 16; give Qwen3-VL 32B"),
        ({"num_refiner_layers": 0}, "has no `num_refiner_layers`, and MiniMax-H3 has two"),
        ({"patch_size": (1, 1, 1)}, r"has `patch_size` \[1, 1, 1\], and MiniMax-H3 has \[1, 2, 2\]"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny.pipeline(tiny.write_folder(tmp_path, **changes)).check()
