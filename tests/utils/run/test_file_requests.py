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
from tests.runs import only_run
from utils.ranks import Ranks, disconnect
from utils.run.signals import SAVE, SAVE_AND_QUIT, FileRequests, StopRequests
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
    assert not {path.name for path in run.iterdir()} & {SAVE, SAVE_AND_QUIT}
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
