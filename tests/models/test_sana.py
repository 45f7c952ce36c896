"""Sana: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.loaders.single_file_utils import convert_sana_transformer_to_diffusers
from safetensors.torch import save_file

from models.foundation.checkpoints.layouts.sana import SANA_LAYOUT
from models.foundation.checkpoints.recognition import recognised
from tests import test_models as generic
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


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    denoiser = generic.loaded(tiny.pipeline(folder, **options)).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def test_the_publishers_file_is_read(tmp_path: Path) -> None:
    """Of Sana 1.5, which has more tensors: what diffusers' own converter makes of it, and what it has no use for."""
    folder = tiny.write_folder(tmp_path, qk_norm="rms_norm_across_heads")
    tensors = tensors_of(folder)
    original = SANA_LAYOUT.to_original(tensors)
    further = {"y_embedder.y_embedding": torch.ones(300, 16), "pos_embed": torch.ones(1, 64, 32)}
    stock = convert_sana_transformer_to_diffusers({**original, **further})
    # It knows no Sana 1.5.
    assert {name for name in tensors if name not in stock} == {
        f"transformer_blocks.{number}.{attention}.norm_{part}.weight"
        for number in range(tiny.TRANSFORMER["num_layers"])
        for attention in ("attn1", "attn2")
        for part in "qk"
    }
    assert all(torch.equal(stock[name], tensors[name]) for name in stock)
    for there, here in (("attn", "attn1"), ("cross_attn", "attn2")):
        for part in "qk":
            norm = tensors[f"transformer_blocks.1.{here}.norm_{part}.weight"]
            assert torch.equal(original[f"blocks.1.{there}.{part}_norm.weight"], norm)
    moved = {name: tensor.contiguous() + 1 for name, tensor in {**original, **further}.items()}
    save_file({**moved, "logvar_linear.bias": torch.ones(1)}, tmp_path / "sana.safetensors")
    read = tensors_of(folder, transformer_path=tmp_path / "sana.safetensors")
    assert all(torch.equal(read[name], tensors[name] + 1) for name in tensors)


OF_BLOCKS = (
    (r"\.(?:down|up)_blocks\.(\d+)\.(\d+)\.", r".stages.\1.op_list.\2."),
    (r"\.attn\.to_qkv_multiscale\.0\.proj_in", ".context_module.main.aggreg.0.0"),
    (r"\.attn\.to_qkv_multiscale\.0\.proj_out", ".context_module.main.aggreg.0.1"),
    (r"\.attn\.to_out\.", ".context_module.main.proj.conv."),
    (r"\.attn\.norm_out\.", ".context_module.main.proj.norm."),
    (r"\.conv_out\.conv_(inverted|depth|point)\.", r".local_module.main.\1_conv.conv."),
    (r"\.conv_out\.norm\.", ".local_module.main.point_conv.norm."),
    (r"(op_list\.\d+)\.(conv[12])\.", r"\1.main.\2.conv."),
    (r"(op_list\.\d+)\.norm\.", r"\1.main.conv2.norm."),
    (r"(op_list\.\d+)\.conv\.", r"\1.main.conv.conv."),
    (r"^(encoder|decoder)\.conv_in\.", r"\1.project_in.conv."),
    (r"^encoder\.conv_out\.", "encoder.project_out.0.conv."),
    (r"^decoder\.norm_out\.", "decoder.project_out.0."),
    (r"^decoder\.conv_out\.", "decoder.project_out.2.conv."),
)
"""The names of a deep compression autoencoder in diffusers, and in its publisher's files."""


def test_the_publishers_autoencoder_is_read(folder: Path, tmp_path: Path) -> None:
    stock = AutoencoderDC.from_pretrained(folder / "vae").state_dict()
    original: dict[str, torch.Tensor] = {}
    for name, tensor in stock.items():
        if name.endswith((".attn.to_k.weight", ".attn.to_v.weight")):
            continue
        for pattern, there in OF_BLOCKS:
            name = re.sub(pattern, there, name)
        original[name] = tensor.clone()
    for name in [name for name in original if name.endswith(".attn.to_q.weight")]:
        here = re.sub(r"\.stages\.(\d+)\.op_list", lambda found: f".{{}}_blocks.{found[1]}", name)
        here = here.format("down" if name.startswith("encoder") else "up")
        parts = [stock[here.replace("to_q", f"to_{part}")] for part in "qkv"]
        fused = torch.cat([original.pop(name), *parts[1:]])[:, :, None, None]
        original[name.replace(".attn.to_q.", ".context_module.main.qkv.conv.")] = fused
    original |= {
        name: tensor[:, :, None, None] for name, tensor in original.items() if name.endswith(".proj.conv.weight")
    }
    assert not any("_blocks." in name or ".attn." in name for name in original)
    save_file({name: tensor.contiguous() + 1 for name, tensor in original.items()}, tmp_path / "dc_ae.safetensors")
    autoencoder = tiny.pipeline(folder, vae_path=tmp_path / "dc_ae.safetensors").encoders()[0]
    autoencoder.check()
    autoencoder.load(torch.device("cpu"))
    read = autoencoder.vae.state_dict()
    assert read.keys() == stock.keys() and all(torch.equal(read[name], stock[name] + 1) for name in stock)


@pytest.mark.parametrize("part", ["cfg_embedder.mlp.0.weight", "time_embed.guidance_embedder.linear_1.weight"])
def test_what_was_distilled_is_told(part: str) -> None:
    own = {"blocks.0.mlp.depth_conv.conv.weight": (11200, 1, 3, 3), "attention_y_norm.weight": (2240,)}
    stock = {"transformer_blocks.0.ff.conv_depth.weight": (11200, 1, 3, 3), "caption_norm.weight": (2240,)}
    shapes = own if part.startswith("cfg") else stock
    assert recognised(shapes).fits == 'set [model] type = "sana"'
    assert recognised({**shapes, part: (2240, 256)}).what == "Sana Sprint"


def test_sizes_of_published_folders_are_taken(tmp_path: Path) -> None:
    """Those for 2048 and 4096 pixels have a fraction where the class says a whole number."""
    pipeline = tiny.pipeline(tiny.write_folder(tmp_path, interpolation_scale=2.0))
    pipeline.check()
    assert pipeline.weights.build_empty().config.interpolation_scale == 2.0
