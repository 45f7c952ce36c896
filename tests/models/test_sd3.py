"""Stable Diffusion 3: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from models.assembly.exports import export_plan
from models.assembly.prompts import prompt_encoders
from models.assembly.stage import StagedModel, load_stage
from models.sd3 import Sd3Inputs, Sd3Pipeline
from tests.models import tiny_sd3
from tests.models.tiny_folder import encoded, settings_of
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.export import export

CAPTIONS = ["a hiker on a ridge", ""]
VARIANTS = {
    "3.5 medium": {},
    "3.5 large": {"dual_attention_layers": ()},
    "3 medium": {"dual_attention_layers": (), "qk_norm": None},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3.write_folder(tmp_path_factory.mktemp("sd3"))


def loaded(sd3: Sd3Pipeline) -> StagedModel:
    return load_stage(sd3, settings_of(sd3), stage=0)


@torch.no_grad()
def inputs_of(sd3: Sd3Pipeline, captions: list[str]) -> Sd3Inputs:
    """What the entry takes for these captions."""
    features: dict[str, Any] = {}
    for encoder in prompt_encoders(sd3.encoders()):
        features |= encoded(encoder, captions)
    return sd3.prepare_inputs(features, torch.zeros(len(captions), 4, 8, 8), torch.zeros(len(captions)))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_publishers_file_is_read_as_the_stock_converter_reads_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Also where it holds VAE and text encoders."""
    (tmp_path / "model").mkdir()
    folder = tiny_sd3.write_folder(tmp_path / "model", **changes)
    sd3 = tiny_sd3.pipeline(folder)
    tensors = {name: parameter.detach() for name, parameter in loaded(sd3).denoiser.named_parameters()}
    original = {f"model.diffusion_model.{n}": t for n, t in sd3.original_layout.to_original(tensors).items()}
    again = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)

    others = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1), "text_encoders.t5xxl.x": torch.zeros(1)}
    save_file({**original, **others}, tmp_path / "sd3.safetensors")
    single = tiny_sd3.pipeline(folder, transformer_path=tmp_path / "sd3.safetensors")
    single.check()
    assert all(torch.equal(p, tensors[name]) for name, p in loaded(single).denoiser.named_parameters())


def test_the_table_of_positions_is_that_of_the_file_and_is_exported(folder: Path, tmp_path: Path) -> None:
    """It is not trained, and the stock library wants it in the file all the same."""
    sd3 = tiny_sd3.pipeline(folder)
    settings, staged = settings_of(sd3, save_format="both"), loaded(sd3)
    trained = staged.trained(staged.layers)
    export(tmp_path / "out", Ranks(), trained, export_plan(sd3, settings, staged), step=7)
    again, reading = SD3Transformer2DModel.from_pretrained(
        tmp_path / "out", subfolder="transformer", output_loading_info=True
    )
    assert not reading["missing_keys"] and not reading["unexpected_keys"]
    in_the_file = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")["pos_embed.pos_embed"]
    assert torch.equal(again.pos_embed.pos_embed, in_the_file) and "pos_embed.pos_embed" not in trained
    assert torch.equal(load_file(tmp_path / "out" / "model_comfyui.safetensors")["pos_embed"], in_the_file)


def test_from_scratch_the_positions_are_the_stock_ones(folder: Path) -> None:
    denoiser = tiny_sd3.pipeline(folder, from_scratch=True).weights.build()
    assert torch.equal(denoiser.pos_embed.pos_embed, SD3Transformer2DModel(**tiny_sd3.TRANSFORMER).pos_embed.pos_embed)


@pytest.mark.parametrize("dropped", [[], ["t5"]])
def test_the_text_is_put_together_as_the_stock_pipeline_does(folder: Path, dropped: list[str]) -> None:
    stock = tiny_sd3.STOCK.from_pretrained(folder, **({"text_encoder_3": None} if dropped else {}))
    text_BLD, _, pooled_BP, _ = stock.encode_prompt(
        CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=tiny_sd3.TEXT_TOKENS
    )
    inputs = inputs_of(tiny_sd3.pipeline(folder, drop_text_encoders=dropped), CAPTIONS)
    torch.testing.assert_close(inputs.text_BLD, text_BLD)
    torch.testing.assert_close(inputs.pooled_BP, pooled_BP)


def test_a_clip_that_is_left_out_leaves_zeros_in_its_place(folder: Path) -> None:
    everything = inputs_of(tiny_sd3.pipeline(folder), CAPTIONS)
    widths = {"clip_l": slice(0, tiny_sd3.CLIP_L_WIDTH), "clip_g": slice(tiny_sd3.CLIP_L_WIDTH, 40)}
    for name, place in widths.items():
        expected = everything._replace(text_BLD=everything.text_BLD.clone(), pooled_BP=everything.pooled_BP.clone())
        expected.text_BLD[:, :77, place], expected.pooled_BP[:, place] = 0, 0
        torch.testing.assert_close(inputs_of(tiny_sd3.pipeline(folder, drop_text_encoders=[name]), CAPTIONS), expected)


def test_an_encoder_that_the_folder_lacks_is_left_out_and_told(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    for part in ("text_encoder_3", "tokenizer_3"):
        (tmp_path / part).unlink()
    lacking = tiny_sd3.pipeline(tmp_path)
    with caplog.at_level(logging.WARNING):
        lacking.check()
    assert "no text_encoder_3" in caplog.text
    without = inputs_of(tiny_sd3.pipeline(folder, drop_text_encoders=["t5"]), CAPTIONS)
    torch.testing.assert_close(inputs_of(lacking, CAPTIONS), without)


def test_clip_l_from_a_single_file_is_not_projected(folder: Path, tmp_path: Path) -> None:
    """ComfyUI leaves the projection out, which in the publisher's folder is an identity."""
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    model = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder")
    save_file({n: t for n, t in model.state_dict().items() if "projection" not in n}, tmp_path / "clip_l.safetensors")
    model.text_projection.weight.data.copy_(torch.eye(tiny_sd3.CLIP_L_WIDTH))
    model.save_pretrained(tmp_path / "text_encoder")
    file = {"type": "clip_l", "path": tmp_path / "clip_l.safetensors"}
    single = tiny_sd3.pipeline(folder, text_encoders=[file])
    single.check()
    torch.testing.assert_close(inputs_of(single, CAPTIONS), inputs_of(tiny_sd3.pipeline(tmp_path), CAPTIONS))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"drop_text_encoders": ["clip_l", "clip_g", "t5"]}, "no text encoder is left"),
        ({"drop_text_encoders": ["t5"], "text_encoders": [{"type": "t5", "path": "t5"}]}, "leave one of them out"),
        ({"text_encoders": [{"type": "qwen", "path": "qwen"}]}, "has clip_l, clip_g, t5"),
    ],
)
def test_options_that_contradict_each_other_are_told(folder: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_sd3.pipeline(folder, **options).check()


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ("transformer", {"in_channels": 16}, "takes latents of 16 channels and the VAE makes 4"),
        ("transformer", {"joint_attention_dim": 48}, r"T5 makes \(16, 64\)"),
        ("transformer", {"pooled_projection_dim": 64}, "takes 77 tokens with 64 features of CLIP-L"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "one of SD3Transformer2DModel belongs here"),
        ("text_encoder_2", {"hidden_size": 32}, r"make .*'clip_g': \(77, 32\)"),
        ("text_encoder", {"max_position_embeddings": 248}, r"make .*'clip_l': \(248, 16\)"),
    ],
)
def test_files_of_another_model_are_told(
    folder: Path, tmp_path: Path, part: str, changes: dict[str, Any], told: str
) -> None:
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    file = tmp_path / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError, match=told):
        tiny_sd3.pipeline(tmp_path).check()


def test_a_file_of_another_size_is_told(folder: Path, tmp_path: Path) -> None:
    sd3 = tiny_sd3.pipeline(folder)
    tensors = {name: p.detach() for name, p in loaded(sd3).denoiser.named_parameters()}
    original = sd3.original_layout.to_original(tensors)
    del original["joint_blocks.2.x_block.attn.qkv.weight"]
    save_file(original, tmp_path / "smaller.safetensors")
    with pytest.raises(UserError, match="joint_blocks.2.x_block.attn.qkv.weight"):
        tiny_sd3.pipeline(folder, transformer_path=tmp_path / "smaller.safetensors").check()


def test_time_is_embedded_in_float32_under_bfloat16(folder: Path) -> None:
    """Two noise levels that bfloat16 cannot tell apart; the positions stay float32 too."""
    sd3 = tiny_sd3.pipeline(folder, dtype="bfloat16")
    layers = loaded(sd3).layers
    inputs = sd3.prepare_inputs(tiny_sd3.features((5, 5)), normal((2, 4, 8, 8), 0, "x"), torch.tensor([0.901, 0.9018]))
    low_BD, high_BD = layers[0](inputs._replace(pooled_BP=torch.zeros(2, 40))).time_BD
    assert low_BD.dtype == torch.bfloat16 and not torch.equal(low_BD, high_BD)
    assert layers[0].pos_embed.pos_embed.dtype == torch.float32
