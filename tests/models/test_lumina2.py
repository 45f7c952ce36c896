"""Lumina Image 2.0 against diffusers where it is special: rows of unequal texts, the system prompt, ComfyUI's files.

Shapes: B batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers
from safetensors.torch import save_file
from transformers import Gemma2ForCausalLM, Gemma2Model

from models.assembly.stage import StagedModel, load_stage
from models.lumina2 import COMFYUI_LAYOUT, PROMPT_MARK, SYSTEM_PROMPT, Lumina2Pipeline
from tests.models import tiny_lumina2
from tests.models.tiny_folder import encoded, settings_of
from tests.models.tiny_lumina2 import STOCK, TEXT_TOKENS
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.settings.schema import AdapterSettings

T_B = torch.tensor([0.2513, 0.913])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lumina2.write_folder(tmp_path_factory.mktemp("lumina2"))


def loaded(pipeline: Lumina2Pipeline, adapter: AdapterSettings | None = None) -> StagedModel:
    return load_stage(pipeline, settings_of(pipeline, adapter), stage=0)


def predicted(pipeline: Lumina2Pipeline, staged: StagedModel, features: dict, x_t: torch.Tensor) -> torch.Tensor:
    stream = pipeline.prepare_inputs(features, x_t, T_B[: len(x_t)])
    for layer in staged.layers:
        stream = layer(stream)
    return stream


@pytest.mark.parametrize("lengths", [(1, 40), (40, 7), (9, 9)])
@pytest.mark.parametrize("size", [(32, 48), (128, 64)])
def test_rows_of_unequal_texts_are_those_of_the_stock_module(
    folder: Path, lengths: tuple[int, int], size: tuple[int, int]
) -> None:
    pipeline = tiny_lumina2.pipeline(folder)
    x_t, features = normal((2, *pipeline.latent_shape(*size)), 0, "x"), tiny_lumina2.features(lengths)
    ours, reference, weights = loaded(pipeline), loaded(pipeline).denoiser, normal(tuple(x_t.shape), 0, "loss")
    result = predicted(pipeline, ours, features, x_t)
    (result * weights).sum().backward()
    expected = tiny_lumina2.whole(reference, pipeline, features, x_t, T_B)
    (expected * weights).sum().backward()
    assert torch.equal(result, expected)
    for parameter, other in zip(ours.denoiser.parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


@torch.no_grad()
def test_a_caption_does_not_see_what_the_batch_adds_to_it(folder: Path) -> None:
    pipeline, lengths = tiny_lumina2.pipeline(folder), (5, 40)
    staged, x_t, features = loaded(pipeline), normal((2, 4, 6, 4), 0, "x"), tiny_lumina2.features(lengths)
    alone_LD = features["gemma2"][:1, : lengths[0]]
    alone = {"gemma2": alone_LD, "gemma2_mask": torch.ones(1, lengths[0], dtype=torch.bool)}
    assert pipeline.prepare_inputs(alone, x_t[:1], T_B[:1]).text_mask_BL is None
    expected = predicted(pipeline, staged, alone, x_t[:1])
    padding = normal(tuple(features["gemma2"].shape), 1, "padding") * ~features["gemma2_mask"][..., None]
    for text_BLD in (features["gemma2"], features["gemma2"] + padding):
        together = predicted(pipeline, staged, {**features, "gemma2": text_BLD}, x_t)
        torch.testing.assert_close(together[:1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_captions_are_read_behind_the_system_prompt(folder: Path) -> None:
    """An empty one is read alone. Negative prompts too are read behind it, unlike in the stock pipeline."""
    stock = STOCK.from_pretrained(folder)
    assert stock.system_prompt == SYSTEM_PROMPT
    captions, empty = ["a red star", ""], stock.encode_prompt("", max_sequence_length=TEXT_TOKENS)[2:]
    negative = SYSTEM_PROMPT + PROMPT_MARK + captions[0]
    same = stock.encode_prompt("", negative_prompt=negative, max_sequence_length=TEXT_TOKENS)[2:]
    other = stock.encode_prompt(captions[0], system_prompt="Draw:", max_sequence_length=TEXT_TOKENS)[:2]
    made = encoded(tiny_lumina2.pipeline(folder).encoders()[1], captions)["gemma2"]
    made += encoded(tiny_lumina2.pipeline(folder, system_prompt="Draw:").encoders()[1], captions)["gemma2"]
    assert [len(text_LD) for text_LD in made[1::2]] == [1, 1]
    for text_LD, (expected_1LD, mask_1L) in zip(made, (same, empty, other, empty), strict=True):
        torch.testing.assert_close(text_LD, expected_1LD[mask_1L.bool()], rtol=1e-4, atol=1e-5)


def test_the_cache_tells_system_prompts_apart(folder: Path) -> None:
    own, other = (tiny_lumina2.pipeline(folder, **keys).encoders()[1] for keys in ({}, {"system_prompt": "Draw:"}))
    assert own.fingerprint != other.fingerprint


@torch.no_grad()
def test_a_text_encoder_file_is_read_and_the_system_prompt_is_counted(folder: Path, tmp_path: Path) -> None:
    """With the names of the whole language model and a tokenizer beside them, as ComfyUI's files have them."""
    model = Gemma2ForCausalLM(Gemma2Model.from_pretrained(folder / "text_encoder").config)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("model.")}
    words = torch.zeros(8, dtype=torch.uint8)
    save_file({**tensors, "spiece_model": words}, tmp_path / "gemma.safetensors")
    file = {"type": "gemma2", "path": tmp_path / "gemma.safetensors"}
    encoder = tiny_lumina2.pipeline(folder, text_encoders=[file]).encoders()[1]
    encoder.check()
    encoder.load(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(encoder.model.parameters(), model.model.parameters(), strict=True))
    # Each byte is a token.
    room = TEXT_TOKENS - len("b" + SYSTEM_PROMPT + PROMPT_MARK)
    made = encoder.encode(caption=["a" * room, "a" * (room + 1)])
    assert encoder.truncated == 1 and [len(text_LD) for text_LD in made["gemma2"]] == [TEXT_TOKENS] * 2


def test_the_publishers_names_are_those_that_the_stock_converter_reads(folder: Path) -> None:
    """The stock converter splits by the heights of the published model, which the projections have here."""
    rows = {"to_q": 2304, "to_k": 768, "to_v": 768}
    tensors = {}
    for name, parameter in loaded(tiny_lumina2.pipeline(folder)).denoiser.named_parameters():
        height = rows.get(name.split(".")[-2])
        tensors[name] = normal((height, 2), 0, name) if height else parameter.detach()
    again = convert_lumina2_to_diffusers(COMFYUI_LAYOUT.to_original(tensors))
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_a_single_file_may_have_a_norm_that_nothing_applies(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {
        name: parameter.detach()
        for name, parameter in loaded(tiny_lumina2.pipeline(folder)).denoiser.named_parameters()
    }
    file = tmp_path / "lumina2.safetensors"
    save_file({**COMFYUI_LAYOUT.to_original(tensors), "norm_final.weight": torch.ones(96)}, file)
    single = loaded(tiny_lumina2.pipeline(folder, transformer_path=file)).denoiser
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in single.named_parameters())
    assert not caplog.messages


@torch.no_grad()
def test_a_lora_in_comfyuis_names_adds_to_its_fused_weights(folder: Path) -> None:
    """Queries have twice as many heads as keys and values."""
    staged = loaded(tiny_lumina2.pipeline(folder), LoraSettings(type="lora", rank=4, alpha=2.0))
    modules = [f"layers.0.attn.to_{part}" for part in "qkv"]
    weights = {module: staged.denoiser.get_submodule(module).base_layer.weight for module in modules}
    factors = {
        f"{module}.{name}.weight": normal(shape, 0, module, name)
        for module in modules
        for name, shape in (("lora_A", (4, 96)), ("lora_B", (len(weights[module]), 4)))
    }
    made = COMFYUI_LAYOUT.lora_to_kohya(factors, 0.5, lambda module: len(weights[module]))
    name = "lora_unet_layers_0_attention_qkv"
    added = 0.5 * made[f"{name}.lora_up.weight"] @ made[f"{name}.lora_down.weight"]
    deltas = {
        f"{module}.weight": 0.5 * factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
        for module in modules
    }
    torch.testing.assert_close(added, COMFYUI_LAYOUT.to_original(deltas)["layers.0.attention.qkv.weight"])
    assert made[f"{name}.alpha"] == 0.5 * len(made[f"{name}.lora_down.weight"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"patch_size": 4}, "has patches of side 4"),
        ({"in_channels": 16}, "takes latents of 16 channels and the VAE makes 4"),
        ({"cap_feat_dim": 24}, "takes text of 24 features and Gemma makes 16"),
        ({"axes_lens": [256, 32, 32]}, "256 tokens are more than this model has places for; set at most 255"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_lumina2.pipeline(tiny_lumina2.write_folder(tmp_path, **changes)).check()


@torch.no_grad()
def test_the_longest_caption_has_a_position(tmp_path: Path) -> None:
    """256 tokens of text have the places 0 to 255, and the picture has 256."""
    pipeline = tiny_lumina2.pipeline(tiny_lumina2.write_folder(tmp_path, axes_lens=[257, 32, 32]))
    pipeline.check()
    longest = tiny_lumina2.features((TEXT_TOKENS,))
    assert predicted(pipeline, loaded(pipeline), longest, normal((1, 4, 4, 4), 0)).isfinite().all()
