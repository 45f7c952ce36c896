"""Files in the run's folder by which the user asks for a checkpoint, and for the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train as train_py
from tests.runs import metrics, only_run
from tests.utils.run.test_goes_on import SAMPLING, run_here, with_looks
from utils.ranks import Ranks, disconnect
from utils.run.file_requests import EVALUATE, REQUESTS, SAMPLE, SAVE, SAVE_AND_QUIT, STOP, FileRequests, agreed
from utils.run.signals import StopRequests
from utils.run.trainer import Trainer


@pytest.mark.parametrize("adapter", [{"type": "lora", "rank": 4}, None], ids=["lora", "full"])
def test_a_run_saves_and_quits_as_its_folder_asks(
    write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    adapter: dict[str, Any] | None,
) -> None:
    """At the end it exports an adapter, and says how a model is exported."""
    caplog.set_level(logging.INFO)
    asked = {2: SAVE, 3: SAVE_AND_QUIT}
    step = Trainer.step

    def stepped(trainer: Trainer, batches: object) -> object:
        done, values = step(trainer, batches)
        if done.step in asked:
            (trainer.parts.folder / asked[done.step]).touch()
        return done, values

    monkeypatch.setattr(Trainer, "step", stepped)
    config = write_config(max_steps=500, checkpoint_every_n_steps=None, adapter=adapter)
    stop = StopRequests()
    try:
        finished = train_py.run(train_py.parse_arguments(["--config", str(config)]), Ranks(), stop, 0.0)
    finally:
        disconnect()
    run = only_run(config)
    assert not finished and stop.exit_code == 0
    assert {path.name for path in run.glob("global_step*")} == {"global_step2", "global_step3"}
    assert not {path.name for path in run.iterdir()} & set(REQUESTS)
    said = caplog.text
    assert said.count("estimated memory per rank") == 1 and "stopped at step 3, epochs completed: 1" in said
    assert f"checkpoint: {run / 'global_step3'}" in said
    if adapter is None:
        assert f"stopped; --resume_from_checkpoint {run} goes on from here, and --export {run} exports" in said
        assert not list(run.glob("step*"))
    else:
        assert f"stopped; --resume_from_checkpoint {run} goes on from here\n" in said
        assert f"weights:    {run / 'step3' / 'adapter_model_comfyui.safetensors'}" in said
        exported = load_file(run / "step3" / "adapter_model.safetensors")
        saved = load_file(run / "global_step3" / "state-0.safetensors")
        factors = [name for name in saved if name.startswith("weights/")]
        assert len(exported) == len(factors) and any(exported[name].any() for name in exported)
        for name in factors:
            torch.testing.assert_close(exported[f"transformer.{name.removeprefix('weights/')}"], saved[name])


def test_a_folder_of_that_name_asks_for_nothing(tmp_path: Path) -> None:
    (tmp_path / SAVE).mkdir()
    assert not FileRequests(tmp_path).asked(SAVE)


def test_a_signal_counts_more_than_a_file() -> None:
    stop = StopRequests()
    stop.by_file, stop.received = True, 2
    assert stop.exit_code == 130


def test_a_run_draws_evaluates_and_ends_with_an_export_as_its_folder_asks(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a whole model too, whose export a stop by a signal does not wait for. A file that cannot be removed is obeyed
    once."""
    caplog.set_level(logging.INFO)
    asked = {1: (SAMPLE,), 2: (EVALUATE,), 4: (STOP, SAMPLE)}
    step, unlink = Trainer.step, Path.unlink

    def stepped(trainer: Trainer, batches: object) -> object:
        done, values = step(trainer, batches)
        for name in asked.get(done.step, ()):
            (trainer.parts.folder / name).touch()
        return done, values

    def fixed(path: Path, missing_ok: bool = False) -> None:
        if path.name == EVALUATE:
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Trainer, "step", stepped)
    monkeypatch.setattr(Path, "unlink", fixed)
    never = dict.fromkeys(("eval_every_n_steps", "checkpoint_every_n_steps", "save_every_n_steps"))
    never |= {"max_steps": 500}
    config = with_looks(write_config, sampling={**SAMPLING, "sample_every_n_steps": 100}, adapter=None, **never)
    stop = StopRequests()
    assert not run_here(config, stop=stop) and stop.exit_code == 0
    run = only_run(config)
    assert sorted(path.name for path in (run / "samples").glob("step*")) == ["step000001", "step000004"]
    assert sorted(metrics(run, "held/loss")) == [2]
    assert {path.name for path in run.iterdir()} & set(REQUESTS) == {EVALUATE}
    assert (run / "global_step4").is_dir() and list((run / "epoch2").rglob("*.safetensors"))
    said = caplog.text
    assert f"stopped; --resume_from_checkpoint {run} goes on from here\n" in caplog.text
    assert "the file sample asks for samples after step 1" in said and "stopped at step 4" in said
    assert said.count("what eval asks for is done once, since the file cannot be removed: ") == 1


def test_what_a_config_has_nothing_for_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    requests = FileRequests(tmp_path)
    (tmp_path / SAMPLE).touch()
    assert agreed([False] * 5, requests).files == (SAMPLE,) and not agreed([False] * 5, None).files
    requests.tell([SAMPLE, SAVE], 3, [])
    assert caplog.messages == ["the file sample changes nothing: there is no prompt in [sampling]"]
    requests.done([SAMPLE])
    assert not agreed([True] * 5, requests).files
