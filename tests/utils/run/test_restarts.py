"""What a run goes on with that its launcher has started again."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from utils.machine import started_at
from utils.ranks import Ranks
from utils.run import restarts, saving
from utils.run.checkpoint import ResumeFlags, identity_of, run_of
from utils.run.progress import Progress
from utils.settings.schema import Settings

CONFIG = Path("run.toml")
FLAGS = ResumeFlags("the_first", reset_optimizer=True)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.model_validate(
        {
            "output_dir": tmp_path,
            "dataset": tmp_path / "d.toml",
            "model": {"type": "flux"},
            "optimizer": {"type": "adamw", "lr": 1e-4},
        }
    )


@pytest.fixture
def run(settings: Settings) -> Callable[..., Path]:
    """Makes a run's folder as the trainer leaves it, begun so many seconds after the launcher."""

    def make(name: str, began: float, record: str = "", saved: bool = True, seed: int = 0) -> Path:
        folder = settings.output_dir / name
        (folder / record).mkdir(parents=True, exist_ok=True)
        config = folder / record / "config.toml"
        config.write_text("")
        at = started_at(os.getppid()) + began
        os.utime(config, (at, at))
        if saved:
            own = settings.model_copy(update={"seed": seed})
            made_with = {"identity": identity_of(own), "run": run_of(own), "optimizer": {}, "steps_in_epoch": 1}
            parameters = {"weight": torch.nn.Parameter(torch.ones(2))}
            optimizer = torch.optim.SGD(parameters.values())
            saving.save(folder, Ranks(), Progress(step=3), parameters, optimizer, made_with)
        return folder

    return make


def test_a_first_start_goes_on_as_it_was_asked(settings: Settings, run: Callable[..., Path]) -> None:
    run("20260101_12-00-00", 5)
    assert restarts.after_restart(FLAGS, settings, CONFIG) is FLAGS


@pytest.mark.parametrize("record", ["", "resumed_step2"])
def test_a_restart_goes_on_with_the_run_of_its_launcher(
    settings: Settings,
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    record: str,
) -> None:
    """Begun by it or continued; not one from before, nor one of another config, and nothing is reset again."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    own = run("20260101_12-00-00", -500)
    run("20260101_12-00-00", 5, record, saved=False)
    run("20260101_13-00-00", 5, seed=1)
    run("20260101_14-00-00", -500)
    with caplog.at_level(logging.WARNING):
        assert restarts.after_restart(FLAGS, settings, CONFIG) == ResumeFlags(str(own))
    assert f"started again by the launcher, number 2: goes on with {own}" in caplog.text


def test_a_restart_before_any_checkpoint_begins_as_the_first_time(
    settings: Settings, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run("20260101_12-00-00", 5, saved=False)
    run("20260101_11-00-00", -500)
    with caplog.at_level(logging.WARNING):
        assert restarts.after_restart(FLAGS, settings, CONFIG) is FLAGS
    assert "no checkpoint yet" in caplog.text


def test_when_a_process_was_started() -> None:
    assert 0 <= time.time() - started_at(os.getpid()) < 3600
    assert started_at(os.getppid()) <= started_at(os.getpid()) + 0.02
