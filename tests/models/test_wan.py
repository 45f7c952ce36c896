"""Wan: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from models.foundation.placement import load_stage
from models.wan import WAN_LAYOUT
from tests.models import tiny_flux, tiny_wan
from tests.models.painted import paint
from tests.processes import run_ranks
from utils.diffusion.seeds import normal
from utils.settings.errors import SettingsError
from utils.settings.schema import SamplingSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.write_folder(tmp_path_factory.mktemp("wan"))


def test_the_publishers_names_are_those_that_the_stock_converter_reads(folder: Path) -> None:
    wan = tiny_wan.pipeline(folder)
    denoiser = load_stage(wan, tiny_flux.settings(wan), stage=0).denoiser
    tensors = {name: parameter.detach() for name, parameter in denoiser.named_parameters()}
    original = WAN_LAYOUT.to_original(tensors)
    again = convert_wan_transformer_to_diffusers({f"model.diffusion_model.{n}": t for n, t in original.items()})
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_a_sample_without_guidance_takes_one_prediction(folder: Path, tmp_path: Path) -> None:
    keys = {**tiny_wan.SAMPLING, "guidance": 1.0, "negative_prompt": ""}
    sampling = SamplingSettings(prompts=["a hiker"], sample_every_n_steps=1, steps=4, seed=7, **keys)
    (painted,) = run_ranks(paint, 1, tiny_wan.pipeline, folder, tmp_path / "cache", 1, sampling)
    noise = normal((1, tiny_wan.CHANNELS, 3, 4, 6), 7, "sample", 0)
    expected = tiny_wan.draw(tiny_wan.STOCK.from_pretrained(folder), sampling, noise)
    torch.testing.assert_close(torch.from_numpy(painted[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"in_channels": 12}, "starts from a picture"), ({"image_dim": 16, "added_kv_proj_dim": 24}, "starts from a")],
)
def test_another_variant_is_told(tmp_path: Path, changes: dict[str, int], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        tiny_wan.pipeline(tiny_wan.write_folder(tmp_path, **changes)).check()
