"""VAEs of Wan's kind from files with the publisher's names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.foundation.checkpoints.stock import of_diffusers
from models.foundation.encoders.vae import Family
from models.foundation.encoders.video_vae import QWEN_IMAGE, WAN
from tests.models.tiny_folder import randomised
from utils.errors import UserError

CONFIG = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
"""With as many blocks as the published one: by their numbers diffusers knows which is which."""
IN_A_BLOCK = {"norm1": 0, "conv1": 2, "norm2": 3, "conv2": 6}
# What diffusers calls it -> what Wan's publisher calls it.
ORIGINAL_NAMES: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"^(encoder|decoder)\.conv_in", r"\1.conv1"),
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"norm_out", "head.0"),
    (r"conv_out", "head.2"),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}"),
    (r"down_blocks", "downsamples"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}"),
    (r"conv_shortcut", "shortcut"),
    (r"(middle|samples)\.(\d+)\.(norm\d|conv\d)", lambda m: f"{m[1]}.{m[2]}.residual.{IN_A_BLOCK[m[3]]}"),
]


def original(name: str) -> str:
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize("family", [WAN, QWEN_IMAGE], ids=["wan", "qwen_image"])
def test_a_file_in_the_publishers_names_is_read(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(0)
    randomised(of_diffusers(family.model_class)(**CONFIG), 1).save_pretrained(tmp_path / "vae")
    expected = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "original.safetensors"
    save_file({original(name): tensor for name, tensor in expected.items()}, file)
    assert "decoder.upsamples.4.residual.2.weight" in load_file(file)
    for source in (None, file):
        weights = family.load(tmp_path, source, torch.float32).state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_another_familys_folder_is_refused(tmp_path: Path) -> None:
    of_diffusers(WAN.model_class)(**CONFIG).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="a configuration of AutoencoderKLWan; one of AutoencoderKLQwenImage"):
        QWEN_IMAGE.load(tmp_path, None, torch.float32)
