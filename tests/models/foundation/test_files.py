"""What `check` tells of a model's folder before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny_flux
from utils.settings.errors import SettingsError
from utils.settings.schema import TextEncoderFile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_flux.write_folder(tmp_path)


def told(folder: Path | None, **options: Any) -> str:
    with pytest.raises(SettingsError) as raised:
        tiny_flux.pipeline(folder, **options).check()
    return str(raised.value)


def test_a_whole_folder_is_fine(folder: Path) -> None:
    tiny_flux.pipeline(folder).check()


def test_no_folder() -> None:
    assert "[model] diffusers_path: is needed" in told(None, transformer_path=Path("flux1-dev.safetensors"))


def test_all_missing_parts_are_told_at_once(folder: Path) -> None:
    for part in ("vae", "tokenizer_2"):
        (folder / part).unlink()
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    message = told(folder)
    assert "3 problems" in message
    assert "tokenizer_2: this part is missing" in message and "vae: this part is missing" in message
    assert "name a file with [model] transformer_path" in message


def test_weights_from_elsewhere_or_from_scratch_may_be_missing(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "flux.safetensors")
    tiny_flux.pipeline(folder, transformer_path=folder / "flux.safetensors").check()
    tiny_flux.pipeline(folder, from_scratch=True).check()


def encoders(*types: str) -> list[TextEncoderFile]:
    return [TextEncoderFile(type=name, path=Path("encoder.safetensors")) for name in types]


def test_text_encoders_are_the_models_own(folder: Path) -> None:
    tiny_flux.pipeline(folder, text_encoders=encoders("clip", "t5")).check()
    wrong = told(folder, text_encoders=encoders("qwen"))
    assert "'qwen' is none of this model's text encoders; it has clip, t5" in wrong
    assert "'t5' is given twice" in told(folder, text_encoders=encoders("t5", "clip", "t5"))
