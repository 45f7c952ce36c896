"""Chroma: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils

from models.assembly.stage import load_stage
from models.chroma import CHROMA_LAYOUT
from tests.models import tiny_chroma
from tests.models.tiny_folder import settings_of
from utils.diffusion.seeds import normal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chroma.write_folder(tmp_path_factory.mktemp("chroma"))


@torch.no_grad()
def test_padding_is_not_seen(folder: Path) -> None:
    """Text that is padded to the batch's longest gives what it gives padded to the full length."""
    chroma = tiny_chroma.pipeline(folder)
    denoiser = load_stage(chroma, settings_of(chroma), stage=0).denoiser
    text = tiny_chroma.features((5, 11))
    missing = tiny_chroma.TEXT_TOKENS - text["t5"].shape[1]
    padded = {
        "t5": torch.nn.functional.pad(text["t5"], (0, 0, 0, missing)),
        "t5_mask": torch.nn.functional.pad(text["t5_mask"], (0, missing)),
    }
    noised = normal((2, 4, 8, 8), 0, "x"), torch.tensor([0.2513, 0.913])
    short, long = (tiny_chroma.whole(denoiser, chroma, features, *noised) for features in (text, padded))
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-5)


def test_the_publishers_names_are_those_that_the_stock_converter_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock converter knows one width only; ours is compared with it at the tiny one."""
    chroma = tiny_chroma.pipeline(folder)
    denoiser = load_stage(chroma, settings_of(chroma), stage=0).denoiser
    tensors = {name: parameter.detach() for name, parameter in denoiser.named_parameters()}
    original = CHROMA_LAYOUT.to_original(tensors)
    width = denoiser.inner_dim
    code = single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers
    constants = tuple(width if constant == 3072 else constant for constant in code.__code__.co_consts)
    monkeypatch.setattr(code, "__code__", code.__code__.replace(co_consts=constants))
    again = code({f"model.diffusion_model.{name}": tensor for name, tensor in original.items()})
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
