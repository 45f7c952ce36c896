"""What of a DeepSpeed configuration is taken, and what is refused with the key to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.utils.settings.conftest import CHOICES, Folder
from utils.errors import UserError
from utils.settings.deepspeed_keys import INSTEAD, REFUSED, DeepSpeedSettings
from utils.settings.reader import read_settings, write_resolved

TAKEN = {"communication_data_type": "bf16", "wall_clock_breakdown": True}


def refused(folder: Folder, run: str) -> str:
    with pytest.raises(UserError) as caught:
        read_settings(folder.run(top=run), CHOICES)
    (problem,) = caught.value.problems
    assert problem.where.startswith("key `deepspeed_config")
    return f"{problem.where}: {problem.message}"


def test_a_file_and_a_table_say_the_same(folder: Folder) -> None:
    folder.write("ds.json", json.dumps(TAKEN))
    found = read_settings(folder.run(top="deepspeed_config = 'ds.json'"), CHOICES)
    table = "deepspeed_config = { communication_data_type = 'bf16', wall_clock_breakdown = true }"
    assert read_settings(folder.run(top=table), CHOICES) == found
    table = "[deepspeed_config]\ncommunication_data_type = 'bf16'\nwall_clock_breakdown = true"
    assert read_settings(folder.run(tables=table), CHOICES) == found
    assert found.deepspeed_config == DeepSpeedSettings.model_validate(TAKEN)
    write_resolved(found, folder.root / "again.toml")
    assert read_settings(folder.root / "again.toml", CHOICES) == found
    assert read_settings(folder.run(), CHOICES).deepspeed_config is None


def test_keys_that_are_ours_are_refused_with_their_names(folder: Folder) -> None:
    written: dict[str, Any] = {
        **TAKEN,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "prescale_gradients": True,
        "comms_logger": {"enabled": True},
        "autotune": {},
    }
    folder.write("ds.json", json.dumps(written))
    told = refused(folder, "deepspeed_config = 'ds.json'")
    assert "`train_micro_batch_size_per_gpu` is not taken from here: write `micro_batch_size_per_gpu`" in told
    assert "`zero_optimization` is not taken from here: write `zero_stage`, and `offload_optimizer` for" in told
    assert "`prescale_gradients` is not taken: gradients are averaged" in told
    assert "`autotune` is not taken; what is: communication_data_type, wall_clock_breakdown, dump_state" in told
    assert "wall_clock_breakdown` is" not in told
    assert "`comms_logger` is not taken: DeepSpeed 0.19.8 adds" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds no JSON object"),
        (None, "cannot be read: No such file"),
        ('{"dump_state": 1}', "dump_state`: must be true or false; given: 1"),
        ('{"communication_data_type": "fp8"}', "communication_data_type`: must be 'fp32', 'bf16' or 'fp16'"),
    ],
)
def test_what_is_no_configuration_is_told(folder: Folder, content: str | None, told: str) -> None:
    if content is not None:
        folder.write("ds.json", content)
    assert told in refused(folder, "deepspeed_config = 'ds.json'")


def test_a_file_may_begin_with_the_mark_of_windows_editors(folder: Folder) -> None:
    folder.write("ds.json", "\ufeff" + json.dumps(TAKEN))
    found = read_settings(folder.run(top="deepspeed_config = 'ds.json'"), CHOICES)
    assert found.deepspeed_config == DeepSpeedSettings.model_validate(TAKEN)


def test_no_key_is_both_taken_and_refused() -> None:
    taken = DeepSpeedSettings.model_fields.keys()
    assert not taken & INSTEAD.keys() and not taken & REFUSED.keys() and not INSTEAD.keys() & REFUSED.keys()


def test_every_refused_key_is_one_of_deepspeeds() -> None:
    """So that no advice waits for a key that nobody writes."""
    import deepspeed

    sources = [Path(deepspeed.__file__).parent / place for place in ("runtime", "monitor", "comm", "profiling")]
    text = "".join(file.read_text() for place in sources for file in place.rglob("c*.py"))
    for key in (*INSTEAD, *REFUSED):
        assert f'"{key}"' in text or f"'{key}'" in text or f"{key}:" in text, key
