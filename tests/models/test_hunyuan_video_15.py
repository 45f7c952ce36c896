"""HunyuanVideo 1.5: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.foundation.checkpoints.layouts.hunyuan_video_15 import APART, FUSED, HUNYUAN_VIDEO_15_LAYOUT, OWN
from models.foundation.checkpoints.recognition import recognised
from models.foundation.encoders.hunyuan_prompts import ASSISTED
from tests import test_models as generic
from tests.models import tiny_hunyuan_video_15, tiny_hunyuan_video_15_i2v, tiny_qwen_image
from tests.models.tiny_folder import encoded_as_loaded
from utils.dataset.samples import Bucket
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.media.writing import tensor_to_image

CAPTIONS = [
    "a sign that says “open”, and below \"from nine\" and 'to five'",
    'twice "open" and “open”',
    'a page with "' + "many words " * 40 + '"',
    "a cat without a word",
]
PICTURE_TOKENS = 729


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> generic.Model:
    place = tiny_hunyuan_video_15.write_folder(tmp_path_factory.mktemp("hunyuan_video_15"))
    return generic.Model("hunyuan_video_15", place, tiny_hunyuan_video_15)


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> generic.Model:
    place = tiny_hunyuan_video_15_i2v.write_folder(tmp_path_factory.mktemp("hunyuan_video_15_i2v"))
    return generic.Model("hunyuan_video_15_i2v", place, tiny_hunyuan_video_15_i2v)


def tensors_of(model: generic.Model, **options: Any) -> dict[str, torch.Tensor]:
    denoiser = generic.loaded(model.pipeline(**options)).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


@pytest.mark.parametrize(
    ("layout", "prefix", "names"),
    [
        (APART, "", ("double_blocks.0.txt_attn_k.weight", "vision_in.proj.4.bias", "cond_type_embedding.weight")),
        (FUSED, "", ("double_blocks.0.img_attn_qkv.weight", "time_in.mlp.2.bias", "byt5_in.fc3.bias")),
        (OWN, "model.model.", ("double_blocks.0.img_attn.qkv.weight", "time_in.out_layer.bias")),
    ],
    ids=["Tencent's", "fused", "ComfyUI's"],
)
def test_files_of_all_spellings_are_read(
    model: generic.Model, tmp_path: Path, layout: Any, prefix: str, names: tuple[str, ...]
) -> None:
    tensors = tensors_of(model)
    moved = {name: tensor + 1 for name, tensor in tensors.items()}
    original = layout.to_original(moved)
    assert set(names) <= set(original)
    theirs = {prefix + name: tensor.contiguous() for name, tensor in original.items()}
    assert recognised({name: tensor.shape for name, tensor in theirs.items()}).what == "HunyuanVideo 1.5"
    save_file(theirs, tmp_path / "file.safetensors")
    read = tensors_of(model, transformer_path=tmp_path / "file.safetensors")
    assert all(torch.equal(read[name], moved[name]) for name in tensors)


def test_exports_have_names_that_comfyui_reads(model: generic.Model) -> None:
    """It renames Tencent's as it loads a model, but not with underscores."""
    assert "double_blocks.0.img_attn_qkv.weight" in HUNYUAN_VIDEO_15_LAYOUT.to_original(tensors_of(model))
    module = "transformer_blocks.0.ff.net.0.proj"
    factors = {f"{module}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    written = HUNYUAN_VIDEO_15_LAYOUT.lora_to_kohya(factors, 1.0, lambda part: 2)
    assert {name.partition(".")[0] for name in written} == {"lora_unet_double_blocks_0_img_mlp_0"}


@torch.no_grad()
def test_the_publishers_vae_is_read(model: generic.Model, tmp_path: Path) -> None:
    tensors = {name: one + 1 for name, one in load_file(next((model.folder / "vae").glob("*.safetensors"))).items()}
    theirs = {}
    for name, tensor in tensors.items():
        for here, there in (
            ("mid_block.resnets.0.", "mid.block_1."),
            ("mid_block.resnets.1.", "mid.block_2."),
            ("mid_block.attentions.0.to_", "mid.attn_1."),
            ("mid_block.attentions.0.", "mid.attn_1."),
            ("down_blocks.", "down."),
            ("up_blocks.", "up."),
            (".resnets.", ".block."),
            (".downsamplers.0.", ".downsample."),
            (".upsamplers.0.", ".upsample."),
        ):
            name = name.replace(here, there)
        theirs[name] = tensor
    assert {"encoder.mid.attn_1.q.weight", "encoder.mid.attn_1.norm.gamma", "decoder.up.0.upsample.conv.conv.bias"} <= (
        theirs.keys()
    )
    save_file(theirs, tmp_path / "vae.safetensors")
    autoencoder = model.pipeline(vae_path=tmp_path / "vae.safetensors").encoders()[0]
    autoencoder.load(torch.device("cpu"))
    read = autoencoder.vae.state_dict()
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)


@torch.no_grad()
@pytest.mark.parametrize("older", [False, True])
def test_the_text_model_is_read_from_a_file_of_the_whole(model: generic.Model, tmp_path: Path, older: bool) -> None:
    """With transformers' names, and with the older ones of the publisher's and ComfyUI's files."""
    whole = {name: tensor.clone() for name, tensor in tiny_qwen_image.text_encoder(layers=4).state_dict().items()}
    if older:
        shorter = (("model.language_model.", "model."), ("model.visual.", "visual."))
        names = {name: reduce(lambda known, pair: known.replace(*pair), shorter, name) for name in whole}
        whole = {names[name]: tensor for name, tensor in whole.items()}
    save_file(whole, tmp_path / "qwen.safetensors")
    texts = [{"type": "qwen2_5_vl", "path": tmp_path / "qwen.safetensors"}]
    encoder = model.pipeline(text_encoders=texts).encoders()[1]
    encoder.check()
    encoder.load(torch.device("cpu"))
    beginning = "model." if older else "model.language_model."
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, whole[beginning + name]), name


def test_the_prompt_is_that_of_the_stock_pipeline(model: generic.Model) -> None:
    """Word by word, as the tiny tokenizer does not show whether spaces are told apart."""
    stock = model.stock()
    messages = [{"role": "system", "content": stock.system_message}, {"role": "user", "content": "a cat"}]
    written = stock.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ASSISTED.format("a cat") == written
    encoder = model.pipeline().encoders()[1]
    assert encoder.features.skipped == stock.prompt_template_encode_start_idx


@torch.no_grad()
def test_quoted_texts_are_read_as_the_stock_pipeline_reads_them(model: generic.Model) -> None:
    encoder = model.pipeline().encoders()[2]
    encoder.load(torch.device("cpu"))
    made = encoded_as_loaded(encoder, CAPTIONS)
    for number, features in enumerate(tiny_hunyuan_video_15.prompt_features(model.stock(), CAPTIONS)):
        assert torch.equal(made["byt5_mask"][number], features["byt5_mask"])
        torch.testing.assert_close(made["byt5"][number], features["byt5"], rtol=1e-4, atol=1e-5)
    assert [int(mask.sum()) for mask in made["byt5_mask"]][2:] == [256, 0]
    assert encoder.truncated == 1
    texts = [encoder.features.written(encoder.tokenizer, caption) for caption in CAPTIONS[:2]]
    assert texts == ['Text "open". Text "from nine". ', 'Text "open". ']


@torch.no_grad()
@pytest.mark.parametrize("quoting", [True, False])
@pytest.mark.parametrize("lengths", [(7,), (5, 11)])
def test_what_no_caption_needs_is_left_out(model: generic.Model, lengths: tuple[int, ...], quoting: bool) -> None:
    """The padding, and in text to video the many tokens of a picture that is not there, which the stock module masks.
    One caption alone has no mask."""
    video, batch = model.pipeline(), len(lengths)
    staged = generic.loaded(video)
    features, x_t = tiny_hunyuan_video_15.features(lengths), normal((batch, *video.latent_shape(64, 32, 5)), 0, "x")
    t_B = torch.tensor([0.3, 0.9][:batch])
    features["byt5_mask"][:] = quoting
    inputs = video.prepare_inputs(features, x_t, t_B)
    assert (inputs.all_mask_BL is None) == (batch == 1)
    longest = max(length + quoting * (max(lengths) // 2) for length in lengths)
    assert inputs.order_BL.shape == (batch, longest)
    stream = inputs
    for layer in staged.layers:
        stream = layer(stream)
    expected = tiny_hunyuan_video_15.whole(staged.denoiser, video, features, x_t, t_B, PICTURE_TOKENS)
    torch.testing.assert_close(stream, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_first_frame_is_seen_as_the_stock_pipeline_sees_it(i2v: generic.Model) -> None:
    pixels = normal((2, 3, 5, 32, 64), 0, "clips").clamp(-1, 1)
    stock, (_, _, _, latents, siglip) = i2v.stock(), i2v.pipeline().encoders()
    made = {}
    for encoder in (latents, siglip):
        encoder.check()
        encoder.load(torch.device("cpu"))
        made |= encoder.encode(pixels=pixels)
    for number in range(2):
        picture = tensor_to_image(pixels[number][:, :1])
        seen = stock.encode_image(picture, 1, "cpu", torch.float32)
        torch.testing.assert_close(made["siglip_vision"][number], seen[0], rtol=1e-4, atol=1e-5)
        given, _ = stock.prepare_cond_latents_and_mask(torch.empty(1, 4, 2, 2, 4), picture, 1, 32, 64, None, "cpu")
        # A picture has whole levels of colour.
        torch.testing.assert_close(made["first_frame_latents"][number], given[0, :, :1], rtol=0, atol=0.05)
    assert siglip.feature_shapes(Bucket(64, 32, 5))["siglip_vision"][0] == made["siglip_vision"].shape[1:]


def test_still_pictures_teach_a_model_of_clips_nothing(model: generic.Model, i2v: generic.Model) -> None:
    still = SimpleNamespace(bucket=Bucket(64, 32, 1), media=SimpleNamespace(locator="fox.png"))
    assert len(i2v.pipeline().problems_of_data([still])) == 1 and not model.pipeline().problems_of_data([still])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_meanflow": True}, "is the step-distilled model"),
        ({"in_channels": 14}, "takes 14 channels, and the VAE makes 4, of which this model takes 9; give Hunyuan"),
        ({"text_embed_dim": 8}, "has `text_embed_dim` 8, and its text encoder makes 16; give Qwen2.5-VL 7B"),
        ({"text_embed_2_dim": 4}, "has `text_embed_2_dim` 4, and its text encoder makes 8; give Glyph-ByT5"),
        ({"image_embed_dim": 12}, "has `image_embed_dim` 12, and its image encoder makes 8; give SigLIP's"),
    ],
)
def test_what_does_not_fit_is_told(i2v: generic.Model, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    for part in i2v.folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "transformer").unlink()
    config = {**tiny_hunyuan_video_15.TRANSFORMER, **changes}
    tiny_hunyuan_video_15.HunyuanVideo15Transformer3DModel(**config).save_pretrained(tmp_path / "transformer")
    with pytest.raises(UserError, match=said):
        tiny_hunyuan_video_15.pipeline(tmp_path).check()


def test_the_step_distilled_file_is_told_apart() -> None:
    names = ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "cond_type_embedding.weight")
    found = recognised(dict.fromkeys((*names, "time_r_in.mlp.0.weight"), (8, 8)))
    assert found.what == "the step-distilled HunyuanVideo 1.5" and "not trained here" in found.fits
