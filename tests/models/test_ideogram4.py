"""Ideogram 4: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ideogram4_lora_to_diffusers
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas, _resolution_aware_mu
from einops import rearrange
from safetensors.torch import load_file, save_file

from models.assembly.prompts import schedule_of
from models.assembly.sample_checks import check_sampling
from models.assembly.stage import load_stage
from models.foundation.encoders import ideogram4_vae
from models.foundation.encoders.flux2_vae import Flux2Autoencoder
from models.foundation.encoders.ideogram4_vae import IdeogramAutoencoder
from models.ideogram4 import IDEOGRAM4_LAYOUT
from tests.models import tiny_ideogram4
from tests.models.tiny_folder import settings_of
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.settings.run_tables import SamplingSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ideogram4.write_folder(tmp_path_factory.mktemp("ideogram4"))


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    ideogram = tiny_ideogram4.pipeline(folder, **options)
    denoiser = load_stage(ideogram, settings_of(ideogram), stage=0).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def test_the_publishers_file_has_a_scale_for_each_row(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its 8 bits, of which queries, keys and values are one matrix; what is not a matrix is as it is."""
    asked, stored = {}, {}
    for name, tensor in IDEOGRAM4_LAYOUT.to_original(tensors_of(folder)).items():
        asked[name] = stored[name] = tensor
        if name.startswith("layers.") and tensor.ndim == 2:
            scale = 0.5 + normal((len(tensor),), 0, name).abs()
            stored[name] = (tensor / scale[:, None]).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + "weight_scale"] = scale
            asked[name] = stored[name].float() * scale[:, None]
    save_file({name: one.contiguous() for name, one in stored.items()}, tmp_path / "ideogram4.safetensors")
    read = IDEOGRAM4_LAYOUT.to_original(tensors_of(folder, transformer_path=tmp_path / "ideogram4.safetensors"))
    assert "layers.0.attention.qkv.weight" in stored
    assert read.keys() == asked.keys() and all(torch.equal(read[name], asked[name]) for name in asked)
    assert "has no use for" not in caplog.text


def test_comfyuis_names_of_adapters_are_those_that_diffusers_reads(folder: Path) -> None:
    modules = [f"attention.to_{part}" for part in ("q", "k", "v", "out.0")] + ["feed_forward.w2", "adaln_modulation"]
    targets = dict(IDEOGRAM4_LAYOUT.targets(tensors_of(folder)))
    theirs = {f"diffusion_model.layers.1.{name}" for name in ("attention.qkv", "attention.o", *modules[4:])}
    factors = {f"{name}.lora_{part}.weight": torch.ones(6, 6) for name in theirs for part in "AB"}
    converted = {
        name.removesuffix(".lora_A.weight") for name in _convert_non_diffusers_ideogram4_lora_to_diffusers(factors)
    }
    ours = {part for name in theirs for part in targets[name.removeprefix("diffusion_model.")].modules}
    assert (
        ours
        == {f"layers.1.{module}" for module in modules}
        == {name.removeprefix("transformer.") for name in converted if ".lora_B" not in name}
    )


@pytest.mark.parametrize(("width", "height", "steps"), [(64, 96, 5), (2048, 1024, 48)])
def test_the_levels_of_its_steps(folder: Path, width: int, height: int, steps: int) -> None:
    asked = _logit_normal_sigmas(steps, _resolution_aware_mu(height, width, 0.0), std=1.5)
    made = schedule_of(tiny_ideogram4.pipeline(folder), SamplingSettings(width=width, height=height)).of(steps)
    torch.testing.assert_close(made.timesteps / 1000, asked, rtol=1e-6, atol=1e-7)


def test_samples_are_not_guided(folder: Path) -> None:
    ideogram, keys = tiny_ideogram4.pipeline(folder), {"prompts": ["a fox"], "width": 64, "height": 64, "steps": 2}
    check_sampling(ideogram, SamplingSettings(**keys, guidance=1.0))
    with pytest.raises(UserError, match="guidance: is by a second transformer, which is not loaded here; set guid"):
        check_sampling(ideogram, SamplingSettings(**keys))
    with pytest.raises(UserError, match="negative_prompt: .*drawn without guidance; leave it out"):
        check_sampling(ideogram, SamplingSettings(**keys, guidance=1.0, negative_prompt="blurred"))


def test_its_latents_are_not_those_of_flux2(folder: Path) -> None:
    ours, flux2 = (kind(folder, None, torch.float32) for kind in (IdeogramAutoencoder, Flux2Autoencoder))
    assert ours.fingerprint != flux2.fingerprint


@pytest.mark.parametrize("publisher", ["ideogram", "flux2"])
def test_a_file_of_its_vae_may_have_the_statistics_of_flux2(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, publisher: str
) -> None:
    """Whose channels are in another order. Those of the folder are taken for the published ones."""
    own = IdeogramAutoencoder(folder, None, torch.float32)
    own.load(torch.device("cpu"))
    mean, std = own._statistics(torch.empty(0))
    monkeypatch.setattr(ideogram4_vae, "MEAN", tuple(mean.flatten().tolist()))
    monkeypatch.setattr(ideogram4_vae, "STD", tuple(std.flatten().tolist()))
    tensors = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    if publisher == "flux2":
        for name in ("bn.running_mean", "bn.running_var"):
            tensors[name] = rearrange(tensors[name], "(p q c) -> (c p q)", p=2, q=2).contiguous()
    save_file(tensors, tmp_path / "vae.safetensors")
    of_file = IdeogramAutoencoder(folder, tmp_path / "vae.safetensors", torch.float32)
    of_file.load(torch.device("cpu"))
    pixels = normal((1, 3, 1, 64, 32), 0, "pixels").clamp(-1, 1)
    latents = own.encode(pixels=pixels)["latents"]
    assert torch.equal(of_file.encode(pixels=pixels)["latents"], latents)
    assert torch.equal(of_file.decode(latents), own.decode(latents))
    assert of_file.fingerprint != own.fingerprint


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"in_channels": 8}, {}, "takes latents of 8 channels and the VAE makes 16; give Ideogram 4's VAE"),
        ({"llm_features_dim": 8}, {}, "takes text of 8 features, and 13 of the 36 layers of Qwen3-VL make 104"),
        ({"layers": 35}, {}, "13 of the 35 layers"),
        ({}, {"vae_path": "vae"}, "vae_path: makes latents of 16 channels; give Ideogram 4's VAE or Flux.2's, of 128"),
    ],
)
def test_parts_that_do_not_belong_together(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, str], said: str
) -> None:
    folder = tiny_ideogram4.write_folder(tmp_path, **changes)
    ideogram = tiny_ideogram4.pipeline(folder, **{key: folder / part for key, part in options.items()})
    with pytest.raises(UserError, match=said):
        ideogram.check()
