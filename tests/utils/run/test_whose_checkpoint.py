"""Runs of several configs in one folder: whose checkpoint is gone on from."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from models.wan import WanOptions
from utils.adapters.lora import LoraSettings
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run import checkpoint, saving
from utils.run.folder import find_checkpoint
from utils.run.progress import Progress
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import Settings


def settings(model: ModelSettings | None = None, rank: int | None = 4, **keys: Any) -> Settings:
    given = {"output_dir": "runs", "dataset": "mine.toml", "optimizer": {"type": "adamw", "lr": 1e-3}, **keys}
    adapter = LoraSettings(type="lora", rank=rank) if rank else None
    return Settings(model=model or ModelSettings(type="flux", diffusers_path="flux"), adapter=adapter, **given)


def leave(folder: Path, day: int, made: Settings) -> Path:
    """A run of that day with a checkpoint."""
    run = folder / f"202601{day:02}_00-00-00"
    made_with = {
        "identity": checkpoint.identity_of(made),
        "run": checkpoint.run_of(made),
        "optimizer": {},
        "steps_in_epoch": 1,
    }
    parameters = {"weight": Parameter(torch.zeros(2))}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    return saving.save(run, Ranks(), Progress(step=1), parameters, optimizer, made_with)


def newest_of(folder: Path, config: Settings) -> Path:
    return find_checkpoint(folder, "", partial(checkpoint.of_other_run, settings=config))


OTHERS: dict[str, tuple[Settings, str]] = {
    "data": (settings(dataset="theirs.toml"), "dataset = {here}/mine.toml (checkpoint: {here}/theirs.toml)"),
    "model": (
        settings(ModelSettings(type="flux", diffusers_path="kontext")),
        "[model] diffusers_path = {here}/flux (checkpoint: {here}/kontext)",
    ),
    "file": (
        settings(ModelSettings(type="flux", diffusers_path="flux", transformer_path="tuned.safetensors")),
        "[model] transformer_path = not set (checkpoint: {here}/tuned.safetensors)",
    ),
    "from scratch": (
        settings(ModelSettings(type="flux", diffusers_path="flux", from_scratch=True)),
        "[model] from_scratch = False (checkpoint: True)",
    ),
    "adapter": (settings(rank=8), "[adapter] rank = 4 (checkpoint: 8)"),
    "no adapter": (settings(rank=None), "[adapter] type = lora (checkpoint: not set)"),
    "seed": (settings(seed=1), "seed = 0 (checkpoint: 1)"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_anothers_newer_run_is_passed_over_and_named(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs, told = OTHERS[other]
    leave(tmp_path, 1, settings())
    mine = leave(tmp_path, 2, settings(epochs=3))
    leave(tmp_path, 3, theirs)
    # Another way to write a path, and what may change from one time to the next.
    config = settings(dataset=str(tmp_path / "mine.toml"), epochs=9, optimizer={"type": "adamw", "lr": 1.0})
    assert newest_of(tmp_path, config) == mine
    expected = f"20260103_00-00-00: {told.format(here=tmp_path)}"
    assert f"passed over a newer run, which is not this config's: {expected}" in caplog.text
    caplog.clear()
    assert newest_of(tmp_path, theirs).parent.name == "20260103_00-00-00" and not caplog.text


def test_where_all_are_others_each_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for day, (theirs, _) in enumerate(OTHERS.values(), start=1):
        leave(tmp_path, day, theirs)
    with pytest.raises(UserError, match="no run with a checkpoint is this config's.*") as raised:
        newest_of(tmp_path, settings())
    lines = str(raised.value).splitlines()
    assert "as in --resume_from_checkpoint 20260107_00-00-00. The newest first:" in lines[-6]
    named = [told.format(here=tmp_path) for _, told in list(OTHERS.values())[:-6:-1]]
    assert [line.split(": ", 1)[1].split(", ")[0] for line in lines[-5:]] == named


def test_the_experts_of_one_folder_are_two_runs(tmp_path: Path) -> None:
    high, low = (settings(WanOptions(type="wan", diffusers_path="wan", expert=expert)) for expert in ("high", "low"))
    of_high = leave(tmp_path, 1, high)
    of_low = leave(tmp_path, 2, low)
    assert newest_of(tmp_path, high) == of_high
    assert newest_of(tmp_path, low) == of_low


def test_a_checkpoint_that_does_not_say_is_nobodys_until_it_is_named(tmp_path: Path) -> None:
    old = leave(tmp_path, 1, settings())
    content = json.loads((old / "progress.json").read_text())
    del content["made_with"]["run"]
    (old / "progress.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="20260101_00-00-00: it does not say what it was trained on"):
        newest_of(tmp_path, settings())
    assert find_checkpoint(tmp_path, "20260101_00-00-00", refused) == old
    checkpoint.Checkpoint(old).warn_of_other_run(checkpoint.run_of(settings()))


def refused(folder: Path) -> Sequence[str]:
    raise AssertionError("a checkpoint that is named is taken")


def test_one_that_is_named_goes_on_with_other_data_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    opened = checkpoint.Checkpoint(leave(tmp_path, 1, settings()))
    with caplog.at_level(logging.WARNING):
        opened.warn_of_other_run(checkpoint.run_of(settings()))
        assert not caplog.text
        opened.warn_of_other_run(checkpoint.run_of(settings(dataset="theirs.toml")))
    told = f"global_step1 goes on with dataset = {tmp_path}/theirs.toml (checkpoint: {tmp_path}/mine.toml)"
    assert told in caplog.text


def test_a_damaged_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    """It may be this run's: what is wrong with it is told when it is opened."""
    leave(tmp_path, 1, settings())
    newest = leave(tmp_path, 2, settings())
    (newest / "progress.json").write_text("{")
    assert newest_of(tmp_path, settings()) == newest
