"""AuraFlow: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_auraflow_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from models.assembly.stage import load_stage
from models.auraflow import AURAFLOW_LAYOUT
from tests.models import tiny_auraflow
from tests.models.tiny_folder import settings_of
from utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_auraflow.write_folder(tmp_path_factory.mktemp("auraflow"))


def tensors_of(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    auraflow = tiny_auraflow.pipeline(folder, **options)
    denoiser = load_stage(auraflow, settings_of(auraflow), stage=0).denoiser
    return {name: parameter.detach() for name, parameter in denoiser.named_parameters()}


def test_the_publishers_names_are_those_that_the_stock_converter_reads(folder: Path) -> None:
    tensors = tensors_of(folder)
    again = convert_auraflow_transformer_checkpoint_to_diffusers(AURAFLOW_LAYOUT.to_original(tensors))
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_the_publishers_file_is_read(folder: Path, tmp_path: Path, prefix: str) -> None:
    """fal's own file has a prefix, ComfyUI's may have none."""
    tensors = tensors_of(folder)
    moved = {name: tensor + 1 for name, tensor in tensors.items()}
    original = AURAFLOW_LAYOUT.to_original(moved)
    save_file({prefix + name: tensor.contiguous() for name, tensor in original.items()}, tmp_path / "aura.safetensors")
    read = tensors_of(folder, transformer_path=tmp_path / "aura.safetensors")
    assert all(torch.equal(read[name], moved[name]) for name in tensors)


def test_pictures_beyond_the_table_of_positions_are_refused(folder: Path) -> None:
    """A table of 9 x 9 places of 16 pixels each, the side of the tiny VAE's cells times two."""
    auraflow = tiny_auraflow.pipeline(folder)
    side = 9 * auraflow.media.spatial
    assert auraflow.too_large(side, side) is None
    assert f"ends at {side} x {side}" in auraflow.too_large(side + auraflow.media.spatial, side)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 16}, "takes latents of 16 channels and the VAE makes 4; give the VAE of SDXL"),
        ({"joint_attention_dim": 8}, "takes text of 8 features and UMT5 makes 16; give Pile-T5-XL"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changes: dict[str, int], said: str) -> None:
    auraflow = tiny_auraflow.pipeline(tiny_auraflow.write_folder(tmp_path, **changes))
    with pytest.raises(UserError, match=said):
        auraflow.check()
