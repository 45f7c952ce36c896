"""Files in the run's folder by which the user asks for a checkpoint, and for the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import train as train_py
from tests.runs import only_run
from utils.ranks import Ranks, disconnect
from utils.run.signals import SAVE, SAVE_AND_QUIT, FileRequests, StopRequests
from utils.run.trainer import Trainer


def test_a_run_saves_and_quits_as_its_folder_asks(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {2: SAVE, 4: SAVE_AND_QUIT}
    step = Trainer.step

    def stepped(trainer: Trainer, batches: object) -> object:
        done, values = step(trainer, batches)
        if done.step in asked:
            (trainer.parts.folder / asked[done.step]).touch()
        return done, values

    monkeypatch.setattr(Trainer, "step", stepped)
    config, stop = write_config(max_steps=500, checkpoint_every_n_steps=None), StopRequests()
    try:
        finished = train_py.run(train_py.parse_arguments(["--config", str(config)]), Ranks(), stop, 0.0)
    finally:
        disconnect()
    run = only_run(config)
    assert not finished and stop.exit_code == 0
    assert {path.name for path in run.glob("global_step*")} == {"global_step2", "global_step4"}
    assert not {path.name for path in run.iterdir()} & {SAVE, SAVE_AND_QUIT}


def test_a_folder_of_that_name_asks_for_nothing(tmp_path: Path) -> None:
    (tmp_path / SAVE).mkdir()
    assert not FileRequests(tmp_path).asked(SAVE)


def test_a_signal_counts_more_than_a_file() -> None:
    stop = StopRequests()
    stop.by_file, stop.received = True, 2
    assert stop.exit_code == 130
