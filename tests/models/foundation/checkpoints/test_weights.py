"""The denoiser's weights from every kind of file, and files that do not fit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from models.flux import BFL_LAYOUT, FluxPipeline
from models.foundation.checkpoints.headers import fingerprint
from tests.models import tiny_flux
from utils.diffusion.seeds import normal
from utils.errors import UserError

Tensors = dict[str, torch.Tensor]
QKV = "double_blocks.0.img_attn.qkv.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def stock() -> FluxTransformer2DModel:
    return tiny_flux.transformer()


def filled(flux: FluxPipeline, layers: slice = slice(None)) -> nn.Module:
    """The denoiser with the weights of some of its layers."""
    denoiser = flux.weights.build()
    flux.weights.fill(denoiser, flux.weights.open(denoiser), flux.to_layers(denoiser)[layers])
    return denoiser


def in_diffusers_folder(place: Path, stock: FluxTransformer2DModel) -> Path:
    stock.save_pretrained(place)
    return place


def in_shards(place: Path, stock: FluxTransformer2DModel) -> Path:
    stock.save_pretrained(place, max_shard_size="100KB")
    assert len(list(place.glob("*.safetensors"))) > 2
    return place


def beside_a_variant(place: Path, stock: FluxTransformer2DModel) -> Path:
    stock.save_pretrained(place)
    other = {name: torch.zeros_like(tensor) for name, tensor in stock.state_dict().items()}
    save_file(other, place / "diffusion_pytorch_model.fp16.safetensors")
    return place


def beside_a_variant_in_shards(place: Path, stock: FluxTransformer2DModel) -> Path:
    other = {name: torch.zeros_like(tensor) for name, tensor in stock.state_dict().items()}
    variant = FluxTransformer2DModel.from_config(stock.config)
    variant.load_state_dict(other)
    variant.save_pretrained(place, variant="fp16", max_shard_size="100KB")
    stock.save_pretrained(place)
    assert list(place.glob("*fp16*.index.json")) or list(place.glob("*.index.fp16.json"))
    return place


def in_diffusers_file(place: Path, stock: FluxTransformer2DModel) -> Path:
    stock.save_pretrained(place)
    return place / "diffusion_pytorch_model.safetensors"


def in_original_file(place: Path, stock: FluxTransformer2DModel) -> Path:
    save_file(BFL_LAYOUT.to_original(stock.state_dict()), place / "flux1.safetensors")
    return place / "flux1.safetensors"


def in_comfyui_checkpoint(place: Path, stock: FluxTransformer2DModel) -> Path:
    """With the other parts of the model in the same file."""
    tensors = {f"model.diffusion_model.{name}": t for name, t in BFL_LAYOUT.to_original(stock.state_dict()).items()}
    save_file({**tensors, "vae.decoder.conv_in.weight": torch.zeros(3)}, place / "all.safetensors")
    return place / "all.safetensors"


@pytest.mark.parametrize(
    "write",
    [
        in_diffusers_folder,
        beside_a_variant,
        beside_a_variant_in_shards,
        in_shards,
        in_diffusers_file,
        in_original_file,
        in_comfyui_checkpoint,
    ],
)
def test_every_kind_of_file_gives_the_same_weights(
    folder: Path,
    tmp_path: Path,
    stock: FluxTransformer2DModel,
    caplog: pytest.LogCaptureFixture,
    write: Callable[[Path, FluxTransformer2DModel], Path],
) -> None:
    with caplog.at_level(logging.WARNING, "models"):
        weights = filled(tiny_flux.pipeline(folder, transformer_path=write(tmp_path, stock))).state_dict()
    assert not caplog.records
    assert weights.keys() == stock.state_dict().keys()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_only_a_stage_takes_memory(folder: Path, stock: FluxTransformer2DModel) -> None:
    denoiser = filled(tiny_flux.pipeline(folder), slice(1, 3))
    held = {name for name, parameter in denoiser.named_parameters() if not parameter.is_meta}
    assert held == {name for name, _ in stock.named_parameters() if name.startswith("transformer_blocks.")}


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("names", [dict, BFL_LAYOUT.to_original], ids=["diffusers", "original"])
def test_stored_types_are_cast(
    folder: Path,
    tmp_path: Path,
    stock: FluxTransformer2DModel,
    stored: torch.dtype,
    kept: torch.dtype,
    names: Callable[[Tensors], Tensors],
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in stock.state_dict().items()}
    save_file(names(tensors), tmp_path / "flux.safetensors")
    options: dict[str, Any] = {
        "transformer_path": tmp_path / "flux.safetensors",
        "transformer_dtype": str(kept).removeprefix("torch."),
    }
    weights = filled(tiny_flux.pipeline(folder, **options)).state_dict()
    for name, tensor in tensors.items():
        assert weights[name].dtype == kept
        assert torch.equal(weights[name], tensor.to(kept)), name


@pytest.mark.parametrize("called", ["scale_weight", "weight_scale"])
def test_scaled_8_bit_files_are_multiplied_out(
    folder: Path, tmp_path: Path, stock: FluxTransformer2DModel, called: str
) -> None:
    """One scale for a fused tensor, which three of the model's are cut from."""
    original = BFL_LAYOUT.to_original(stock.state_dict())
    eighths = (original[QKV] * 8).to(torch.float8_e4m3fn)
    file = tmp_path / "flux.safetensors"
    save_file({**original, QKV: eighths, QKV.replace("weight", called): torch.tensor([0.125])}, file)
    weights = filled(tiny_flux.pipeline(folder, transformer_path=file)).state_dict()
    parts = [weights[f"transformer_blocks.0.attn.to_{part}.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), eighths.float() / 8)


def test_several_scales_of_a_tensor_are_refused(folder: Path, tmp_path: Path, stock: FluxTransformer2DModel) -> None:
    original = BFL_LAYOUT.to_original(stock.state_dict())
    save_file({**original, QKV.replace("weight", "weight_scale"): torch.ones(96, 2)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match="has 192 scales"):
        filled(tiny_flux.pipeline(folder, transformer_path=tmp_path / "flux.safetensors"))


def first_rows(key: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, key: tensors[key][:7].contiguous()}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


MISTAKES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "of stable diffusion": (
        lambda tensors: {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)},
        "the tensor 'time_text_embed.timestep_embedder.linear_1.weight' of the model is not in the file",
    ),
    "empty": (lambda tensors: {}, "is not in the file"),
    "a missing block": (without("single_blocks.1.linear1"), "'single_blocks.1.linear1.weight' is missing"),
    "a missing bias": (without("final_layer.linear.bias"), "'final_layer.linear.bias' is missing"),
    "another size": (first_rows("img_in.weight"), "'img_in.weight' is [7, 16], but the model's configuration asks for"),
    "another size of a fused tensor": (
        first_rows(QKV),
        f"'{QKV}' is [7, 32], but the model's configuration asks for [96, 32]",
    ),
    "fewer columns of a fused tensor": (
        lambda tensors: {**tensors, QKV: tensors[QKV][:, :7].contiguous()},
        f"'{QKV}' is [96, 7], but",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_file_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, stock: FluxTransformer2DModel, mistake: str
) -> None:
    change, message = MISTAKES[mistake]
    file = tmp_path / "flux.safetensors"
    save_file(change(BFL_LAYOUT.to_original(stock.state_dict())), file)
    flux = tiny_flux.pipeline(folder, transformer_path=file)
    with pytest.raises(UserError) as raised:
        flux.weights.open(flux.weights.build())
    assert message in str(raised.value) and str(file) in str(raised.value)


def test_a_missing_shard_is_told(folder: Path, tmp_path: Path, stock: FluxTransformer2DModel) -> None:
    in_shards(tmp_path, stock)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    file = next(iter(index["weight_map"].values()))
    (tmp_path / file).unlink()
    flux = tiny_flux.pipeline(folder, transformer_path=tmp_path)
    with pytest.raises(UserError, match="download it again") as raised:
        flux.weights.open(flux.weights.build())
    assert file in str(raised.value)


def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path, stock: FluxTransformer2DModel) -> None:
    file = in_original_file(tmp_path, stock)
    file.write_bytes(file.read_bytes()[:-100])
    flux = tiny_flux.pipeline(folder, transformer_path=file)
    with pytest.raises(UserError, match="download it again") as raised:
        flux.weights.open(flux.weights.build())
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("changes", [{"num_layers": 1}, {"guidance_embeds": False}], ids=["blocks", "guidance"])
@pytest.mark.parametrize("write", [in_diffusers_file, in_original_file])
def test_more_than_the_configuration_asks_is_told(
    tmp_path: Path,
    stock: FluxTransformer2DModel,
    caplog: pytest.LogCaptureFixture,
    changes: dict,
    write: Callable[[Path, FluxTransformer2DModel], Path],
) -> None:
    """The weights of dev under the configuration of schnell would train, and train something else."""
    (tmp_path / "weights").mkdir()
    file = write(tmp_path / "weights", stock)
    flux = tiny_flux.pipeline(tiny_flux.write_folder(tmp_path, **changes), transformer_path=file)
    with caplog.at_level(logging.WARNING, "models"):
        flux.weights.open(flux.weights.build())
    assert "has no use for" in caplog.text and str(file) in caplog.text


def test_from_scratch_depends_on_the_seed_alone(folder: Path) -> None:
    torch.manual_seed(1)
    one = tiny_flux.pipeline(folder, from_scratch=True).weights.build().state_dict()
    torch.manual_seed(2)
    same = tiny_flux.pipeline(folder, from_scratch=True).weights.build().state_dict()
    flux = tiny_flux.pipeline(folder, from_scratch=True)
    other = FluxPipeline(flux.options, seed=1).weights.build().state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["x_embedder.weight"], other["x_embedder.weight"])


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    values = normal((1000, 1000), 0, "weights")
    for place in ("one", "copy", "other"):
        (tmp_path / place).mkdir()
        save_file({"x": values + (place == "other") * 1e-3}, tmp_path / place / "model.safetensors")
    one, copy, other = (fingerprint("vae", tmp_path / place) for place in ("one", "copy", "other"))
    assert one == copy == fingerprint("vae", tmp_path / "one" / "model.safetensors")
    assert len({one, other, fingerprint("t5", tmp_path / "one"), fingerprint("vae")}) == 4
    assert load_file(tmp_path / "one" / "model.safetensors")["x"].shape == (1000, 1000)
