"""What fails between two steps does not end the training, and a stop or a limit of time loses nothing."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toml
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import train as train_py
from tests.processes import run_ranks
from tests.runs import MINI_FLUX, launch, metrics, newest_export, only_run
from utils.errors import UserError
from utils.parallel.pipeline import DenoiserPipeline
from utils.ranks import Ranks, disconnect
from utils.run import export
from utils.run.attempts import Attempt, Failed
from utils.run.checkpoint import Checkpoint
from utils.run.signals import StopRequested, StopRequests
from utils.run.time_limit import CHECKPOINT, EXPORT, TimeLimit
from utils.run.trainer import Trainer

SAMPLING = {"prompts": ["a", "b"], "sample_every_n_steps": 2, "width": 64, "height": 64, "steps": 2}


def run_here(config: Path, *words: str, stop: StopRequests | None = None) -> bool:
    try:
        return train_py.run(
            train_py.parse_arguments(["--config", str(config), *words]), Ranks(), stop or StopRequests(), 0.0
        )
    finally:
        disconnect()


def with_looks(write_config: Callable[..., Path], **keys: Any) -> Path:
    """A run that evaluates, draws, exports and saves after every second step."""
    data = toml.loads(write_config().with_name("data.toml").read_text())
    pictures = Path(data["directory"][0]["path"])
    evaluation = write_config().with_name("held.toml")
    held = evaluation.with_name("held")
    held.mkdir()
    for file in pictures.glob("1.*"):
        shutil.copy(file, held)
    evaluation.write_text(toml.dumps({**data, "directory": [{"path": str(held)}]}))
    sets = [{"name": "held", "config": str(evaluation)}]
    often = dict.fromkeys(("eval_every_n_steps", "checkpoint_every_n_steps", "save_every_n_steps"), 2)
    return write_config(eval_datasets=sets, **{"max_steps": 4, "eval_before_first_step": False, **often, **keys})


def test_what_fails_is_told_and_changes_no_step(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An evaluation in its midst, samples, and an export; when the former begin, the step is saved."""
    config = with_looks(write_config, sampling=SAMPLING)
    assert run_here(config)
    undisturbed = only_run(config)
    losses, weights = metrics(undisturbed, "train/loss"), export.load_file(export_at(undisturbed))
    evaluated = metrics(undisturbed, "held/loss")
    assert sorted(evaluated) == [2, 4]
    shutil.rmtree(undisturbed)

    forward, write, passes = DenoiserPipeline.forward, export.write_tensors, []

    def without_memory(module: DenoiserPipeline, *arguments: Any) -> Any:
        if not module.training:
            passes.append((only_run(config) / "global_step2").is_dir())
            # In the midst of the evaluation after step 2, and of the samples' first prediction.
            if len(passes) in (3, 4):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. Further advice")
        return forward(module, *arguments)

    def full(path: Path, *arguments: Any) -> Any:
        if "epoch1.unfinished" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *arguments)

    monkeypatch.setattr(DenoiserPipeline, "forward", without_memory)
    monkeypatch.setattr(export, "write_tensors", full)
    assert run_here(config)
    run = only_run(config)
    assert all(passes) and metrics(run, "train/loss") == losses
    again = export.load_file(export_at(run))
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert metrics(run, "held/loss") == {4: evaluated[4]}
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    memory = "CUDA out of memory. Tried to allocate 2 GiB"
    advice = [line.partition("; what would take less: ")[2].split("; ")[0] for line in told]
    assert advice == ["", "eval_micro_batch_size_per_gpu = 1", "smaller samples in [sampling] (width, height, frames)"]
    assert [line.split("; what would take less: ")[0].split(", and the run goes on: ") for line in told] == [
        [
            "export after step 2 failed",
            f"{run / 'epoch1.unfinished' / 'adapter_model.safetensors'}: No space left on device",
        ],
        ["evaluation after step 2 failed", memory],
        ["samples after step 2 failed", memory],
    ]
    assert not list(run.glob("*.parts")) and not list(run.glob("*.unfinished")) and not list(run.glob("epoch1*"))
    # What was due then, and has failed, is not owed.
    saved = Checkpoint(run / "global_step2")
    assert saved.owed.duties == ("evaluation", "samples") and not saved.still_owed().duties
    assert len(list((run / "samples" / "step000004").glob("*.png"))) == 2


def export_at(run: Path) -> Path:
    return run / "epoch2" / "adapter_model.safetensors"


def test_a_last_export_that_fails_leaves_a_checkpoint_and_another_code(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(export, "write_tensors", full)
    config = write_config(max_steps=1, checkpoint_every_n_steps=None)
    with pytest.raises(UserError, match="last export failed.*--export") as raised:
        run_here(config)
    run = only_run(config)
    assert f"--export {run}" in str(raised.value)
    assert (run / "latest").read_text() == "global_step1" and not list(run.glob("*.parts"))
    monkeypatch.undo()
    assert run_here(config, "--export", str(run))
    assert newest_export(run)


def test_a_rank_that_fails_alone_hangs_no_other(
    write_config: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(max_steps=1, checkpoint_every_n_steps=1, sampling=SAMPLING)
    assert run_here(config)
    run = only_run(config)
    # Where the second rank writes its picture.
    (run / "samples" / "step000002" / "01_b.png").mkdir(parents=True)
    config = write_config(max_steps=3, gradient_accumulation_steps=1, checkpoint_every_n_steps=1, sampling=SAMPLING)
    codes, log = launch(config, "--resume_from_checkpoint", processes=2)
    assert codes == [0, 0], log
    assert log.count("samples after step 2 failed") == 1 and "01_b.png: Is a directory (on rank 1)" in log, log
    assert sorted(metrics(run, "train/loss")) == [1, 2, 3]
    assert len(list((run / "samples" / "step000003").glob("*.png"))) == 2


def meet_after(ranks: Ranks, fails: int | None, stops: int | None) -> str:
    def work() -> None:
        done.append(1)
        if ranks.rank == fails:
            raise OSError(errno.ENOSPC, "No space left on device", "a/file")

    attempt, done = Attempt(f"work {fails} {stops}", ranks, lambda: ranks.rank == stops), []
    attempt.alone(work)
    attempt.alone(work)
    try:
        attempt.meet()
    except Failed as failed:
        return f"{failed}, after {len(done)}"
    except StopRequested:
        return "stopped"
    return "met"


def test_ranks_that_meet_agree() -> None:
    nobody = run_ranks(meet_after, 2, None, None)
    assert nobody == ["met", "met"]
    assert run_ranks(meet_after, 2, None, 1) == ["stopped", "stopped"]
    # A failure counts more than a stop, and what has failed is not begun again.
    told = "a/file: No space left on device (on rank 1), after "
    assert run_ranks(meet_after, 2, 1, 0) == [f"{told}2", f"{told}1"]


def test_one_stage_that_fails_among_others_ends_the_run_with_the_reason() -> None:
    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. Further advice")

    attempt = Attempt("samples 5", Ranks(1, 2, 1, stages=2))
    with pytest.raises(UserError, match="samples 5: CUDA out of memory. Tried .* failed in stage 1"):
        attempt.in_pipeline(work)
    # One stage on several ranks that divide its weights waits for each other too; else it fails for itself.
    attempt = Attempt("samples 5", Ranks(1, 2))
    with pytest.raises(UserError, match="It failed on rank 1, for which the other ranks wait"):
        attempt.in_pipeline(work, all_ranks=True)
    assert attempt.in_pipeline(work) is None and attempt.error


def test_a_scheduler_that_cannot_step_is_told_before_anything_is_loaded(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "flux"
    shutil.copytree(MINI_FLUX, folder, symlinks=True)
    config = write_config(model__diffusers_path=str(folder), sampling=SAMPLING)
    assert run_here(config, "--check")
    file = folder / "scheduler" / "scheduler_config.json"
    for change, said in (
        ({"num_train_timesteps": "many"}, r"`num_train_timesteps` is \"many\", and a whole number"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "Scheduler can be made of this"),
    ):
        content = {**json.loads((MINI_FLUX / "scheduler" / file.name).read_text()), **change}
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=said):
            run_here(config, "--check")
    file.write_text((MINI_FLUX / "scheduler" / file.name).read_text())

    def without_sigmas(*_: Any, **__: Any) -> None:
        raise ValueError("no sigmas")

    with monkeypatch.context() as patch:
        patch.setattr(FlowMatchEulerDiscreteScheduler, "set_timesteps", without_sigmas)
        with pytest.raises(UserError, match=r"flux/scheduler\n  the scheduler cannot do the 2 steps of samples"):
            run_here(config, "--check")
    file.write_text(json.dumps(content))
    unused = toml.loads(config.read_text())
    del unused["sampling"]
    config.write_text(toml.dumps(unused))
    assert run_here(config, "--check"), "who draws nothing needs no scheduler"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_suffices_for_steps_what_is_due_and_the_end() -> None:
    clock = Clock()
    limit = TimeLimit(1000.0, 0.0, clock)
    limit.state_bytes = 10 * 10**9
    clock.now = 899.0
    assert not limit.is_up(), "50 s are kept in reserve, and 50 s are expected for a checkpoint"
    clock.now = 901.0
    assert limit.is_up()
    limit.took(CHECKPOINT, 5.0)
    limit.took(EXPORT, 20.0)
    assert not limit.is_up()
    for seconds in (30.0, 2.0, 3.0):
        limit.step_took(seconds)
    clock.now = 894.0
    assert not limit.is_up_after([])
    assert not limit.is_up_after(["evaluation"]), "which nobody has measured yet"
    limit.took("evaluation", 2.0)
    assert limit.is_up_after(["evaluation"]) and not limit.is_up_after(["samples"])
    clock.now = 896.0
    assert limit.is_up_after([]) and not limit.is_up()
    # A first step that compiles is forgotten.
    for _ in range(20):
        limit.step_took(2.0)
    assert not limit.is_up_after([])
    clock.now = 925.0
    assert limit.is_up()


def test_a_run_ends_in_time_with_a_checkpoint(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And with code 0; the evaluation that is known to take longer than what is left is not begun, since the same step
    is made again with it."""
    stop, step = StopRequests(), Trainer.step

    def stepped(trainer: Trainer, batches: object) -> object:
        result = step(trainer, batches)
        if result[0].step == 3:
            limit = trainer.parts.stop.time
            limit.ends_at = limit.clock() + 1000.0
            limit.took("evaluation", 2000.0)
        return result

    monkeypatch.setattr(Trainer, "step", stepped)
    # In these tests a run begins when the machine does.
    config = with_looks(write_config, time_limit=10**9, checkpoint_every_n_steps=None)
    assert not run_here(config, stop=stop) and stop.exit_code == 0
    run = only_run(config)
    assert "no time for another step and what is due after it" in caplog.text
    assert (run / "latest").read_text() == "global_step3" and (run / "step3").is_dir()
    assert sorted(metrics(run, "held/loss")) == [2]
    monkeypatch.undo()
    assert run_here(config, "--resume_from_checkpoint")
    assert sorted(metrics(run, "held/loss")) == [2, 4] and sorted(metrics(run, "train/loss")) == [1, 2, 3, 4]


def test_a_time_that_is_up_stops_before_the_first_step(write_config: Callable[..., Path]) -> None:
    stop = StopRequests()
    with pytest.raises(StopRequested):
        run_here(write_config(time_limit="1s"), stop=stop)
    assert stop.exit_code == 0
