"""Numbers and pictures arrive where they are sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.run.metrics import Metrics
from utils.settings.schema import MonitoringSettings


def test_scalars_and_pictures(tmp_path: Path) -> None:
    metrics = Metrics.of_run(tmp_path, MonitoringSettings(), {}, is_main=True)
    metrics.scalars({"train/loss": 0.25, "train/lr": 1e-4}, step=3)
    metrics.picture("samples/00", Image.new("RGB", (4, 4), "red"), step=3)
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["name"], line["value"], line["step"]) for line in lines] == [
        ("train/loss", 0.25, 3),
        ("train/lr", 1e-4, 3),
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard_logs"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 0.25)]
    assert events.Scalars("train/lr")[0].value == pytest.approx(1e-4)
    assert events.Images("samples/00")[0].step == 3


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    Metrics.of_run(tmp_path, MonitoringSettings(), {}, is_main=False).scalars({"train/loss": 1.0}, step=1)
    assert not list(tmp_path.iterdir())


def test_without_tensorboard_there_are_no_events(tmp_path: Path) -> None:
    metrics = Metrics.of_run(tmp_path, MonitoringSettings(enable_tensorboard=False), {}, is_main=True)
    metrics.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
