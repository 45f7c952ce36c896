"""LyCORIS's JSON is read as keys of [adapter], and what is not read is told by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.utils.settings.conftest import CHOICES, Folder
from utils.errors import UserError
from utils.settings.lycoris_config import with_lycoris_config
from utils.settings.reader import read_all, write_resolved

USUAL = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 16,
    "full_matrix": True,
    "bypass_mode": False,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"algo": "lokr", "factor": 8}},
    },
}


def read(place: Path, config: Any, **keys: Any) -> tuple[dict[str, Any], list[str], list[str]]:
    (place / "lycoris.json").write_text(config if isinstance(config, str) else json.dumps(config))
    found, problems, remarks = with_lycoris_config("run.toml", {"lycoris_config": str(place / "lycoris.json"), **keys})
    return found, [f"{one.where}: {one.message}" for one in problems], [one.where for one in remarks]


def test_the_usual_file_is_read_as_it_is(tmp_path: Path) -> None:
    assert read(tmp_path, USUAL, dtype="bfloat16") == (
        {
            "type": "lokr",
            "rank": 10000,
            "alpha": 1.0,
            "factor": 16,
            "full_matrix": True,
            "include": ["*Attention", "*FeedForward"],
            "factors": {"*Attention": 16, "*FeedForward": 8},
            "dtype": "bfloat16",
        },
        [],
        [],
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"algo": "loha", "linear_dim": 8, "conv_dim": 4, "conv_alpha": 1, "use_tucker": True},
            {"type": "loha", "rank": 8, "conv_dim": 4, "conv_alpha": 1.0, "tucker": True, "convolutions": True},
        ),
        ({"algo": "boft", "linear_dim": 8, "linear_alpha": 1}, {"type": "oft", "butterfly": True, "block_size": 8}),
        (
            {"linear_dim": 4, "dora_wd": True, "rank_dropout": 0.1, "factor": -1},
            {"type": "lora", "rank": 4, "dora": True, "rank_dropout": 0.1},
        ),
        (
            {
                "algo": "lokr",
                "apply_preset": {
                    "name_algo_map": {"single.*.attn*": {"factor": 16}},
                    "module_algo_map": {"Attention": {"factor": 4}},
                    "use_fnmatch": True,
                },
            },
            {
                "type": "lokr",
                "include": ["single.*.attn*", "*Attention"],
                "factors": {"single.*.attn*": 16, "*Attention": 4},
            },
        ),
        (
            {
                "algo": "lora",
                "linear_dim": 8,
                "apply_preset": {
                    "module_algo_map": {
                        "Attention": {"algo": "lokr", "factor": 16, "full_matrix": True},
                        "FeedForward": {"linear_dim": 4, "linear_alpha": 1},
                        "Other": {"algo": "lora"},
                    },
                    "name_algo_map": {"blocks.0.*": {"algo": "oft", "linear_dim": 4}},
                    "use_fnmatch": True,
                },
            },
            {
                "type": "lora",
                "rank": 8,
                "include": ["*Attention", "*FeedForward", "*Other", "blocks.0.*"],
                "rules": [
                    {"pattern": "blocks.0.*", "type": "oft", "keys": {"block_size": 4}},
                    {"pattern": "*Attention", "type": "lokr", "keys": {"factor": 16, "full_matrix": True}},
                    {"pattern": "*FeedForward", "type": "lora", "rank": 4, "alpha": 1.0},
                    {"pattern": "*Other", "type": "lora"},
                ],
            },
        ),
    ],
)
def test_other_files_are_read(config: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, config) == (expected, [], [])


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"algo": "glora"}, "key `algo`: .glora. is not trained here; known: lora"),
        ({"multiplier": 0.5}, "key `multiplier`: 0.5 is not known here"),
        ({"preset": "full"}, "key `preset`: .full. is not known here"),
        ({"apply_preset": {"name_algo_map": {"a": {}}}}, "name_algo_map`: has regular expressions"),
        ({"apply_preset": {"module_algo_map": {"A": {"conv_dim": 2}}}}, "`conv_dim` of single modules is not read"),
        ({"apply_preset": {"module_algo_map": {"A": {"algo": "glora"}}}}, "A`: .glora. is not trained here; known"),
        ({"algo": "loha", "apply_preset": {"module_algo_map": {"A": {"factor": 2}}}}, "has factors of modules"),
        (
            {"algo": "lokr", "weight_decompose": True},
            "key `weight_decompose`: rows of trained lengths",
        ),
        ({"algo": "loha", "dora_wd": True}, "key `dora_wd`: rows of trained lengths .DoRA. are LoRA's alone"),
        (
            {"apply_preset": {"module_algo_map": {"A": {"algo": "lokr", "dora_wd": True}}}},
            "A`: `dora_wd`: rows of trained lengths",
        ),
        ({"apply_preset": {"unet_block": ["A"]}}, "unet_block`: is not known here"),
        ("[1]", "holds no JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_what_is_not_read_is_told(config: Any, told: str, tmp_path: Path) -> None:
    import re

    _, problems, _ = read(tmp_path, config)
    assert len(problems) == 1 and re.search(told, problems[0]), problems


def test_what_says_two_things_is_told(tmp_path: Path) -> None:
    _, problems, _ = read(tmp_path, USUAL, type="lokr", rank=4)
    assert len(problems) == 1 and "[adapter] rank: is 4, and" in problems[0] and "says 10000; leave one" in problems[0]
    assert read(tmp_path, USUAL | {"use_scalar": True})[2] == ["key `use_scalar`"]


def test_a_run_is_read_with_it(folder: Folder, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(USUAL | {"use_scalar": True}))
    config = folder.run(tables=f"[adapter]\nlycoris_config = '{tmp_path / 'own.json'}'")
    with caplog.at_level(logging.WARNING):
        settings = read_all(config, CHOICES, 1)[0]
    assert (settings.adapter.type, settings.adapter.factors) == ("lokr", {"*Attention": 16, "*FeedForward": 8})
    assert "trains a scalar from 0" in caplog.text
    write_resolved(settings, tmp_path / "again.toml")
    assert "lycoris_config" not in (tmp_path / "again.toml").read_text()
    (tmp_path / "own.json").write_text(json.dumps({"algo": "full"}))
    with pytest.raises(UserError, match='own.json\n  key `algo`: "full" is not trained here') as raised:
        read_all(config, CHOICES, 1)
    assert len(raised.value.problems) == 1
