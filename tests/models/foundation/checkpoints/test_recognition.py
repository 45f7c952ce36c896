"""Files are known by their headers: those of every model, in every layout, as what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from models.assembly.stage import load_stage
from models.foundation.checkpoints.folders import model_index
from models.foundation.checkpoints.headers import read_header
from models.foundation.checkpoints.recognition import FOLDERS, recognised
from tests.models.tiny_folder import settings_of, tiny
from utils.errors import UserError


@pytest.fixture(scope="module", params=models.available())
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tiny(request.param).write_folder(tmp_path_factory.mktemp(request.param))


def test_every_folder_is_known_by_its_index(folder: tuple[str, Path]) -> None:
    name, place = folder
    assert FOLDERS[model_index(place)["_class_name"]] == name


UNETS = {"sdxl": 2048, "sd15": 768}
"""What they are known by is the width of the text, which their tiny folders do not have."""


def test_every_model_is_known_in_all_its_layouts(folder: tuple[str, Path], tmp_path: Path) -> None:
    name, place = folder
    if name in UNETS:
        pytest.skip("see the test of UNets")
    pipeline = tiny(name).pipeline(place)
    denoiser = load_stage(pipeline, settings_of(pipeline), stage=0).denoiser
    tensors = {key: parameter.detach() for key, parameter in denoiser.named_parameters()}
    tensors |= {key: read() for key, read in pipeline.weights.beside().items()}
    layouts = [tensors]
    if pipeline.original_layout:
        original = pipeline.original_layout.to_original(tensors)
        layouts += [original, {f"model.diffusion_model.{key}": tensor for key, tensor in original.items()}]
    for number, layout in enumerate(layouts):
        save_file({key: tensor.contiguous() for key, tensor in layout.items()}, tmp_path / f"{number}.safetensors")
        mark = recognised(read_header(tmp_path / f"{number}.safetensors").shapes)
        assert mark is not None and f'"{name}"' in mark.fits, mark


def test_a_file_of_another_type_is_told_without_a_folder(folder: tuple[str, Path]) -> None:
    name, place = folder
    if name in UNETS:
        pytest.skip("see the test of UNets")
    if name == "anima":
        pytest.skip("without what is beside its transformer it has the names of Cosmos-Predict2")
    other = "chroma" if name != "chroma" else "lumina2"
    with pytest.raises(UserError, match=f'set \\[model\\] type = "{name}"'):
        without_folder(other, place / tiny(name).pipeline(place).denoiser_folder)


@pytest.mark.parametrize("name", ["flux", "krea2", "omnigen2", "wan"])
def test_a_model_tells_that_a_file_is_of_another_type(tmp_path: Path, name: str) -> None:
    """Of one architecture, and of several."""
    with pytest.raises(UserError, match='set \\[model\\] type = "chroma"'):
        without_folder(name, tiny("chroma").write_folder(tmp_path) / "transformer")


def without_folder(kind: str, weights: Path) -> None:
    models.build(models.find(kind).Options(type=kind, transformer_path=weights))


@pytest.mark.parametrize(("name", "width"), [*UNETS.items(), (None, 1024), (None, 1280)])
@pytest.mark.parametrize("prefix", ["down_blocks.1.attentions.0", "model.diffusion_model.input_blocks.4.1"])
def test_unets_are_known_by_the_width_of_their_text(name: str | None, width: int, prefix: str) -> None:
    first, other = ("conv_in", "up_blocks.0") if "down" in prefix else ("input_blocks.0.0", "output_blocks.0")
    shapes = {
        f"{first}.weight": (320, 4, 3, 3),
        f"{prefix}.transformer_blocks.0.attn2.to_k.weight": (640, width),
        f"{other}.resnets.0.conv1.weight": (640, 640, 3, 3),
    }
    mark = recognised(shapes)
    assert f'"{name}"' in mark.fits if name else "not trained here" in mark.fits
    if name:
        assert "inpainting" in recognised({**shapes, f"{first}.weight": (320, 9, 3, 3)}).what


def test_other_files_are_told_from_models(tmp_path: Path) -> None:
    flux = tiny("flux")
    place = flux.write_folder(tmp_path)
    kinds = {"vae": "a VAE", "text_encoder": "a text encoder", "text_encoder_2": "a text encoder"}
    for part, what in kinds.items():
        assert recognised(read_header(place / part).shapes).what == what
    assert recognised({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 8)}).what == "an adapter"
    assert recognised({"transformer.blocks.0.attn1.to_q.lora_A.weight": (4, 8)}).what == "an adapter"
    assert recognised({"something.weight": (4, 8)}) is None
    refiners = {f"{name}_refiner.0.norm2.weight": (96,) for name in ("noise", "context", "ref_image")}
    assert recognised(refiners).what == "OmniGen2"


def test_a_wrong_file_is_told_with_what_would_fit(tmp_path: Path) -> None:
    flux, chroma, wan = tiny("flux"), tiny("chroma"), tiny("wan")
    dev, other, clip = (tmp_path / name for name in ("dev", "chroma", "wan"))
    for place in (dev, other, clip):
        place.mkdir()
    flux.write_folder(dev), chroma.write_folder(other), wan.write_folder(clip)
    schnell = tmp_path / "schnell"
    schnell.mkdir()
    flux.write_folder(schnell, guidance_embeds=False)
    adapter = tmp_path / "lora.safetensors"
    save_file({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 32)}, adapter)
    wrong = {
        other / "transformer": 'it looks like Chroma: set \\[model\\] type = "chroma"',
        clip / "transformer": 'set \\[model\\] type = "wan"',
        schnell / "transformer": "it looks like Flux.1 schnell: .* with schnell's folder",
        adapter: "it looks like an adapter: give it as \\[adapter\\] init_from_existing",
        dev / "vae": "it looks like a VAE: give it as \\[model\\] vae_path",
    }
    for file, told in wrong.items():
        with pytest.raises(UserError, match=told):
            flux.pipeline(dev, transformer_path=file).check()
