"""HunyuanImage 2.1: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.assembly.stage import load_stage
from models.foundation.checkpoints.layouts.hunyuan_image import APART, FUSED, HUNYUAN_IMAGE_LAYOUT, OWN
from tests import test_models as generic
from tests.models import tiny_hunyuan_image
from tests.models.tiny_folder import encoded, settings_of
from utils.diffusion.seeds import normal
from utils.errors import UserError

CAPTIONS = [
    "a sign that says \"open\", and below 'from nine'",
    "a poster with “two words” and ‘one’",
    'a page with "' + "many words " * 20 + '"',
    "a cat without a word",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> generic.Model:
    place = tiny_hunyuan_image.write_folder(tmp_path_factory.mktemp("hunyuan_image"))
    return generic.Model("hunyuan_image", place, tiny_hunyuan_image)


def tensors_of(model: generic.Model, **options: Any) -> dict[str, torch.Tensor]:
    image = model.pipeline(**options)
    denoiser = load_stage(image, settings_of(image), stage=0).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


@pytest.mark.parametrize(
    ("layout", "prefix", "names"),
    [
        (OWN, "model.model.", ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.norm.query_norm.scale")),
        (FUSED, "", ("double_blocks.0.img_attn_qkv.weight", "single_blocks.1.linear1.bias", "byt5_in.fc3.bias")),
        (APART, "", ("double_blocks.0.txt_attn_k.weight", "single_blocks.1.linear1_mlp.bias", "byt5_in.fc3.bias")),
    ],
    ids=["ComfyUI's", "fused", "apart"],
)
def test_files_of_all_spellings_are_read(
    model: generic.Model, tmp_path: Path, layout: Any, prefix: str, names: tuple[str, ...]
) -> None:
    tensors = tensors_of(model)
    moved = {name: tensor + 1 for name, tensor in tensors.items()}
    original = layout.to_original(moved)
    assert set(names) <= set(original)
    assert torch.equal(original["final_layer.adaLN_modulation.1.bias"].roll(48), moved["norm_out.linear.bias"])
    save_file({prefix + name: tensor.contiguous() for name, tensor in original.items()}, tmp_path / "file.safetensors")
    read = tensors_of(model, transformer_path=tmp_path / "file.safetensors")
    assert all(torch.equal(read[name], moved[name]) for name in tensors)


def test_exports_have_the_names_that_comfyui_does_not_rename(model: generic.Model) -> None:
    assert "double_blocks.0.img_mlp.0.weight" in HUNYUAN_IMAGE_LAYOUT.to_original(tensors_of(model))
    module = "transformer_blocks.0.ff.net.0.proj"
    factors = {f"{module}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    written = HUNYUAN_IMAGE_LAYOUT.lora_to_kohya(factors, 1.0, lambda part: 2)
    assert {name.partition(".")[0] for name in written} == {"lora_unet_double_blocks_0_img_mlp_0"}


@torch.no_grad()
def test_quoted_texts_are_read_as_the_stock_pipeline_reads_them(model: generic.Model) -> None:
    encoder = model.pipeline().encoders()[2]
    made = encoded(encoder, CAPTIONS)
    expected = tiny_hunyuan_image.prompt_features(model.stock(), CAPTIONS)
    for number, features in enumerate(expected):
        assert torch.equal(made["byt5_mask"][number], features["byt5_mask"])
        torch.testing.assert_close(made["byt5"][number], features["byt5"], rtol=1e-4, atol=1e-5)
    assert [int(mask.sum()) for mask in made["byt5_mask"]][2:] == [128, 0]
    assert encoder.truncated == 1


@torch.no_grad()
@pytest.mark.parametrize("quoting", [True, False])
def test_padding_that_no_caption_needs_is_left_out(model: generic.Model, quoting: bool) -> None:
    """One caption alone has no mask, with quoted texts and without; as the stock module, which masks the padding."""
    image = model.pipeline()
    staged = load_stage(image, settings_of(image), stage=0)
    features, x_t = tiny_hunyuan_image.features((7,)), normal((1, *image.latent_shape(96, 64)), 0, "x")
    features["byt5_mask"][:] = quoting
    inputs = image.prepare_inputs(features, x_t, torch.tensor([0.3]))
    assert inputs.both_mask_BL is None and inputs.order_BL.shape[1] == (10 if quoting else 7)
    stream = inputs
    for layer in staged.layers:
        stream = layer(stream)
    expected = tiny_hunyuan_image.whole(staged.denoiser, image, features, x_t, torch.tensor([0.3]))
    torch.testing.assert_close(stream, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_meanflow": True}, "is the distilled model"),
        ({"guidance_embeds": True}, "is the distilled model"),
        ({"patch_size": (1, 1, 1), "rope_axes_dim": (8, 8, 8)}, "is the refiner, which is not trained here"),
        ({"in_channels": 8}, "takes latents of 8 channels and the VAE makes 4; give HunyuanImage's own"),
        ({"text_embed_dim": 8}, "has `text_embed_dim` 8, and its text encoder makes 16; give Qwen2.5-VL 7B"),
        ({"text_embed_2_dim": 4}, "has `text_embed_2_dim` 4, and its text encoder makes 8; give Glyph-ByT5"),
    ],
)
def test_what_does_not_fit_is_told(model: generic.Model, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    for part in model.folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "transformer").unlink()
    transformer = tiny_hunyuan_image.HunyuanImageTransformer2DModel(**{**tiny_hunyuan_image.TRANSFORMER, **changes})
    transformer.save_pretrained(tmp_path / "transformer")
    with pytest.raises(UserError, match=said):
        tiny_hunyuan_image.pipeline(tmp_path).check()
