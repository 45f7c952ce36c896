"""Anima: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

import models
from models.anima import ANIMA_LAYOUT, AnimaOptions
from models.assembly.stage import load_stage
from models.foundation.checkpoints import published
from models.foundation.checkpoints.folders import model_index
from tests.models import tiny_anima
from tests.models.tiny_folder import settings_of
from utils.errors import UserError
from utils.settings.model_schema import TextEncoderFile

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_anima.write_folder(tmp_path_factory.mktemp("anima"))


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    anima = tiny_anima.pipeline(folder, **options)
    anima.check()
    denoiser = load_stage(anima, settings_of(anima), stage=0).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def test_comfyuis_file_is_that_of_the_stock_converter_with_the_conditioner(folder: Path) -> None:
    tensors = tensors_of(folder)
    original = ANIMA_LAYOUT.to_original(tensors)
    conditioner = {name: original.pop(name) for name in list(original) if name.startswith("llm_adapter.")}
    assert {name.removeprefix("llm_adapter.") for name in conditioner} == set(
        load_file(folder / "text_conditioner" / WEIGHTS)
    )
    again = convert_cosmos_transformer_checkpoint_to_diffusers({f"net.{name}": one for name, one in original.items()})
    own = {name.removeprefix("transformer."): one for name, one in tensors.items() if name.startswith("transformer.")}
    assert again.keys() == own.keys() and all(torch.equal(again[name], own[name]) for name in own)


def test_the_conditioner_may_be_the_folders(folder: Path, tmp_path: Path) -> None:
    """Where the transformer's file has none."""
    tensors = load_file(folder / "transformer" / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "transformer.safetensors")
    read, own = tensors_of(folder, transformer_path=tmp_path / "transformer.safetensors"), tensors_of(folder)
    moved = {name: tensor + 1 if name.startswith("transformer.") else tensor for name, tensor in own.items()}
    assert all(torch.equal(read[name], moved[name]) for name in own)


def test_single_files_are_the_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's three, and a folder with both tokenizers."""
    content: dict[str, Any] = {"model_index": {"_class_name": "AnimaModularPipeline"}}
    for part in (*tiny_anima.PARTS, "scheduler"):
        file = next(file for file in (folder / part).glob("*config.json") if "generation" not in file.name)
        content[part] = json.loads(file.read_text())
    (tmp_path / "configs" / "anima").mkdir(parents=True)
    (tmp_path / "configs" / "anima" / "tiny.json").write_text(json.dumps(content))
    monkeypatch.setattr(published, "CONFIGS", tmp_path / "configs")
    original = {f"net.{name}": one.contiguous() for name, one in ANIMA_LAYOUT.to_original(tensors_of(folder)).items()}
    save_file(original, tmp_path / "anima.safetensors")
    for part in ("tokenizer", "t5_tokenizer"):
        shutil.copytree(folder / part, tmp_path / "tokenizers" / part)
    keys = {
        "type": "anima",
        "dtype": "float32",
        "transformer_path": tmp_path / "anima.safetensors",
        "vae_path": folder / "vae",
        "text_encoders": [TextEncoderFile(type="qwen3", path=folder / "text_encoder")],
        "tokenizer_path": tmp_path / "tokenizers",
    }
    anima = models.build(AnimaOptions(**keys))
    anima.check()
    texts = [one.encoders()[1] for one in (anima, tiny_anima.pipeline(folder, max_sequence_length=512))]
    made = []
    for encoder in texts:
        encoder.load(torch.device("cpu"))
        made.append(encoder.encode(caption=["a red fox"]))
    assert all(torch.equal(made[0][name][0], made[1][name][0]) for name in made[1])
    shutil.rmtree(tmp_path / "tokenizers" / "t5_tokenizer")
    with pytest.raises(UserError, match=r"tokenizer_path\n  T5's tokenizer is missing"):
        models.build(AnimaOptions(**keys)).check()


def test_a_modular_folder_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "modular_model_index.json").write_text(json.dumps({"_class_name": "AnimaModularPipeline"}))
    assert model_index(tmp_path) == {"_class_name": "AnimaModularPipeline"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 5}, "takes 5 channels and the VAE makes 4; give Qwen-Image's VAE"),
        ({"text_embed_dim": 16}, "takes text of 16 features and the text conditioner makes 24; give those of one"),
        ({"extra_pos_embed_type": "learnable"}, "is of Cosmos 1.0; give Anima, whose"),
        ({"conditioner": {"source_dim": 8}}, "takes text of 8 features and Qwen3 makes 16; give Qwen3 0.6B"),
        ({"conditioner": {"target_vocab_size": 20}}, "tokens, and the text conditioner knows 20; is it another"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    anima = tiny_anima.pipeline(tiny_anima.write_folder(tmp_path, **changes))
    with pytest.raises(UserError, match=said):
        anima.check()


def test_a_folder_without_the_conditioner_is_refused(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "anima"
    shutil.copytree(folder, place, symlinks=True)
    shutil.rmtree(place / "text_conditioner")
    with pytest.raises(UserError, match="text_conditioner: this part is missing"):
        tiny_anima.pipeline(place).check()
