"""Chroma against diffusers: its layers in a row, its text, its files.

Shapes: B batch, T image tokens, L text tokens, C channels, D width, h w latent cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ChromaPipeline as StockPipeline
from diffusers import ChromaTransformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from transformers import T5EncoderModel

from models.chroma import CHROMA_LAYOUT, ChromaPipeline
from models.flux import grid_positions, pack, unpack
from models.foundation.text_encoders import load_tokenizer
from tests.models import tiny_chroma
from tests.models.tiny_chroma import TEXT_TOKENS
from utils.diffusion.seeds import normal

CAPTIONS = ["a red star", "", "two blue circles and a square " * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chroma.write_folder(tmp_path_factory.mktemp("chroma"))


def whole(chroma: ChromaPipeline) -> tuple[Any, list]:
    """The denoiser with its weights, and its layers."""
    denoiser = chroma.load_denoiser()
    layers = chroma.to_layers(denoiser)
    chroma.fill(denoiser, chroma.open_weights(denoiser), layers)
    return denoiser, layers


def stock_output(
    denoiser: ChromaTransformer2DModel, text: dict, x_BChw: torch.Tensor, t_B: torch.Tensor, tokens: int
) -> torch.Tensor:
    """What the whole module makes of text that is padded to `tokens`, with a Boolean mask: the stock pipeline's mask of
    ones and zeros is added to the scores instead, which leaves the padding in."""
    height, width = x_BChw.shape[2:]
    missing = tokens - text["t5"].shape[1]
    text_BLD = torch.nn.functional.pad(text["t5"], (0, 0, 0, missing))
    mask_BL = torch.nn.functional.pad(text["t5_mask"], (0, missing))
    image_tokens = height * width // 4
    (output,) = denoiser(
        pack(x_BChw),
        text_BLD,
        t_B,
        grid_positions(height, width, image=0),
        torch.zeros(tokens, 3),
        torch.cat([mask_BL, torch.ones(len(t_B), image_tokens, dtype=torch.bool)], dim=1),
        return_dict=False,
    )
    return unpack(output, height, width)


@pytest.mark.parametrize("canvas_hw", [(4, 6), (8, 8)])
def test_layers_equal_the_whole_transformer(folder: Path, canvas_hw: tuple[int, int]) -> None:
    chroma = tiny_chroma.pipeline(folder)
    chroma.check()
    text = tiny_chroma.features((5, 11))
    x_BChw, t_B = normal((2, 4, *canvas_hw), 0, "x"), torch.tensor([0.2513, 0.913])
    weights_BChw = normal((2, 4, *canvas_hw), 0, "loss")

    denoiser, layers = whole(chroma)
    stream = chroma.prepare_inputs(text, x_BChw, t_B)
    for layer in layers:
        stream = layer(stream)
    (stream * weights_BChw).sum().backward()

    reference, _ = whole(chroma)
    expected = stock_output(reference, text, x_BChw, t_B, tokens=11)
    (expected * weights_BChw).sum().backward()

    assert torch.equal(stream, expected)
    gradients = {name: parameter.grad for name, parameter in denoiser.named_parameters()}
    for name, parameter in reference.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name
    padded = stock_output(reference, text, x_BChw, t_B, tokens=TEXT_TOKENS)
    torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-5)


def test_layers_hold_every_parameter_once(folder: Path) -> None:
    chroma = tiny_chroma.pipeline(folder)
    denoiser = chroma.load_denoiser()
    held = [id(p) for layer in chroma.to_layers(denoiser) for p in layer.parameters()]
    assert sorted(held) == sorted(id(p) for p in denoiser.parameters())


@torch.no_grad()
def test_text_is_that_of_the_stock_pipeline(folder: Path) -> None:
    encoder = tiny_chroma.pipeline(folder).encoders()[1]
    encoder.load(torch.device("cpu"))
    made = encoder.encode(caption=CAPTIONS)
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder")
    stock = StockPipeline(None, None, t5, load_tokenizer(folder / "tokenizer"), None)
    text_BLD, mask_BL = stock._get_t5_prompt_embeds(CAPTIONS, max_sequence_length=TEXT_TOKENS, device="cpu")
    for features_LD, expected_LD, mask_L in zip(made["t5"], text_BLD, mask_BL, strict=True):
        assert len(features_LD) == mask_L.sum()
        torch.testing.assert_close(features_LD, expected_LD[: len(features_LD)])


def test_the_publishers_file_is_read_and_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock converter knows one width only; ours is compared with it at the tiny one."""
    chroma = tiny_chroma.pipeline(folder)
    denoiser, _ = whole(chroma)
    tensors = {name: parameter.detach() for name, parameter in denoiser.named_parameters()}
    original = CHROMA_LAYOUT.to_original(tensors)
    width = denoiser.inner_dim
    code = single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers
    constants = tuple(width if constant == 3072 else constant for constant in code.__code__.co_consts)
    monkeypatch.setattr(code, "__code__", code.__code__.replace(co_consts=constants))
    again = code({f"model.diffusion_model.{name}": tensor for name, tensor in original.items()})
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    save_file(original, tmp_path / "chroma.safetensors")
    single, _ = whole(tiny_chroma.pipeline(folder, transformer_path=tmp_path / "chroma.safetensors"))
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in single.named_parameters())
