"""Flux.3: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from models.assembly.stage import load_stage
from models.base import BasePipeline
from models.flux3 import FLUX3_LAYOUT
from tests.models import tiny_flux
from tests.models import tiny_flux3 as tiny
from tests.models.tiny_folder import settings_of
from utils.diffusion.seeds import normal
from utils.errors import UserError

TIMES = torch.tensor([0.25, 0.9])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("flux3"))


def loaded(folder: Path, **options: Any) -> Flux3Transformer2DModel:
    flux3 = tiny.pipeline(folder, **options)
    return load_stage(flux3, settings_of(flux3), stage=0).denoiser.eval()


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in loaded(folder, **options).named_parameters()}


def of_layers(flux3: BasePipeline, features: dict[str, torch.Tensor], x_t: torch.Tensor) -> torch.Tensor:
    staged = load_stage(flux3, settings_of(flux3), stage=0)
    stream = flux3.prepare_inputs(features, x_t, TIMES[: len(x_t)])
    for layer in staged.layers:
        stream = layer.eval()(stream)
    return stream


@torch.no_grad()
def test_a_text_is_read_as_if_it_were_alone(folder: Path) -> None:
    """The stock attention sees what a batch adds to the shorter of two texts; alone there is nothing to see."""
    flux3 = tiny.pipeline(folder)
    x_t = normal((2, *flux3.latent_shape(32, 48)), 0, "x")
    both, features = tiny.features((5, 11)), tiny.features((5,))
    made = of_layers(flux3, both, x_t)
    alone = tiny.whole(loaded(folder), flux3, features, x_t[:1], TIMES[:1])
    torch.testing.assert_close(made[:1], alone, rtol=1e-5, atol=1e-5)
    cut = {name: rows[:1, :5] for name, rows in both.items()}
    torch.testing.assert_close(cut["qwen3_vl"], features["qwen3_vl"])
    moved = {**both, "qwen3_vl": both["qwen3_vl"].index_fill(1, torch.arange(5, 11), 3.0)}
    assert torch.equal(of_layers(flux3, moved, x_t)[:1], made[:1])


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(5, 11), (7, 7)])
def test_references(folder: Path, lengths: tuple[int, int]) -> None:
    """Two of them, of other sizes than the picture."""
    flux3 = tiny.pipeline(folder)
    x_t = normal((2, *flux3.latent_shape(32, 48)), 0, "x")
    features = tiny.features(lengths)
    plain = of_layers(flux3, features, x_t)
    for number, name in enumerate(("control", "control_2")):
        shape = (2, *flux3.latent_shape(64, 32 + 32 * number))
        features[f"{name}_latents"] = normal(shape, 0, name)
    made = of_layers(flux3, features, x_t)
    assert (made - plain).abs().mean() > 1e-3
    expected = tiny.whole(loaded(folder), flux3, features, x_t, TIMES)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    names = [encoder.name for encoder in flux3.encoders_for(2)]
    assert names == ["vae", "qwen3_vl", "vae_control", "vae_control_2"]


def test_the_publishers_names_are_those_that_the_stock_converter_reads(folder: Path) -> None:
    tensors = tensors_of(folder)
    again = convert_flux3_transformer_checkpoint_to_diffusers(FLUX3_LAYOUT.to_original(tensors))
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_the_publishers_file_is_read(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And what it has for training alone is told."""
    moved = {name: tensor + 1 for name, tensor in tensors_of(folder).items()}
    original = {**FLUX3_LAYOUT.to_original(moved), "repa_projectors.0.weight": torch.ones(1)}
    save_file({name: tensor.contiguous() for name, tensor in original.items()}, tmp_path / "flux3.safetensors")
    read = tensors_of(folder, transformer_path=tmp_path / "flux3.safetensors")
    assert all(torch.equal(read[name], moved[name]) for name in moved)
    assert "repa_projectors.0.weight" in caplog.text


def test_the_scheduler_is_inferences_unless_the_folder_has_one(folder: Path, tmp_path: Path) -> None:
    assert tiny.pipeline(folder).scheduler().config.shift == 6.93
    own = tiny.write_folder(tmp_path)
    FlowMatchEulerDiscreteScheduler(shift=4.2).save_pretrained(own / "scheduler")
    assert tiny.pipeline(own).scheduler().config.shift == 4.2


def test_its_folder_is_known_by_the_index_of_blocks(folder: Path) -> None:
    with pytest.raises(UserError, match=r'Flux3ModularPipeline: set \[model\] type = "flux3"') as told:
        tiny_flux.pipeline(folder).check_folder()
    assert "modular_model_index.json" in str(told.value)


def test_a_part_that_is_to_be_had_elsewhere(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path)
    place = folder / "modular_model_index.json"
    index = json.loads(place.read_text())
    address = {"pretrained_model_name_or_path": "Qwen/Qwen3-VL-4B-Instruct", "subfolder": ""}
    place.write_text(json.dumps({**index, "text_encoder": ["transformers", "Qwen3VLModel", address]}))
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError) as told:
        tiny.pipeline(folder).check()
    said = str(told.value)
    assert "it is of Qwen/Qwen3-VL-4B-Instruct by modular_model_index.json: download it here, as `text_encoder`" in said
    assert "vae: this part is missing; download the whole diffusers folder" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"flow_map": True}, "is the Flux.3 that was distilled to fewer steps"),
        ({"in_channels": 8}, "has `in_channels` 8 and the VAE makes latents of 16 channels"),
        ({"cond_in_channels": 8}, "has `cond_in_channels` 8 and the VAE makes latents of 16 channels"),
        ({"joint_attention_dim": 16}, "takes text of 16 features and Qwen3-VL makes 128"),
    ],
)
def test_models_that_are_not_trained(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny.pipeline(tiny.write_folder(tmp_path, **changes)).check()
