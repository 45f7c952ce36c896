"""What is wrong with an adapter's tensors and metadata is told with the file, the key, and what is meant."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.assembly.stage import model_names
from models.foundation.checkpoints.adapter_files import read_factors, read_updates
from tests.models import tiny_flux
from utils import adapters
from utils.adapters.kinds import ModelNames
from utils.errors import UserError

NAME = "transformer.transformer_blocks.0.attn.to_q"
DOWN, UP = torch.full((4, 32), 0.5), torch.full((32, 4), 0.25)
LORA = {f"{NAME}.lora_A.weight": DOWN, f"{NAME}.lora_B.weight": UP}
LOKR = {f"{NAME}.lokr_w1": torch.ones(4, 4), f"{NAME}.lokr_w2": torch.ones(8, 8)}
TOLD = "lora_adapter_metadata"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> ModelNames:
    pipeline = tiny_flux.pipeline(tiny_flux.write_folder(tmp_path_factory.mktemp("flux")))
    return model_names(pipeline, pipeline.weights.build_empty())


def told(
    place: Path, names: ModelNames, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """What is told of a file."""
    save_file(dict(tensors), place / "adapter_model.safetensors", dict(metadata or {}))
    with pytest.raises(UserError) as raised:
        read_updates(place / "adapter_model.safetensors", names)
    assert str(place) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "tensors, words",
    [
        (
            {**LORA, f"{NAME}.alpha": torch.tensor([1.0, 2.0])},
            "the alpha of '{}' is 2 numbers, and one number is meant",
        ),
        ({**LORA, f"{NAME}.alpha": torch.tensor(math.nan)}, "the alpha of '{}' is nan, and one number is meant"),
        ({**LORA, f"{NAME}.lora_A.weight": DOWN.to(torch.int8)}, "the lora_A of '{}' is of the type int8, and factors"),
        ({**LORA, f"{NAME}.lora_B.weight": UP / 0}, "the lora_B of '{}' has values that are infinite or no numbers"),
        (
            {f"{NAME}.lora_A.weight": DOWN[:0], f"{NAME}.lora_B.weight": UP[:, :0]},
            "the lora_A of '{}' has the shape [0",
        ),
        ({f"{NAME}.lora_A.weight": DOWN}, "'{}' has no lora_B"),
        ({f"{NAME}.lora_B.weight": UP}, "'{}' has no lora_A"),
        (
            {f"{NAME}.lokr_w1": torch.ones(4, 4)},
            "'{}' has nothing of its factor lokr_w2, and either lokr_w2 is meant or",
        ),
        ({**LOKR, f"{NAME}.lokr_w2_a": torch.ones(8, 2)}, "'{}' has lokr_w2, lokr_w2_a of its factor lokr_w2"),
        ({f"{NAME}.diff_b": torch.tensor(1.0)}, "the bias of '{}' has the shape []"),
    ],
)
def test_tensors(tmp_path: Path, names: ModelNames, tensors: dict[str, torch.Tensor], words: str) -> None:
    assert words.format(NAME) in told(tmp_path, names, tensors)


def test_training_goes_on_from_no_half_of_a_lokr(tmp_path: Path, names: ModelNames) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file({f"{NAME}.lokr_w1": torch.ones(4, 4)}, file)
    with pytest.raises(UserError, match=r"(?s)adapter\.safetensors.*has nothing of its factor lokr_w2"):
        read_factors(file, adapters.find("lokr"), names, {})


@pytest.mark.parametrize(
    "key, value, words",
    [
        (TOLD, "{", f"`{TOLD}` in its header is not JSON"),
        (TOLD, "[" * 100_000, f"`{TOLD}` in its header is not JSON (too many brackets"),
        (TOLD, "[1]", f"`{TOLD}` in its header is [1], and an object of settings is meant"),
        (TOLD, '{"transformer.lora_alpha": "8"}', '`lora_alpha` is "8", and a number or null is meant'),
        (TOLD, '{"transformer.lora_alpha": [8, 4]}', "`lora_alpha` is [8, 4], and a number or null is meant"),
        (TOLD, '{"transformer.lora_alpha": NaN}', "the alpha of `lora_alpha` is nan, and a finite number is meant"),
        (TOLD, '{"transformer.use_rslora": "false"}', '`use_rslora` is "false", and true or false or null is meant'),
        (
            TOLD,
            '{"transformer.alpha_pattern": {"to_q": null}}',
            "and an object (of them each: a number) or null is meant",
        ),
        (TOLD, '{"transformer.alpha_pattern": {"(to_q": 2}}', "`(to_q` is no pattern of names"),
        ("folded_scale", "half", '`folded_scale` in its header is "half", and a number above 0 is meant'),
        ("folded_scale", "0", '`folded_scale` in its header is "0", and a number above 0 is meant'),
        ("folded_scale", "inf", '`folded_scale` in its header is "inf"'),
    ],
)
def test_metadata(tmp_path: Path, names: ModelNames, key: str, value: str, words: str) -> None:
    assert words in told(tmp_path, names, LORA, {key: value})


def test_settings_beside_the_file(tmp_path: Path, names: ModelNames) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": "8", "use_rslora": 1}))
    found = told(tmp_path, names, LORA)
    assert str(tmp_path / "adapter_config.json") in found and "2 problems" in found
    assert re.search(r'`lora_alpha` is "8".*\n.*`use_rslora` is 1, and true or false', found)


def test_an_alpha_of_whole_numbers_counts(tmp_path: Path, names: ModelNames) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file({**LORA, f"{NAME}.alpha": torch.tensor([2])}, file)
    (update,) = read_updates(file, names).values()
    assert torch.equal(update.delta(torch.zeros(32, 32)), torch.full((32, 32), 4 * 0.5 * 0.25 * 2 / 4))
