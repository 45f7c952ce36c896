"""A checkpoint that is written while training goes on is that of its step; what goes wrong is told later."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import metrics
from tests.utils.run.test_goes_on import run_here
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run import checkpointing, saving
from utils.run.checkpoint import Checkpoint, damage_in
from utils.run.progress import Progress

MADE_WITH = {"identity": {}, "optimizer": {}, "steps_in_epoch": 4}


@pytest.fixture
def trained() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    parameters = {"weight": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    step(parameters, optimizer)
    return parameters, optimizer


def step(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    parameters["weight"].square().sum().backward()
    optimizer.step()


def test_it_holds_what_was_when_it_was_begun(
    tmp_path: Path, trained: tuple[dict[str, torch.nn.Parameter], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, optimizer = trained
    before = parameters["weight"].detach().clone()
    moment = optimizer.state[parameters["weight"]]["exp_avg"].clone()
    go, write = threading.Event(), saving.write_tensors
    monkeypatch.setattr(saving, "write_tensors", lambda *given: go.wait(20) and write(*given))
    begun = saving.Saving(tmp_path, Ranks(), Progress(step=1), parameters, optimizer, MADE_WITH, background=True)
    assert begun.is_writing and not (tmp_path / "latest").exists()
    step(parameters, optimizer)
    go.set()
    folder = begun.complete()
    assert not begun.is_writing and damage_in(folder) is None
    read = {"weight": torch.nn.Parameter(torch.zeros(2, 3))}
    anew = torch.optim.AdamW(read.values())
    opened = Checkpoint(folder)
    opened.load_weights(read)
    opened.load_optimizer(read, anew)
    assert torch.equal(read["weight"], before) and not torch.equal(parameters["weight"], before)
    assert torch.equal(anew.state[read["weight"]]["exp_avg"], moment)


def test_a_full_disk_is_told_when_the_ranks_meet(
    tmp_path: Path, trained: tuple[dict[str, torch.nn.Parameter], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    saving.save(tmp_path, Ranks(), Progress(step=1), *trained, MADE_WITH)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "state-0.safetensors")

    monkeypatch.setattr(saving, "write_tensors", full)
    begun = saving.Saving(tmp_path, Ranks(), Progress(step=2), *trained, MADE_WITH, background=True)
    with pytest.raises(UserError, match="step 2 is not written.*No space left.*from_checkpoint .*global_step1"):
        begun.complete()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "latest"]


def test_steps_are_made_meanwhile(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A step is told before the checkpoint of the one before; the last one is written at once. Without room for copies,
    all are, and everything is the same."""
    write = saving.write_tensors

    def slowly(*given: Any) -> Any:
        time.sleep(0.3)
        return write(*given)

    monkeypatch.setattr(saving, "write_tensors", slowly)
    runs = {}
    for share in (0.5, 0.0):
        monkeypatch.setattr(checkpointing, "SHARE_OF_MEMORY", share)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            config = write_config(max_steps=4, checkpoint_every_n_steps=2, output_dir=str(tmp_path / f"runs_{share}"))
            assert run_here(config)
        said = [record.getMessage().split("  ")[0] for record in caplog.records]
        told = [line.replace("global_", "") for line in said if line.startswith(("step ", "checkpoint: "))]
        order = [line.rpartition("/")[2] if ":" in line else line.partition("/")[0] for line in told]
        assert [line for line in order if " " in line] == ["step 1", "step 2", "step 3", "step 4"]
        assert [line for line in order if " " not in line] == ["step2", "step4"]
        assert (order.index("step 3") < order.index("step2")) == bool(share)
        (runs[share],) = [latest.parent for latest in (tmp_path / f"runs_{share}").glob("*/latest")]
    ours, reference = (metrics(run, "train/loss") for run in runs.values())
    assert ours == reference
    for name in ("global_step2", "global_step4"):
        one, other = ((run / name / "state-0.safetensors").read_bytes() for run in runs.values())
        assert one == other
