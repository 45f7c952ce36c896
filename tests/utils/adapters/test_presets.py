"""Adapters that a model has before training: in its weights or beside them, it does what the program that made them
says; and what is trained on top of them is the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.assembly.exports import export_plan
from models.assembly.stage import load_stage
from tests.models import tiny_flux, tiny_sdxl
from tests.models.tiny_flux import STOCK
from tests.models.tiny_folder import settings_of
from utils.adapters.lokr import LokrSettings
from utils.adapters.lora import LoraSettings, LowRankUpdate
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.schema import AdapterSettings

FILES = ["adapter_model.safetensors", "adapter_model_comfyui.safetensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with an effect, in both layouts."""
    place = tmp_path_factory.mktemp("lora") / "out"
    flux = tiny_flux.pipeline(folder)
    chosen = settings_of(flux, LoraSettings(type="lora", rank=4, alpha=2.0), save_format="both")
    staged = load_stage(flux, chosen, stage=0)
    parameters = staged.trained(staged.layers)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(normal(tuple(parameter.shape), 0, "moved", name), alpha=0.2)
    export(place, Ranks(), parameters, export_plan(flux, chosen, staged), 1)
    return place


@torch.no_grad()
def output(folder: Path, adapter: AdapterSettings | None = None, **options: Any) -> torch.Tensor:
    flux = tiny_flux.pipeline(folder, **options)
    layers = load_stage(flux, settings_of(flux, adapter), stage=0).layers
    stream = flux.prepare_inputs(tiny_flux.features((16, 16)), normal((2, 4, 4, 6), 0, "x"), torch.tensor([0.4, 0.8]))
    for layer in layers:
        stream = layer(stream)
    return stream


@torch.no_grad()
def stock_output(folder: Path, *presets: tuple[Path, float]) -> torch.Tensor:
    """What the stock pipeline's transformer does with these adapters."""
    stock = STOCK.from_pretrained(folder)
    for number, (file, _) in enumerate(presets):
        stock.load_lora_weights(file, adapter_name=f"preset{number}")
    if presets:
        stock.set_adapters([f"preset{number}" for number in range(len(presets))], [weight for _, weight in presets])
    x_t, t_B = normal((2, 4, 4, 6), 0, "x"), torch.tensor([0.4, 0.8])
    return tiny_flux.whole(stock.transformer, tiny_flux.pipeline(folder), tiny_flux.features((16, 16)), x_t, t_B)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("weight", [1.0, -0.7])
def test_a_preset_does_what_it_does_in_the_stock_pipeline(folder: Path, lora: Path, fused: bool, weight: float) -> None:
    expected = stock_output(folder, (lora / FILES[0], weight))
    assert (expected - output(folder)).abs().mean() > 0.01
    for file in FILES:
        preset = {"path": lora / file, "weight": weight, "fused": fused}
        torch.testing.assert_close(output(folder, preset_adapters=[preset]), expected, rtol=1e-4, atol=1e-5)


def test_presets_add_up_and_an_adapter_begins_on_top_of_them(folder: Path, lora: Path) -> None:
    expected = stock_output(folder, (lora / FILES[0], 0.5), (lora / FILES[0], 0.8))
    presets = [{"path": lora, "weight": 0.5, "fused": fused} for fused in (True, False)]
    presets[1]["weight"] = 0.8
    made = output(folder, LoraSettings(type="lora", rank=2), preset_adapters=presets)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    beside = [{**preset, "fused": False} for preset in presets]
    torch.testing.assert_close(output(folder, preset_adapters=beside), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", FILES)
def test_a_lokr_begins_on_top_of_them_too(folder: Path, lora: Path, file: str) -> None:
    preset = {"path": lora / file}
    made = output(folder, LokrSettings(type="lokr", factor=4), preset_adapters=[preset])
    torch.testing.assert_close(made, output(folder, preset_adapters=[preset]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_only_the_difference_is_trained(folder: Path, lora: Path, fused: bool) -> None:
    flux = tiny_flux.pipeline(folder, preset_adapters=[{"path": lora, "fused": fused}])
    staged = load_stage(flux, settings_of(flux, LoraSettings(type="lora", rank=2)), stage=0)
    trained = staged.trained(staged.layers)
    assert all(".lora_" in name for name in trained)
    stream = flux.prepare_inputs(tiny_flux.features((16, 16)), normal((2, 4, 4, 6), 0, "x"), torch.tensor([0.4, 0.8]))
    for layer in staged.layers:
        stream = layer(stream)
    stream.square().mean().backward()
    assert all(p.grad is not None for name, p in trained.items() if ".lora_B." in name)
    assert all(p.grad is None for p in staged.denoiser.parameters() if not p.requires_grad)


def test_a_convolutions_update_is_that_of_two_convolutions() -> None:
    down, up = nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.Conv2d(2, 4, 1, bias=False)
    x = normal((1, 3, 5, 5), 0, "x")
    delta = LowRankUpdate(down.weight.detach(), up.weight.detach()).delta(torch.zeros(4, 3, 3, 3))
    torch.testing.assert_close(nn.functional.conv2d(x, delta, padding=1), up(down(x)).detach())


def test_what_does_not_fit_is_told(folder: Path, lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora / FILES[0])
    name = next(key for key in tensors if key.endswith("to_q.lora_A.weight"))
    save_file({**tensors, name: torch.zeros(4, 7)}, tmp_path / "narrow.safetensors")
    renamed = {key.replace("transformer_blocks", "other_blocks"): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "other.safetensors")
    for file, told in (
        ("narrow", r"as if it were \[32, 7\], and it is \[32, 32\]"),
        ("other", "of its .* modules are not this model's, the first is 'transformer.other_blocks"),
    ):
        with pytest.raises(UserError, match=told):
            output(folder, preset_adapters=[{"path": tmp_path / f"{file}.safetensors"}])


def test_kohyas_adapter_of_another_model_is_told(tmp_path: Path) -> None:
    """By the UNet, though it has text encoders too, which might be trained."""
    names = ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_other_blocks_0_attn_to_k")
    factors = {f"{name}.lora_{part}.weight": torch.ones(2, 2) for name in names for part in ("down", "up")}
    save_file(factors, tmp_path / "other.safetensors")
    sdxl = tiny_sdxl.pipeline(
        tiny_sdxl.write_folder(tmp_path), preset_adapters=[{"path": tmp_path / "other.safetensors"}]
    )
    with pytest.raises(UserError, match="2 modules .* the first is 'lora_unet_other.*give an adapter of this model"):
        load_stage(sdxl, settings_of(sdxl), stage=0)
