"""What `check` tells of a model's folder before anything is loaded."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.foundation.checkpoints.folders import all_of
from tests.models import tiny_flux
from utils.errors import Problem, UserError
from utils.settings.model_schema import TextEncoderFile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Whose parts may be spoilt: none of them is a link."""
    linked = tmp_path / "linked"
    linked.mkdir()
    return Path(shutil.copytree(tiny_flux.write_folder(linked), tmp_path / "flux"))


def told(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        tiny_flux.pipeline(folder, **options).check()
    return str(raised.value)


def test_a_whole_folder_is_fine(folder: Path) -> None:
    tiny_flux.pipeline(folder).check()


def test_problems_before_one_that_ends_the_search_are_told() -> None:
    def problems() -> Iterator[Problem]:
        yield Problem("first", "", "")
        raise UserError.of("", "second")

    assert [problem.file for problem in all_of(problems())] == ["first", "second"]


def test_all_missing_parts_are_told_at_once(folder: Path) -> None:
    for part in ("vae", "tokenizer_2"):
        shutil.rmtree(folder / part)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    message = told(folder)
    assert "3 problems" in message
    assert "tokenizer_2: this part is missing" in message and "vae: this part is missing" in message
    assert "name a file with [model] transformer_path" in message


def test_the_folder_of_another_model_is_told_with_its_type(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer_2")
    (folder / "model_index.json").write_text('{"_class_name": "ChromaPipeline"}')
    message = told(folder)
    assert 'is of ChromaPipeline: set [model] type = "chroma"' in message and "tokenizer_2" not in message


def test_weights_from_elsewhere_or_from_scratch_may_be_missing(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "flux.safetensors")
    tiny_flux.pipeline(folder, transformer_path=folder / "flux.safetensors").check()
    tiny_flux.pipeline(folder, from_scratch=True).check()


def encoders(*types: str, **paths: Path) -> list[TextEncoderFile]:
    files = {**dict.fromkeys(types, Path("encoder.safetensors")), **paths}
    return [TextEncoderFile(type=name, path=files[name]) for name in (*types, *paths)]


def test_text_encoders_are_the_models_own(folder: Path) -> None:
    paths = {"clip": folder / "text_encoder", "t5": folder / "text_encoder_2"}
    tiny_flux.pipeline(folder, text_encoders=encoders(**paths)).check()
    wrong = told(folder, text_encoders=encoders("qwen"))
    assert "'qwen' is none of this model's text encoders; it has clip, t5" in wrong
    assert "'t5' is given twice" in told(folder, text_encoders=encoders("t5", "clip", "t5"))


CONFIGURATIONS = [
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/tokenizer.json",
]


@pytest.mark.parametrize("file", CONFIGURATIONS)
@pytest.mark.parametrize(("text", "words"), [('{"a": ', "is not JSON"), ("[1]", "holds no JSON object")])
def test_a_damaged_configuration_is_told(folder: Path, file: str, text: str, words: str) -> None:
    (folder / file).write_text(text)
    message = told(folder)
    assert f"{folder / file}\n  {words}" in message and "download it again" in message


WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "a pointer instead of the file": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_of_all_parts_are_told_at_once(folder: Path, damage: str) -> None:
    for part, name in WEIGHTS.items():
        DAMAGE[damage](folder / part / name)
    message = told(folder)
    assert "4 problems" in message
    for part, name in WEIGHTS.items():
        assert f"{folder / part / name}\n  not a whole safetensors file" in message


@pytest.mark.parametrize("part", WEIGHTS)
def test_missing_weights_are_told(folder: Path, part: str) -> None:
    (folder / part / WEIGHTS[part]).unlink()
    assert f"{folder / part}\n  weights: no .safetensors here" in told(folder)


def index(weight_map: Any) -> str:
    return json.dumps({"weight_map": weight_map})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("{}", "lacks `weight_map`"),
        (index({"a": 3}), "and an object (of them each: a text) is meant"),
        (index({"a": "lost.safetensors"}), "names 'lost.safetensors', and there is no such file"),
    ],
)
def test_a_damaged_index_of_shards_is_told(folder: Path, text: str, words: str) -> None:
    (folder / "text_encoder_2" / "model.safetensors.index.json").write_text(text)
    assert words in told(folder)


def test_a_file_of_another_format_is_not_to_be_downloaded_again(folder: Path) -> None:
    (folder / "flux.onnx").write_bytes(b"PK" + bytes(100))
    assert "give one; of other formats only GGUF" in told(folder, transformer_path=folder / "flux.onnx")


@pytest.mark.parametrize("inside", [(), ("state_dict",), ("module",)])
def test_what_torch_has_written_is_told_with_the_line_that_converts_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: tuple[str, ...]
) -> None:
    (weights,) = (folder / "transformer").glob("*.safetensors")
    content: dict[str, Any] = load_file(weights)
    for name in inside:
        content = {name: content, "epoch": 3}
    file = tmp_path / "a model.pth"
    torch.save(content, file)
    _, line = told(folder, transformer_path=file).rsplit("\n", 1)
    program, flag, code, *arguments = shlex.split(line)
    assert (program, flag, arguments) == ("python", "-c", [str(file), str(tmp_path / "a model.safetensors")])
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})
    read = load_file(arguments[1])
    assert read.keys() == load_file(weights).keys()
    tiny_flux.pipeline(folder, transformer_path=Path(arguments[1])).check()


def test_tensors_that_do_not_fit_are_told_of_all_parts_at_once(folder: Path) -> None:
    message = told(folder, vae_path=folder / "transformer" / WEIGHTS["transformer"], transformer_path=folder / "vae")
    assert "2 problems" in message
    assert "'encoder.conv_in.weight' of the model is not in the file" in message
    assert "'time_text_embed.timestep_embedder.linear_1.weight' of the model is not in the file" in message


def test_configurations_that_changed_places_are_told(folder: Path) -> None:
    shutil.copy(folder / "vae" / "config.json", folder / "transformer")
    assert "a configuration of AutoencoderKL; one of FluxTransformer2DModel belongs here" in told(folder)
