"""Metrics that cannot be written, and a run's folder that is deleted, end no run."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train as train_py
from tests.runs import metrics as metrics_of
from tests.runs import only_run
from utils.ranks import Ranks, disconnect
from utils.run.checkpoint import damage_in
from utils.run.metrics import Metrics
from utils.run.signals import StopRequests
from utils.run.trainer import Trainer
from utils.settings.run_tables import MonitoringSettings

JSON_ALONE = MonitoringSettings(enable_tensorboard=False)


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics.from_settings(tmp_path, JSON_ALONE, {}, is_main=True)
    metrics.scalars({"loss": 1.0}, 1)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # In the middle of the next line.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        for step in (2, 3):
            metrics.scalars({"loss": 1.0}, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.text.count("metrics: JsonLines failed (File too large); training goes on") == 1
    metrics.scalars({"loss": 1.0}, 4)
    metrics.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_a_sink_that_fails_is_told_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics.from_settings(tmp_path, MonitoringSettings(), {}, is_main=True)
    writer = metrics.sinks[1].writer.file_writer

    def fail(*arguments: object) -> None:
        raise RuntimeError("the queue is closed")

    monkeypatch.setattr(writer, "add_summary", fail)
    for step in (1, 2):
        metrics.scalars({"loss": 1.0}, step)
    metrics.close()
    assert caplog.text.count("TensorBoard failed (RuntimeError: the queue is closed)") == 1
    assert steps_in(tmp_path) == [1, 2]


def test_a_metrics_file_that_is_deleted_is_whole_again(tmp_path: Path) -> None:
    metrics = Metrics.from_settings(tmp_path, JSON_ALONE, {}, is_main=True)
    metrics.scalars({"loss": 1.0}, 1)
    (tmp_path / "metrics.jsonl").unlink()
    metrics.scalars({"loss": 1.0}, 2)
    metrics.close()
    assert steps_in(tmp_path) == [1, 2]


def test_a_folder_that_is_deleted_in_a_run_is_made_whole(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After the numbers of step 2, before its checkpoint, which makes a folder without records."""
    kept: dict[str, str] = {}
    advance = Trainer.advance

    def deleting(trainer: Trainer, done: object) -> bool:
        if done.step == 2:
            kept.update({path.name: path.read_text() for path in trainer.parts.folder.glob("*.toml")})
            shutil.rmtree(trainer.parts.folder)
        return advance(trainer, done)

    monkeypatch.setattr(Trainer, "advance", deleting)
    config = write_config(max_steps=4, checkpoint_every_n_steps=1)
    try:
        assert train_py.run(train_py.parse_arguments(["--config", str(config)]), Ranks(), StopRequests(), 0.0)
    finally:
        disconnect()
    run = only_run(config)
    assert caplog.text.count("was deleted: it is made again") == 1
    assert {path.name: path.read_text() for path in run.glob("*.toml")} == kept and len(kept) == 3
    assert sorted(metrics_of(run, "train/loss")) == [1, 2, 3, 4]
    events = EventAccumulator(str(run / "tensorboard_logs"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [3, 4]
    assert {path.name for path in run.glob("global_step*")} == {"global_step2", "global_step3", "global_step4"}
    assert damage_in(run / "global_step4") is None
