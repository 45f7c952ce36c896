"""What was due when a run was stopped or killed is done when it goes on, once, with the numbers of an undisturbed
run."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.runs import only_run
from tests.utils.run.test_goes_on import SAMPLING, run_here, with_looks
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run import checkpoint, evaluation, sampling, trainer
from utils.run.cadence import Cadence, Duty
from utils.run.export_metadata import FINISHED, STARTED
from utils.run.owed import Owed, done_since, note_done, owed_in
from utils.run.progress import Progress
from utils.run.progress_file import FORMAT, read_progress
from utils.run.signals import StopRequests


class Killed(BaseException):
    """Ends a run in the midst, as SIGKILL does."""


class Disturbed:
    """Runs of one config, each of which is stopped or killed at a given call of a function."""

    def __init__(self, config: Path, monkeypatch: pytest.MonkeyPatch):
        self.config, self.monkeypatch, self.stop = config, monkeypatch, StopRequests()

    def __call__(self, module: Any, function: str, call: int, *, kill: bool = False) -> bool:
        """Whether the run came to its end."""
        self.stop = stop = StopRequests()
        real, calls = getattr(module, function), []

        def disturbed(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                if kill:
                    raise Killed
                stop.received = signal.SIGTERM
            return real(*arguments)

        words = ["--resume_from_checkpoint"] if any((self.config.parent / "runs").glob("2*")) else []
        with self.monkeypatch.context() as patch:
            patch.setattr(module, function, disturbed)
            try:
                finished = run_here(self.config, *words, stop=stop)
            except Killed:
                finished = False
        assert len(calls) >= call, f"{function} is not called so often"
        return finished

    def owed(self, step: int) -> tuple[str, ...]:
        return checkpoint.Checkpoint(only_run(self.config) / f"global_step{step}").still_owed().duties


def numbers(run: Path) -> dict[tuple[str, int], float]:
    """What a run measured, but for times and memory; each number is there once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["name"], line["step"]) for line in lines]
    assert len(found) == len(set(found)), sorted(name for name in found if found.count(name) > 1)
    of_machine = ("_sec", "memory")
    return {
        (line["name"], line["step"]): line["value"]
        for line in lines
        if not any(what in line["name"] for what in of_machine)
    }


def files(run: Path) -> dict[str, bytes]:
    """The samples and exports that an undisturbed run leaves; of pictures not their texts, which name the run."""
    exports = {path: without_times(path.read_bytes()) for path in run.glob("epoch*/**/*.safetensors")}
    samples = {path: Image.open(path).tobytes() for path in run.glob("samples/*/*.png")}
    return {str(path.relative_to(run)): content for path, content in {**samples, **exports}.items()}


def without_times(content: bytes) -> bytes:
    """An export without what its header says of when it was made."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    for key in ("modelspec.date", STARTED, FINISHED):
        del header["__metadata__"][key]
    return json.dumps(header).encode() + content[end:]


def undisturbed(config: Path) -> tuple[dict[tuple[str, int], float], dict[str, bytes]]:
    assert run_here(config)
    made = numbers(only_run(config)), files(only_run(config))
    shutil.rmtree(only_run(config))
    return made


def test_what_stops_and_kills_leave_undone_comes_first(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ema = {"decay": 0.5, "warmup": "none"}
    config = with_looks(write_config, sampling=SAMPLING, ema=ema, model__dtype="float32")
    measured, made = undisturbed(config)
    assert {step for name, step in measured if name == "held/ema_loss"} == {2, 4}
    run = Disturbed(config, monkeypatch)
    all_three = ("evaluation", "evaluation of averages", "samples")

    assert not run(evaluation, "_losses", 1) and run.owed(2) == all_three
    assert run.stop.exit_code == 143 and (only_run(config) / "latest").read_text() == "global_step2"
    assert f"goes on from here, first with {', '.join(all_three)}\n" in caplog.text
    # A kill in the last step, when losses were written and before that is noted.
    assert not run(trainer, "note_done", 4, kill=True) and run.owed(4) == all_three and not run.owed(2)
    assert f"what was due after step 2 and is not done comes first: {', '.join(all_three)}" in caplog.text
    assert {step for name, step in numbers(only_run(config)) if name == "held/loss"} == {2, 4}
    # No step is left, but the samples are: a stop there is one, too.
    caplog.clear()
    assert not run(sampling, "denoise", 1) and run.owed(4) == all_three[2:] and run.stop.exit_code == 143
    assert "nothing is left to train" not in caplog.text
    assert run_here(config, "--resume_from_checkpoint") and not run.owed(4)
    assert "nothing is left to train: 2 epochs are done\n" in caplog.text

    assert numbers(only_run(config)) == measured
    assert {name: content for name, content in files(only_run(config)).items() if name in made} == made


def test_a_whole_models_export_waits_until_the_run_goes_on(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher does not wait for it; what counts is that the checkpoint is written before."""
    config = write_config(adapter=None, max_steps=2, checkpoint_every_n_steps=None)
    _, made = undisturbed(config)
    run = Disturbed(config, monkeypatch)
    assert made and not run(trainer.Trainer, "ends_epoch", 3)
    assert run.owed(2) == ("export",) and run.stop.exit_code == 143 and not files(only_run(config))
    assert not run(trainer, "note_done", 1, kill=True) and run.owed(2) == ("export",)
    assert run_here(config, "--resume_from_checkpoint") and not run.owed(2)
    assert files(only_run(config)) == made and not list(only_run(config).glob("step*"))


def test_what_this_config_does_not_ask_for_is_told_and_forgotten(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_looks(write_config, sampling=SAMPLING)
    run = Disturbed(config, monkeypatch)
    assert not run(evaluation, "_losses", 1)
    told = "evaluation after step 2 is not done, and this config does not ask for it"
    assert run_here(write_config(max_steps=2, sampling=SAMPLING), "--resume_from_checkpoint")
    assert caplog.text.count(told) == 1 and not run.owed(2)
    assert len(list(only_run(config).glob("samples/step000002/*.png"))) == 2


def test_what_ends_the_run_is_not_owed_to_end_the_next_one(tmp_path: Path) -> None:
    """One stage's out of memory in an evaluation, say, of which the main rank does not learn."""
    owed = Owed(Progress(step=2), False, ("evaluation", "samples"))
    of_rank = SimpleNamespace(parts=SimpleNamespace(ranks=Ranks(1, 2, stages=2)), owed=owed, saved=tmp_path)
    for name in ("evaluation", "not due"):
        with pytest.raises(UserError, match="memory"):
            trainer.Trainer._tell_failed(
                of_rank, Duty(name, lambda *_: None, Cadence()), owed.progress, UserError.of("memory")
            )
    assert done_since(tmp_path) == ["evaluation"]


def test_a_checkpoint_says_in_which_epoch_something_was_due(tmp_path: Path) -> None:
    done = Progress(step=6, epoch=1, step_in_epoch=3, examples=12)
    owed = Owed(done, True, ("export", "samples"))
    read = owed_in({"owed": owed.as_dict()}, done.next_epoch())
    assert (read.progress.step, read.progress.epoch, read.epoch_ended, read.duties) == (6, 1, True, owed.duties)
    # One of an earlier version.
    assert owed_in({}, done) == Owed(done)


@pytest.mark.parametrize("says", [{}, [], {"duties": "export", "epoch_ended": True}, {"duties": [], "epoch_ended": 1}])
def test_what_is_owed_is_of_the_right_form(tmp_path: Path, says: Any) -> None:
    made_with = {"identity": {}, "optimizer": {}, "steps_in_epoch": 1}
    content = {"format": FORMAT, "progress": Progress().as_dict(), "made_with": made_with}
    for owed in ({"duties": ["export"], "epoch_ended": True}, says):
        (tmp_path / "progress.json").write_text(json.dumps({**content, "owed": owed}))
        with nullcontext() if owed is not says else pytest.raises(UserError, match="owed|duties|epoch_ended"):
            read_progress(tmp_path, "cure")


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"done": 3}', b"\xff", b'{"dome": ["samples"]}'])
def test_a_damaged_note_of_what_is_done_counts_as_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    note_done(tmp_path, "evaluation")
    note_done(tmp_path, "samples")
    file = tmp_path / "done.json"
    assert json.loads(file.read_text()) == {"done": ["evaluation", "samples"]}
    file.write_bytes(damage)
    assert done_since(tmp_path) == []
    note_done(tmp_path, "samples")
    assert json.loads(file.read_text()) == {"done": ["samples"]}
    assert f"{file} cannot be read, and what was due is done again" in caplog.text
    shutil.rmtree(tmp_path)
    note_done(tmp_path, "samples")
    assert f"a run that goes on from {tmp_path} will do samples again" in caplog.text
