"""Going on from an adapter: every layout has the effect that it has in the program which wrote it.

Shapes: B batch, T image tokens, L text tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline as StockPipeline
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from models.assembly.stage import StagedModel, load_stage
from models.flux import BFL_LAYOUT, FluxPipeline
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from utils.adapters.attach import base_name
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import generator, normal
from utils.errors import UserError

Tensors = dict[str, torch.Tensor]
RANK, ALPHA = 4, 2.0
TARGETS = [".attn.to_q", ".attn.add_k_proj", "proj_mlp", ".ff.net.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


def trained_by_peft() -> tuple[FluxTransformer2DModel, LoraConfig]:
    """A denoiser with a LoRA of some effect, made without our code."""
    denoiser = tiny_flux.transformer()
    modules = [
        name
        for name, _ in denoiser.named_modules()
        if "blocks" in name and any(name.endswith(target) for target in TARGETS)
    ]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules)
    denoiser.add_adapter(config)
    draw = generator(0, "lora")
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return denoiser, config


def by_diffusers(place: Path) -> Path:
    denoiser, config = trained_by_peft()
    StockPipeline.save_lora_weights(
        place, get_peft_model_state_dict(denoiser), transformer_lora_adapter_metadata=config.to_dict()
    )
    return place / "pytorch_lora_weights.safetensors"


def by_peft(place: Path) -> Path:
    denoiser, config = trained_by_peft()
    adapted = get_peft_model(tiny_flux.transformer(), config)
    adapted.load_state_dict({f"base_model.model.{name}": t for name, t in denoiser.state_dict().items()})
    adapted.save_pretrained(place)
    return place


def by_comfyui(place: Path) -> Path:
    """The names of diffusers with an alpha for each module."""
    denoiser, _ = trained_by_peft()
    tensors = {f"diffusion_model.{name}": t for name, t in get_peft_model_state_dict(denoiser).items()}
    alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(ALPHA) for name in tensors if "lora_A" in name}
    save_file(tensors | alphas, place / "lora.safetensors")
    return place / "lora.safetensors"


def by_kohya(place: Path) -> Path:
    denoiser, _ = trained_by_peft()
    rows = {
        name: module.out_features
        for name, module in tiny_flux.transformer().named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    kohya = BFL_LAYOUT.lora_to_kohya(get_peft_model_state_dict(denoiser), ALPHA / RANK, rows.__getitem__)
    save_file(kohya, place / "lora.safetensors")
    return place / "lora.safetensors"


def gone_on_from(folder: Path, existing: Path, **keys: object) -> tuple[FluxPipeline, StagedModel]:
    flux = tiny_flux.pipeline(folder)
    include = [f"blocks.*{target}" for target in TARGETS]
    keys = {"rank": RANK, "include": include, **keys}
    adapter = LoraSettings(type="lora", init_from_existing=existing, **keys)
    return flux, load_stage(flux, settings_of(flux, adapter), stage=0)


def output(layers: list[torch.nn.Module], flux: FluxPipeline) -> torch.Tensor:
    features = {"t5": normal((1, 16, 64), 0, "t5"), "clip_pooled": normal((1, 32), 0, "clip")}
    stream = flux.prepare_inputs(features, normal((1, 4, 4, 6), 0, "x"), torch.tensor([0.4]))
    for layer in layers:
        stream = layer(stream)
    return stream


@torch.no_grad()
@pytest.mark.parametrize("write", [by_diffusers, by_peft, by_comfyui, by_kohya])
@pytest.mark.parametrize("alpha", [None, ALPHA, 16.0])
def test_every_layout_has_its_writers_effect(
    folder: Path, tmp_path: Path, write: Callable[[Path], Path], alpha: float | None
) -> None:
    """Whatever this run's alpha is: the file's is what it was trained with."""
    flux, staged = gone_on_from(folder, write(tmp_path), alpha=alpha)
    trained, _ = trained_by_peft()
    expected = output(flux.to_layers(trained), flux)
    plain = output(flux.to_layers(tiny_flux.transformer()), flux)

    assert (expected - plain).abs().mean() > 0.01
    torch.testing.assert_close(output(staged.layers, flux), expected, rtol=1e-4, atol=1e-5)


def test_factors_go_on_as_they_are_where_alpha_is_the_same(folder: Path, tmp_path: Path) -> None:
    _, staged = gone_on_from(folder, by_diffusers(tmp_path), alpha=ALPHA)
    trained, _ = trained_by_peft()
    expected = get_peft_model_state_dict(trained)
    loaded = staged.trained(staged.layers)
    assert loaded.keys() == {base_name(name) for name in expected}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_file_without_alpha_has_a_scale_of_one(folder: Path, tmp_path: Path) -> None:
    """As diffusers reads it."""
    tensors = load_file(by_diffusers(tmp_path))
    save_file(tensors, tmp_path / "bare.safetensors")
    _, staged = gone_on_from(folder, tmp_path / "bare.safetensors", alpha=2.0 * RANK)
    for name, parameter in staged.trained(staged.layers).items():
        expected = tensors[f"transformer.{name}"]
        assert torch.equal(parameter, expected / 2 if ".lora_B." in name else expected), name


def other_model(place: Path) -> Path:
    save_file(
        {
            "unet.down_blocks.0.attn.to_q.lora_A.weight": torch.zeros(RANK, 8),
            "unet.down_blocks.0.attn.to_q.lora_B.weight": torch.zeros(8, RANK),
        },
        place / "sdxl.safetensors",
    )
    return place / "sdxl.safetensors"


def other_kohya(place: Path) -> Path:
    names = {"down": (RANK, 8), "up": (8, RANK)}
    save_file(
        {f"lora_unet_input_blocks_4_1_proj_in.lora_{name}.weight": torch.zeros(shape) for name, shape in names.items()},
        place / "sdxl.safetensors",
    )
    return place / "sdxl.safetensors"


def half_an_adapter(place: Path) -> Path:
    tensors = {name: tensor for name, tensor in load_file(by_diffusers(place)).items() if ".lora_B." in name}
    save_file(tensors, place / "half.safetensors")
    return place / "half.safetensors"


def without_a_lora_b(place: Path) -> Path:
    tensors = load_file(by_diffusers(place))
    del tensors[next(name for name in tensors if ".lora_B." in name)]
    save_file(tensors, place / "half.safetensors")
    return place / "half.safetensors"


def whole_model(place: Path) -> Path:
    tiny_flux.transformer().save_pretrained(place)
    return place


def truncated(place: Path) -> Path:
    file = by_kohya(place)
    file.write_bytes(file.read_bytes()[:-10])
    return file


def empty(place: Path) -> Path:
    save_file({}, place / "empty.safetensors")
    return place / "empty.safetensors"


def damaged_configuration(place: Path) -> Path:
    file = by_peft(place)
    (place / "adapter_config.json").write_text("{")
    return file


@pytest.mark.parametrize(
    ("write", "keys", "message"),
    [
        (empty, {}, "this file is empty"),
        (damaged_configuration, {}, "adapter_config.json\n  is not JSON"),
        (by_diffusers, {"rank": 8}, "to that of the file"),
        (by_kohya, {"rank": 8}, "to that of the file"),
        (by_diffusers, {"include": ["to_q"]}, "has no counterpart"),
        (by_kohya, {"include": []}, "more are not in this adapter"),
        (other_model, {}, "1 of its 1 modules are not this model's, the first is 'unet.down_blocks.0.attn.to_q'"),
        (other_kohya, {}, "they look like names of Stable Diffusion"),
        (half_an_adapter, {}, "has no lora_A; is the file whole?"),
        (without_a_lora_b, {}, "has no lora_B; is the file whole?"),
        (whole_model, {}, "no LoRA factors in this file"),
        (truncated, {}, "download it again"),
        (lambda place: place, {}, "no safetensors file here"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, write: Callable[[Path], Path], keys: dict, message: str
) -> None:
    existing = write(tmp_path)
    with pytest.raises(UserError) as raised:
        gone_on_from(folder, existing, **keys)
    assert message in str(raised.value) and str(existing) in str(raised.value)


def test_the_header_goes_before_the_configuration_beside_it(folder: Path, tmp_path: Path) -> None:
    file = by_diffusers(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 100.0}))
    _, staged = gone_on_from(folder, file, alpha=ALPHA)
    name, parameter = next(pair for pair in staged.trained(staged.layers).items() if ".lora_B." in pair[0])
    assert torch.equal(parameter, load_file(file)[f"transformer.{name}"])
