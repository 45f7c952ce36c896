"""HunyuanVideo: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from models.assembly.stage import load_stage
from models.foundation.checkpoints.layouts.hunyuan_video import HUNYUAN_VIDEO_LAYOUT
from models.foundation.checkpoints.recognition import recognised
from models.foundation.encoders.llava import LlavaEncoder
from models.foundation.layers.given import loss_weights
from tests import test_models as generic
from tests.models import tiny_hunyuan_video, tiny_hunyuan_video_i2v
from tests.models.tiny_folder import settings_of, tiny
from utils.dataset.samples import Bucket
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.media.writing import tensor_to_image
from utils.settings.model_schema import TextEncoderFile

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
        ({"in_channels": 8}, "takes 8 channels, and the VAE makes 4, of which a model with .* null takes 4; give Hun"),
        ({"text_embed_dim": 8}, "has `text_embed_dim` 8, and its text encoder makes 16; give LLaVA-Llama-3-8B"),
        ({"pooled_projection_dim": 8}, "has `pooled_projection_dim` 8, and its text encoder makes 32; give CLIP-L"),
        ({"image_condition_type": "token_replace"}, "is a configuration of llama; one of llava belongs here"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    hunyuan = tiny_hunyuan_video.pipeline(tiny_hunyuan_video.write_folder(tmp_path, **changes))
    with pytest.raises(UserError, match=said):
        hunyuan.check()


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (
            {"txt_in.individual_token_refiner.blocks.0.norm1.weight": (8,), "time_r_in.mlp.0.weight": (8, 4)},
            "the distilled HunyuanImage",
        ),
        ({"txt_in.individual_token_refiner.blocks.0.norm1.weight": (8,)}, "the refiner of HunyuanImage"),
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


@pytest.fixture(scope="module", params=["hunyuan_video_i2v", "hunyuan_video_i2v_33"])
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> generic.Model:
    module = tiny(request.param)
    return generic.Model(request.param, module.write_folder(tmp_path_factory.mktemp(request.param)), module)


@torch.no_grad()
def test_captions_are_read_with_the_first_frame_as_the_stock_pipeline_reads_them(variant: generic.Model) -> None:
    """Together as one after the other, and where they are cut."""
    captions = ["a hiker on a ridge", "", "two motorcycles and a dog " * 5]
    pixels = normal((3, 3, 5, 32, 48), 0, "clips").clamp(-1, 1)
    pipeline, stock = variant.pipeline(), variant.stock()
    stride = {"token_replace": 4, "latent_concat": 2}[stock.transformer.config.image_condition_type]
    encoder = pipeline.encoders()[1]
    encoder.check()
    encoder.load(torch.device("cpu"))
    made = encoder.encode(caption=captions, pixels=pixels)
    assert encoder.truncated == 1
    for number, caption in enumerate(captions):
        how = {"image_embed_interleave": stride, "max_sequence_length": tiny_hunyuan_video.TEXT_TOKENS}
        picture = tensor_to_image(pixels[number][:, :1])
        ((text_LD,), _, (mask_L,)) = stock.encode_prompt(
            picture, [caption], prompt_template=variant.tiny.TEMPLATE, **how
        )
        torch.testing.assert_close(made["llama"][number], text_LD[mask_L.bool()], rtol=1e-4, atol=1e-5)
        assert len(made["llama_mask"][number]) == mask_L.sum()
    (longest, _), _ = encoder.feature_shapes(Bucket(48, 32, 5))["llama"]
    assert longest >= max(map(len, made["llama"]))


def test_a_first_frame_in_place_of_the_noisy_one_does_not_count(variant: generic.Model) -> None:
    """One that is given as further channels is made again, and counts."""
    given = variant.pipeline().given_frames((4, 3, 4, 6), 0.9)
    assert given == (variant.name == "hunyuan_video_i2v")
    assert loss_weights(torch.tensor([given]), 3).flatten().tolist() == ([0.0, 1.5, 1.5] if given else [1.0] * 3)


def test_still_pictures_teach_a_model_of_clips_nothing(variant: generic.Model, folder: Path) -> None:
    still = SimpleNamespace(bucket=Bucket(48, 32, 1), media=SimpleNamespace(locator="fox.png"))
    clip = SimpleNamespace(bucket=Bucket(48, 32, 5))
    (problem,) = variant.pipeline().problems_of_data([clip, still])
    assert problem.message.startswith("1 of the samples are still pictures, the first is fox.png")
    assert not variant.pipeline().problems_of_data([clip])
    assert not tiny_hunyuan_video.pipeline(folder).problems_of_data([clip, still])


def test_a_tokenizer_without_the_picture_is_refused(tmp_path: Path) -> None:
    place = tiny("hunyuan_video_i2v").write_folder(tmp_path)
    tiny_hunyuan_video.tokenizer().save_pretrained(place / "tokenizer")
    with pytest.raises(UserError, match="this tokenizer knows another <image> than the encoder in text_encoder"):
        tiny_hunyuan_video.pipeline(place).check()


def halves(folder: Path, place: Path) -> tuple[Path, Path]:
    """LLaVA as ComfyUI's two files: what reads, under the names of a Llama, and what sees."""
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    reading, seeing = place / "llava_llama3.safetensors", place / "llava_llama3_vision.safetensors"
    prefix, tower = "language_model.", "vision_tower."
    save_file({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, reading)
    seen = {n.replace(tower, "vision_model."): t for n, t in tensors.items() if not n.startswith(prefix)}
    save_file(seen, seeing)
    return reading, seeing


@torch.no_grad()
def test_llava_may_be_two_files(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    folder = tiny_hunyuan_video_i2v.write_folder(tmp_path / "whole")
    reading, seeing = halves(folder, tmp_path)
    caption, pixels_BCFHW = ["a red ball"], normal((1, 3, 5, 32, 48), 0, "pixels").clamp(-1, 1)

    def encoder(**options: Any) -> LlavaEncoder:
        pipeline = tiny_hunyuan_video_i2v.pipeline(folder, **options)
        pipeline.check()
        return next(one for one in pipeline.encoders() if isinstance(one, LlavaEncoder))

    text = {"text_encoders": [TextEncoderFile(type="llama", path=reading)]}
    whole, joined = encoder(), encoder(**text, image_encoder_path=seeing)
    assert whole.fingerprint != joined.fingerprint
    for one in (whole, joined):
        one.load(torch.device("cpu"))
    found, expected = (one.encode(caption, pixels_BCFHW) for one in (joined, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(a, b) for name in expected for a, b in zip(found[name], expected[name], strict=True))

    with pytest.raises(UserError, match="holds what reads captions alone; give the file of what sees"):
        encoder(**text)
    with pytest.raises(UserError, match=r"has no tensors `multi_modal_projector\.\*`"):
        encoder(**text, image_encoder_path=reading)
    with pytest.raises(UserError, match="is the half with which the text encoder 'llama' sees: give the half"):
        encoder(image_encoder_path=seeing)
    other = tiny_hunyuan_video.pipeline(tiny_hunyuan_video.write_folder(tmp_path), image_encoder_path=seeing)
    with pytest.raises(UserError, match="this one makes clips of text alone; leave it out"):
        other.check()
