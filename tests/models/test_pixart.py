"""PixArt: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtAlphaPipeline
from safetensors.torch import save_file

from models.foundation.checkpoints.layouts.pixart import PIXART_LAYOUT
from tests import test_models as generic
from tests.models import tiny_pixart, tiny_pixart_alpha
from tests.models.batches import Batch
from utils.diffusion.seeds import normal
from utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pixart_alpha.write_folder(tmp_path_factory.mktemp("pixart_alpha"))


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    denoiser = generic.loaded(tiny_pixart.pipeline(folder, **options)).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def test_the_publishers_file_is_read(folder: Path, tmp_path: Path) -> None:
    """Under the publisher's names, of those of a model that is told sizes too; with the text that is none there."""
    tensors = tensors_of(folder)
    original = PIXART_LAYOUT.to_original(tensors)
    qkv = [tensors[f"transformer_blocks.1.attn1.to_{part}.weight"] for part in "qkv"]
    assert torch.equal(original["blocks.1.attn.qkv.weight"], torch.cat(qkv))
    kv = [tensors[f"transformer_blocks.1.attn2.to_{part}.bias"] for part in "kv"]
    assert torch.equal(original["blocks.1.cross_attn.kv_linear.bias"], torch.cat(kv))
    second = tensors["adaln_single.emb.aspect_ratio_embedder.linear_2.weight"]
    assert torch.equal(original["ar_embedder.mlp.2.weight"], second)
    assert {"blocks.0.scale_shift_table", "final_layer.scale_shift_table", "t_block.1.weight"} <= original.keys()
    moved = {name: tensor.contiguous() + 1 for name, tensor in original.items()}
    further = {"y_embedder.y_embedding": torch.ones(120, 64), "pos_embed": torch.ones(1, 16, 24)}
    save_file({**moved, **further}, tmp_path / "pixart.safetensors")
    read = tensors_of(folder, transformer_path=tmp_path / "pixart.safetensors")
    assert all(torch.equal(read[name], tensors[name] + 1) for name in tensors)


@torch.no_grad()
def test_alpha_is_told_the_size_of_a_picture(folder: Path) -> None:
    """Height and width in pixels, and how they relate; Sigma is told neither."""
    alpha = tiny_pixart.pipeline(folder)
    x_t = normal((2, *alpha.latent_shape(48, 32)), 0, "x")
    inputs = alpha.prepare_inputs(tiny_pixart.features((5, 11)), x_t, torch.tensor([0.2, 0.9]))
    assert inputs.size_B2.tolist() == [[32.0, 48.0]] * 2
    torch.testing.assert_close(inputs.ratio_B1, torch.full((2, 1), 32 / 48))
    batch = Batch(tiny_pixart.features((5, 11)), x_t, torch.tensor([0.2, 0.9]))
    layers = generic.loaded(alpha).layers
    made, stream = generic.output(alpha, layers, batch), inputs._replace(size_B2=inputs.size_B2 * 4)
    for layer in layers:
        stream = layer(stream)
    assert (stream - made).abs().mean() > 1e-3


def test_as_many_tokens_as_inference_reads(folder: Path, tmp_path: Path) -> None:
    sigma = tiny_pixart.write_folder(tmp_path)
    lengths = [
        tiny_pixart.pipeline(one, max_sequence_length=asked).encoders()[1].token_limit
        for one, asked in ((folder, None), (sigma, None), (sigma, 20))
    ]
    assert lengths == [120, 300, 20]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 8}, "takes latents of 8 channels and the VAE makes 4"),
        ({"out_channels": 4}, "takes 4 channels and gives 4, and PixArt gives twice as many"),
        ({"caption_channels": 16}, "takes text of 16 features and its T5 makes 64; give T5-XXL"),
        ({"patch_size": 1}, "has patches of side 1; give PixArt, whose are 2"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny_pixart.pipeline(tiny_pixart.write_folder(tmp_path, **changes)).check()


def test_captions_are_read_in_small_letters(folder: Path) -> None:
    encoder = tiny_pixart.pipeline(folder).encoders()[1]
    encoder.load(torch.device("cpu"))
    stock = PixArtAlphaPipeline.from_pretrained(folder)
    (expected,) = tiny_pixart.prompt_features(stock, [" A Red FOX "])
    made = encoder.encode(caption=[" A Red FOX ", "a red fox"])["t5"]
    torch.testing.assert_close(made[0], expected["t5"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made[0], made[1])
