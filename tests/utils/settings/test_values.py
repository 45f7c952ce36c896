"""What values a key takes: second spellings, and words that mean another key."""

from __future__ import annotations

import json

import pytest
from pydantic import TypeAdapter

from tests.utils.settings.conftest import CHOICES, CLASSES, Folder
from utils.errors import UserError
from utils.settings.document import settings_json_schema
from utils.settings.reader import read_settings, write_resolved
from utils.settings.values import LossType, TimestepMethod


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("loss_type", "l2", "mse"),
        ("loss_type", "l1", "mae"),
        ("loss_type", "huber", "huber"),
        ("timestep_sample_method", "sigmoid", "logit_normal"),
        ("timestep_sample_method", "sigma", "uniform"),
        ("timestep_sample_method", "logsnr", "log_snr"),
    ],
)
def test_second_spellings_are_settled_when_a_file_is_read(folder: Folder, key: str, written: str, meant: str) -> None:
    settings = read_settings(folder.run(model=f"{key} = '{written}'"), CHOICES)
    assert getattr(settings.model, key) == meant
    write_resolved(settings, folder.root / "again.toml")
    assert read_settings(folder.root / "again.toml", CHOICES) == settings
    shared = json.loads(settings_json_schema(CLASSES))["$defs"]["ModelSettings"]
    assert written in shared["properties"][key]["enum"]


@pytest.mark.parametrize("choice", [LossType, TimestepMethod])
def test_other_words_are_not_values(choice: object) -> None:
    for wrong in ("l3", 1, None, ["mse"]):
        with pytest.raises(ValueError, match="Input should be"):
            TypeAdapter(choice).validate_python(wrong)


@pytest.mark.parametrize("word", ["uniform", "logit_normal", "mode"])
def test_a_word_for_drawing_is_not_a_weight(folder: Folder, word: str) -> None:
    with pytest.raises(UserError) as raised:
        read_settings(folder.run(model=f"weighting_scheme = '{word}'"), CHOICES)
    (problem,) = raised.value.problems
    assert problem.where == "[model] weighting_scheme"
    assert f'write timestep_sample_method = "{word}" instead' in problem.message
