"""Numbers and pictures arrive where they are sent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from utils.errors import UserError
from utils.run.metrics import Metrics, check_account
from utils.settings.run_tables import MonitoringSettings


def test_scalars_and_pictures(tmp_path: Path) -> None:
    metrics = Metrics.from_settings(tmp_path, MonitoringSettings(), {}, is_main=True)
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
    Metrics.from_settings(tmp_path, MonitoringSettings(), {}, is_main=False).scalars({"train/loss": 1.0}, step=1)
    assert not list(tmp_path.iterdir())


def test_without_tensorboard_there_are_no_events(tmp_path: Path) -> None:
    metrics = Metrics.from_settings(tmp_path, MonitoringSettings(enable_tensorboard=False), {}, is_main=True)
    metrics.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_measures_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Files of one second are read in the order of their names, in which number 10 of a process comes before number 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    first = Metrics.from_settings(tmp_path, MonitoringSettings(), {}, is_main=True)
    for step in (1, 2, 3, 4):
        first.scalars({"train/loss": float(step)}, step)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"name": "train/loss", "st')
    again = Metrics.from_settings(tmp_path, MonitoringSettings(), {}, is_main=True, resumed_at=2)
    for step in (3, 4):
        again.scalars({"train/loss": 10.0 * step}, step)
    again.close()
    expected = [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["value"]) for line in lines] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard_logs"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == expected
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard_logs"}


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of someone who never logged in."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


WANDB = MonitoringSettings(enable_wandb=True, enable_tensorboard=False)


def test_an_account_that_is_missing_is_told_early_and_late(no_account: Path) -> None:
    check_account(MonitoringSettings())
    with pytest.raises(UserError, match=r"\[monitoring\] enable_wandb: no account.*wandb login"):
        check_account(WANDB)
    with pytest.raises(UserError, match=r"\[monitoring\] enable_wandb: .* refused the run: .*API key"):
        Metrics.from_settings(no_account, WANDB, {}, is_main=True)


@pytest.mark.parametrize("variable", [{"WANDB_API_KEY": "a" * 40}, {"WANDB_MODE": "offline"}])
def test_an_account_or_none_needed_by_the_environment(
    no_account: Path, monkeypatch: pytest.MonkeyPatch, variable: dict[str, str]
) -> None:
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    check_account(WANDB)


def test_an_account_in_a_file_or_in_the_settings(no_account: Path) -> None:
    check_account(WANDB.model_copy(update={"wandb_api_key": "a" * 40}))
    (no_account / ".netrc").write_text(f"machine api.wandb.ai login user password {'a' * 40}\n")
    check_account(WANDB)


def test_noise_levels_are_lines_of_one_chart_of_wandb(no_account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real library, without a server."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")
    # It remembers the environment of the tests before.
    wandb.teardown()
    metrics = Metrics.from_settings(no_account, WANDB, {}, is_main=True)
    sink = metrics.sinks[-1]
    sent: list[dict] = []
    monkeypatch.setattr(sink.run, "log", lambda values, step: sent.append(values))
    metrics.scalars({"held/loss": 0.5, "held/loss_quantile_0.10": 0.4, "held/loss_quantile_0.90": 0.6}, step=5)
    metrics.scalars({"train/loss": 0.5}, step=6)
    metrics.scalars({"held/loss_quantile_0.10": 0.3, "held/loss_quantile_0.90": 0.5}, step=10)
    assert [sorted(values)[-1] for values in sent] == [
        "held/loss_quantile_0.90",
        "train/loss",
        "held/loss_quantile_0.90",
    ]
    chart = sent[-1]["held/loss by noise level"]
    assert chart.table.columns == ["step", "lineKey", "lineVal"]
    assert sorted(chart.table.data) == [[5, "0.10", 0.4], [5, "0.90", 0.6], [10, "0.10", 0.3], [10, "0.90", 0.5]]
    metrics.close()
