"""A run that goes on from an older checkpoint is one line of steps again, and loses nothing of the other."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from tests.runs import metrics, only_run
from tests.utils.run.test_damage import flip, none_of_other_run, save
from tests.utils.run.test_goes_on import run_here
from tests.utils.run.test_owed import Killed, numbers
from utils.dataset.cache_lock import HeldFile
from utils.errors import UserError
from utils.parallel.engine import Engine
from utils.ranks import Ranks
from utils.run.branches import begin_branch
from utils.run.checkpoint import Checkpoint, damage_in
from utils.run.folder import find_checkpoint
from utils.run.in_use import RunLock

NEWEST = "--resume_from_checkpoint"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """With three checkpoints, and what lies beside them."""
    run = tmp_path / "20260101_00-00-00"
    save(run, 1, 2, 4)
    for name in ("epoch1", "samples/step000001", "samples/step4"):
        (run / name).mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"name": "loss", "value": 1.0, "step": 4, "time": 0.0}\n')
    return run


def found(run: Path) -> Path:
    return find_checkpoint(run.parent, "", none_of_other_run, damage_in)


def test_an_older_checkpoint_is_the_newest_from_then_on(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert found(run) == run / "global_step4"
    begin_branch(run / "global_step2", 2)
    aside = run / "after_step2.set_aside"
    assert {path.name for path in aside.iterdir()} == {"global_step4", "latest", "metrics.jsonl", "samples"}
    assert (aside / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert not (run / "samples" / "step4").exists() and (run / "samples" / "step000001").exists()
    told = "what this run had after step 2 is set aside, as after_step2.set_aside: global_step4, samples/step4"
    assert told in caplog.text and f"--resume_from_checkpoint {aside} goes on from there" in caplog.text
    # Also if a checkpoint is damaged, or `latest` is lost: never the other line's.
    assert found(run) == run / "global_step2"
    (run / "latest").unlink()
    assert found(run) == run / "global_step2"
    flip(run / "global_step2" / "state-0.safetensors", -1)
    assert found(run) == run / "global_step1"
    assert find_checkpoint(run.parent, str(aside), none_of_other_run, damage_in) == aside / "global_step4"


def test_whoever_goes_on_from_the_newest_sets_nothing_aside(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    begin_branch(run / "global_step4", 4)
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_what_a_killed_process_had_not_finished_goes(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = {path.name for path in run.iterdir()}
    mine = {"mine.parts", "epochs.unfinished", "global_step3.replaced", "epoch3"}
    left = {
        "global_step8.unfinished",
        "global_step9.removed",
        "epoch2_ema.parts",
        "epoch2_step5.unfinished",
        "step7.parts",
    }
    for name in mine | left:
        (run / name).mkdir()
        (run / name / "file").write_text("")
    begin_branch(run / "global_step4", 4)
    assert {path.name for path in run.iterdir()} == before | mine
    assert all(f"removed what a killed process had not finished: {name}" in caplog.text for name in left)


def test_a_second_time_has_another_name(run: Path) -> None:
    begin_branch(run / "global_step1", 1)
    save(run, 2)
    begin_branch(run / "global_step1", 1)
    aside = {path.name: {inside.name for inside in path.glob("global*")} for path in run.glob("*.set_aside*")}
    assert aside == {
        "after_step1.set_aside": {"global_step2", "global_step4"},
        "after_step1.set_aside_2": {"global_step2"},
    }


def test_a_folder_that_cannot_be_written_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match="global_step4\n.*cannot go on from global_step2: Permission denied"):
        begin_branch(run / "global_step2", 2)


def test_a_new_line_of_steps_lives_on_and_the_other_can_be_named(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    # Files of one second are read in the order of their numbers as texts, in which 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    keys = {"max_steps": 4, "checkpoint_every_n_steps": 1, "save_every_n_steps": 1}
    config = write_config(**keys)
    assert run_here(config)
    run = only_run(config)
    first, written = metrics(run, "train/loss"), (run / "metrics.jsonl").read_bytes()

    def killed(engine: Engine, batches: Any, number: int, numbers: Any) -> Any:
        raise Killed

    config = write_config(**keys, optimizer__lr=1e-4)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Engine, "train_step", killed)
        run_here(config, NEWEST, str(run / "global_step2"), "--reset_optimizer_params")
    aside = run / "after_step2.set_aside"
    names = {"global_step3", "global_step4", "step3", "epoch2", "latest", "metrics.jsonl"}
    assert {path.name for path in aside.iterdir()} == names
    assert (
        run / "latest"
    ).read_text() == "global_step2" and "metrics after step 2, up to step 4, are cut" in caplog.text
    assert (aside / "metrics.jsonl").read_bytes() == written

    # A plain resume goes on with what was begun, not with what was left.
    assert run_here(config, NEWEST, "--reset_optimizer_params")
    assert {path.name for path in run.glob("global*")} == {f"global_step{step}" for step in (1, 2, 3, 4)}
    second = metrics(run, "train/loss")
    assert numbers(run) and sorted(second) == [1, 2, 3, 4]
    assert [second[step] == first[step] for step in (1, 2, 3, 4)] == [True, True, True, False]
    events = EventAccumulator(str(run / "tensorboard_logs"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(step, pytest.approx(second[step])) for step in (1, 2, 3, 4)]

    # And who names what was left goes on with that.
    assert run_here(write_config(max_steps=5), NEWEST, str(aside))
    third = metrics(aside, "train/loss")
    assert sorted(third) == [1, 2, 3, 4, 5] and {step: third[step] for step in first} == first
    assert metrics(run, "train/loss") == second


def test_a_run_in_use_is_refused_by_its_process(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(max_steps=1, checkpoint_every_n_steps=1)
    refused = []
    train_step = Engine.train_step

    def beside(engine: Engine, batches: Any, number: int, numbers: Any) -> Any:
        with RunLock() as other, pytest.raises(UserError) as raised:
            other.take(only_run(config), Ranks())
        refused.append(str(raised.value))
        return train_step(engine, batches, number, numbers)

    # A new run, and one that goes on.
    monkeypatch.setattr(Engine, "train_step", beside)
    assert run_here(config)
    run = only_run(config)
    assert run_here(write_config(max_steps=2), NEWEST)
    assert len(refused) == 2 and all(
        f"another run goes on in this folder: host {os.uname().nodename}, pid {os.getpid()}, since 20" in text
        for text in refused
    )
    with HeldFile(run / "run.lock") as other:
        assert other.take()
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        for asked in ((), (str(run),), (str(run / "global_step1"),)):
            with pytest.raises(UserError, match=f"{run.name}.*\n.*pid {os.getpid()}, since .*; wait for it or end it"):
                run_here(write_config(max_steps=3), NEWEST, *asked)
        assert run_here(write_config(max_steps=3), NEWEST, "--cache_only"), "which writes nothing there"
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def saved_at(run: Path, time: float) -> None:
    """Lets a run have been saved then; its checkpoints have no checksums any more, as those of earlier versions."""
    for file in run.glob("global_step*/progress.json"):
        content = {**json.loads(file.read_text()), "saved_at": time}
        file.write_text(json.dumps({key: value for key, value in content.items() if key != "checksums"}))
        file.with_name("checksums.json").unlink(missing_ok=True)


def test_the_newest_run_is_known_by_what_is_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = tmp_path / "20990101_00-00-00", tmp_path / "20260102_00-00-00"
    save(older, 7)
    save(newer, 1)
    assert found(newer) == newer / "global_step1"
    # A copy has other times than what it was made of.
    saved_at(older, 1000.0)
    saved_at(newer, 2000.0)
    os.utime(older / "global_step7" / "progress.json")
    assert found(newer) == newer / "global_step1" and not caplog.text
    # What was measured since then counts too: a run that was killed before its next checkpoint.
    (older / "metrics.jsonl").write_text('{"name": "a", "value": 1, "step": 8, "time": 2500.0}\n{"name": "a", "va')
    assert found(newer) == older / "global_step7"
    (newer / "metrics.jsonl").write_text("\n")
    assert found(newer) == older / "global_step7"
    # Of earlier versions, by their files.
    shutil.rmtree(older / "global_step7")
    save(older, 8)
    file = newer / "global_step1" / "progress.json"
    content = json.loads(file.read_text())
    del content["saved_at"]
    file.write_text(json.dumps(content))
    os.utime(file, (3e9, 3e9))
    assert found(newer) == newer / "global_step1" and Checkpoint(found(newer)).progress.step == 1
