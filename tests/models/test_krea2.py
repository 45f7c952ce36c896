"""Krea 2: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from models.assembly.prompts import schedule_of
from models.assembly.stage import load_stage
from models.krea2 import KREA2_LAYOUT
from tests.models import tiny_krea2
from tests.models.tiny_folder import settings_of
from utils.errors import UserError
from utils.settings.run_tables import SamplingSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_krea2.write_folder(tmp_path_factory.mktemp("krea2"))


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    krea2 = tiny_krea2.pipeline(folder, **options)
    denoiser = load_stage(krea2, settings_of(krea2), stage=0).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def test_kreas_names_are_those_that_the_stock_converter_reads(folder: Path) -> None:
    tensors = tensors_of(folder)
    original = KREA2_LAYOUT.to_original(tensors)
    assert original["blocks.1.mod.lin"].shape == (6 * 32,)
    again = convert_krea2_transformer_checkpoint_to_diffusers(dict(original))
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_a_modulation_of_another_size_is_told(folder: Path, tmp_path: Path) -> None:
    """In Krea's file its numbers are a single row."""
    original = {name: tensor.contiguous() for name, tensor in KREA2_LAYOUT.to_original(tensors_of(folder)).items()}
    original["blocks.1.mod.lin"] = original["blocks.1.mod.lin"][:-1].contiguous()
    save_file(original, tmp_path / "krea2.safetensors")
    with pytest.raises(UserError, match=r"'blocks.1.mod.lin' is \[191\], but the model's configuration asks for \[192"):
        tiny_krea2.pipeline(folder, transformer_path=tmp_path / "krea2.safetensors").check()


@pytest.mark.parametrize(("distilled", "mu"), [(True, 1.15), (False, 0.5 + 0.65 * (24 - 256) / (6400 - 256))])
def test_the_steps_of_both_models(tmp_path: Path, distilled: bool, mu: float) -> None:
    """24 tokens are a picture of 96 x 64."""
    krea2 = tiny_krea2.pipeline(tiny_krea2.write_folder(tmp_path, index={"is_distilled": distilled}))
    asked = krea2.scheduler()
    asked.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    made = schedule_of(krea2, SamplingSettings(width=96, height=64)).of(4)
    torch.testing.assert_close(made.sigmas, asked.sigmas, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 8}, "takes tokens of 8 numbers and the VAE makes 16; give Qwen-Image's VAE"),
        ({"text_hidden_dim": 8}, "takes text of 8 features and Qwen3-VL makes 16; give Qwen3-VL 4B"),
        ({"num_text_layers": 3}, "reads 3 layers of the text encoder, which has 3, and model_index.json names 0, 2;"),
        ({"index": {"text_encoder_select_layers": [1, 4]}}, "model_index.json names 1, 4; download the folder again"),
        ({"index": {"is_distilled": 1}}, "`is_distilled` is 1, and true or false or null is meant"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    krea2 = tiny_krea2.pipeline(tiny_krea2.write_folder(tmp_path, **changes))
    with pytest.raises(UserError, match=said):
        krea2.check()
