"""HunyuanVideo: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from safetensors.torch import save_file

from models.assembly.stage import load_stage
from models.foundation.checkpoints.layouts.hunyuan_video import HUNYUAN_VIDEO_LAYOUT
from models.foundation.checkpoints.recognition import recognised
from tests.models import tiny_hunyuan_video
from tests.models.tiny_folder import settings_of
from utils.diffusion.seeds import normal
from utils.errors import UserError

WIDTH = 3072
"""That of the published model, by which the stock converter takes fused weights apart."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hunyuan_video.write_folder(tmp_path_factory.mktemp("hunyuan_video"))


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    hunyuan = tiny_hunyuan_video.pipeline(folder, **options)
    denoiser = load_stage(hunyuan, settings_of(hunyuan), stage=0).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def test_the_publishers_names_are_those_that_the_stock_converter_reads(folder: Path) -> None:
    tensors = tensors_of(folder)
    for name, tensor in tensors.items():
        if name.startswith("single_transformer_blocks.") and any(part in name for part in (".to_", ".proj_mlp.")):
            shape = (4 * WIDTH if "proj_mlp" in name else WIDTH, *[1] * (tensor.dim() - 1))
            tensors[name] = normal(shape, 0, name)
    again = convert_hunyuan_video_transformer_to_diffusers(HUNYUAN_VIDEO_LAYOUT.to_original(tensors))
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("layout", "prefix", "sample"),
    [
        (HUNYUAN_VIDEO_LAYOUT, "", "double_blocks.0.img_attn_q_norm.weight"),
        (HUNYUAN_VIDEO_LAYOUT.own, "model.model.", "double_blocks.0.img_attn.norm.query_norm.scale"),
        (HUNYUAN_VIDEO_LAYOUT.own, "", "txt_in.c_embedder.in_layer.weight"),
    ],
    ids=["Tencent's", "ComfyUI's checkpoint", "ComfyUI's"],
)
def test_files_of_both_spellings_are_read(folder: Path, tmp_path: Path, layout: Any, prefix: str, sample: str) -> None:
    tensors = tensors_of(folder)
    moved = {name: tensor + 1 for name, tensor in tensors.items()}
    original = layout.to_original(moved)
    assert sample in original
    save_file({prefix + name: tensor.contiguous() for name, tensor in original.items()}, tmp_path / "file.safetensors")
    read = tensors_of(folder, transformer_path=tmp_path / "file.safetensors")
    assert all(torch.equal(read[name], moved[name]) for name in tensors)


def test_adapters_are_written_in_comfyuis_names_and_read_in_both() -> None:
    """ComfyUI matches kohya's underscores with its own names alone, and musubi-tuner writes Tencent's."""
    factors = {
        f"{module}.lora_{side}.weight": torch.ones(2, 2)
        for module in ("transformer_blocks.0.ff.net.0.proj", "single_transformer_blocks.0.norm.linear")
        for side in "AB"
    }
    written = HUNYUAN_VIDEO_LAYOUT.lora_to_kohya(factors, 1.0, lambda part: 2)
    assert {name.partition(".")[0] for name in written} == {
        "lora_unet_double_blocks_0_img_mlp_0",
        "lora_unet_single_blocks_0_modulation_lin",
    }
    weights = {name.replace("lora_A.", "") for name in factors}
    read = {there: target.modules for there, target in HUNYUAN_VIDEO_LAYOUT.targets(weights)}
    for there in ("double_blocks.0.img_mlp.0", "double_blocks.0.img_mlp.fc1"):
        assert read[there] == ("transformer_blocks.0.ff.net.0.proj",)


@torch.no_grad()
def test_texts_without_padding_bring_no_mask(folder: Path) -> None:
    hunyuan = tiny_hunyuan_video.pipeline(folder)
    shape, t_B = (2, *hunyuan.latent_shape(48, 32, 5)), torch.tensor([0.25, 0.9])
    features, x_t = tiny_hunyuan_video.features((7, 7)), normal((2, *hunyuan.latent_shape(48, 32, 5)), 0, "x")
    staged = load_stage(hunyuan, settings_of(hunyuan), stage=0)
    stream = hunyuan.prepare_inputs(features, x_t, t_B)
    assert stream.text_mask_BL is None
    for layer in staged.layers:
        stream = layer(stream)
    expected = tiny_hunyuan_video.whole(staged.denoiser, hunyuan, features, x_t, t_B)
    assert stream.shape == shape
    torch.testing.assert_close(stream, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_guidance_of_training_is_an_input(folder: Path) -> None:
    """As the stock pipeline tells it: times 1000."""
    hunyuan = tiny_hunyuan_video.pipeline(folder, guidance=6.0)
    features, x_t = tiny_hunyuan_video.features((3,)), normal((1, *hunyuan.latent_shape(32, 32)), 0, "x")
    assert hunyuan.prepare_inputs(features, x_t, torch.tensor([0.5])).guidance_B.tolist() == [6000.0]
    assert hunyuan.prepare_inputs(features, x_t, torch.tensor([0.5]), guidance=2.0).guidance_B.tolist() == [2000.0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 8}, "takes 8 channels, and the VAE makes 4; give HunyuanVideo of text to video"),
        ({"text_embed_dim": 8}, "takes text of 8 features and `llama` makes 16; give the Llama of LLaVA"),
        ({"pooled_projection_dim": 8}, "takes text of 8 features and `clip` makes 32; give CLIP-L"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    hunyuan = tiny_hunyuan_video.pipeline(tiny_hunyuan_video.write_folder(tmp_path, **changes))
    with pytest.raises(UserError, match=said):
        hunyuan.check()


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ({"txt_in.individual_token_refiner.blocks.0.norm1.weight": (8,), "cond_type_embedding.weight": (3, 8)}, "1.5"),
        ({"txt_in.individual_token_refiner.blocks.0.norm1.weight": (8,), "byt5_in.fc1.weight": (8, 4)}, "Image 2.1"),
        (
            {
                "txt_in.individual_token_refiner.blocks.0.norm1.weight": (8,),
                "vector_in.in_layer.weight": (8, 8),
                "img_in.proj.weight": (8, 32, 1, 2, 2),
            },
            "SkyReels",
        ),
    ],
)
def test_files_of_its_relatives_are_told_apart(names: dict[str, tuple[int, ...]], what: str) -> None:
    found = recognised(names)
    assert what in found.what and "not trained here" in found.fits
