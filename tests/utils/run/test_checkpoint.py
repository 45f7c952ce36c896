"""State that is written and read again, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from utils.ranks import Ranks
from utils.run import checkpoint
from utils.run.folder import find_checkpoint, new_name
from utils.run.progress import Progress
from utils.settings.errors import SettingsError

ADAMW = {"type": "adamw", "lr": 1e-3, "betas": [0.9, 0.999]}


def trained() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """Two parameters in two types, after two steps."""
    torch.manual_seed(0)
    parameters = {
        "block.0.weight": torch.nn.Parameter(torch.randn(3, 2)),
        "head.bias": torch.nn.Parameter(torch.randn(4, dtype=torch.bfloat16)),
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for _ in range(2):
        step(parameters, optimizer)
    return parameters, optimizer


def step(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum((p.float() ** 2).sum() for p in parameters.values()).backward()
    optimizer.step()


def save(folder: Path, progress: Progress) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    parameters, optimizer = trained()
    checkpoint.save(
        folder, Ranks(), progress, parameters, optimizer, {"optimizer": ADAMW, "global_batch": 4, "identity": {}}
    )
    return parameters, optimizer


def test_what_is_loaded_goes_on_to_the_bit(tmp_path: Path) -> None:
    progress = Progress(step=7, epoch=1, step_in_epoch=2, examples=28, epoch_loss_sum=0.1 + 0.2)
    parameters, optimizer = save(tmp_path, progress)
    opened = checkpoint.Checkpoint(tmp_path / "global_step7")
    assert opened.progress == progress
    fresh = {name: torch.nn.Parameter(torch.zeros_like(p)) for name, p in parameters.items()}
    other = torch.optim.AdamW(fresh.values(), lr=1e-2)
    opened.load_weights(fresh)
    opened.load_optimizer(fresh, other)
    step(parameters, optimizer)
    step(fresh, other)
    assert all(torch.equal(fresh[name], p) for name, p in parameters.items())


def test_what_bitsandbytes_keeps_is_of_its_types_again(tmp_path: Path) -> None:
    from bitsandbytes.optim import AdamW8bit

    # Below 4096 elements it keeps 32 bits.
    parameters = {"weight": torch.nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))}
    optimizer = AdamW8bit(parameters.values(), lr=1e-2)
    step(parameters, optimizer)
    checkpoint.save(tmp_path, Ranks(), Progress(step=1), parameters, optimizer, {})
    fresh = {"weight": torch.nn.Parameter(parameters["weight"].detach().clone())}
    other = AdamW8bit(fresh.values(), lr=1e-2)
    checkpoint.Checkpoint(tmp_path / "global_step1").load_optimizer(fresh, other)
    kept, again = optimizer.state[parameters["weight"]], other.state[fresh["weight"]]
    assert {key: type(value) for key, value in again.items()} == {key: type(value) for key, value in kept.items()}
    step(parameters, optimizer)
    step(fresh, other)
    assert torch.equal(fresh["weight"], parameters["weight"])


def test_latest_follows_and_leaves_nothing_unfinished(tmp_path: Path) -> None:
    for number in (3, 6):
        save(tmp_path, Progress(step=number))
    assert (tmp_path / "latest").read_text() == "global_step6"
    assert {p.name for p in tmp_path.iterdir()} == {"global_step3", "global_step6", "latest"}


def test_parameters_that_do_not_fit_are_told(tmp_path: Path) -> None:
    save(tmp_path, Progress(step=1))
    opened = checkpoint.Checkpoint(tmp_path / "global_step1")
    with pytest.raises(SettingsError, match="other.*not in the checkpoint"):
        opened.load_weights({"other": torch.nn.Parameter(torch.zeros(1))})
    with pytest.raises(SettingsError, match=r"\[3, 2\], this run's is \[5\]"):
        opened.load_weights({"block.0.weight": torch.nn.Parameter(torch.zeros(5))})


@pytest.mark.parametrize(
    ("settings", "flags", "told"),
    [
        (ADAMW, {}, None),
        ({**ADAMW, "lr": 5e-3}, {}, r"lr = 0.005 \(checkpoint: 0.001\); pass --reset_optimizer_params"),
        ({**ADAMW, "lr": 5e-3}, {"new_parameters": True}, None),
        ({**ADAMW, "type": "sgd"}, {"new_parameters": True}, "pass --reset_optimizer"),
        ({**ADAMW, "type": "sgd"}, {"new_state": True}, None),
    ],
)
def test_another_optimizer_must_be_asked_for(tmp_path: Path, settings: dict, flags: dict, told: str | None) -> None:
    save(tmp_path, Progress(step=1))
    opened = checkpoint.Checkpoint(tmp_path / "global_step1")
    flags = {"new_parameters": False, "new_state": False, **flags}
    if told is None:
        opened.check_optimizer(settings, **flags)
    else:
        with pytest.raises(SettingsError, match=told):
            opened.check_optimizer(settings, **flags)


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    save(tmp_path, Progress(step=1))
    (tmp_path / "global_step1" / "progress.json").write_text("{")
    with pytest.raises(SettingsError, match="cannot be read"):
        checkpoint.Checkpoint(tmp_path / "global_step1")
    (tmp_path / "global_step1" / "progress.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(SettingsError, match="another version"):
        checkpoint.Checkpoint(tmp_path / "global_step1")


def test_the_newest_run_with_a_checkpoint_is_found(tmp_path: Path) -> None:
    runs = [tmp_path / f"2026010{day}_00-00-00" for day in (1, 2, 3)]
    for run in runs:
        run.mkdir()
    (tmp_path / "cache").mkdir()
    for run in runs[:2]:
        (run / "latest").write_text("global_step1")
    assert find_checkpoint(tmp_path, "") == runs[1] / "global_step1"
    assert find_checkpoint(tmp_path, runs[0].name) == runs[0] / "global_step1"
    assert find_checkpoint(tmp_path, str(runs[0] / ".")) == runs[0] / "global_step1"
    with pytest.raises(SettingsError, match="holds no checkpoint"):
        find_checkpoint(tmp_path, str(runs[2]))
    with pytest.raises(SettingsError, match="no such folder"):
        find_checkpoint(tmp_path, "nowhere")


def test_an_older_checkpoint_that_is_named_is_taken(tmp_path: Path) -> None:
    run = tmp_path / "20260101_00-00-00"
    for number in (3, 6):
        save(run, Progress(step=number))
    for asked in (str(run / "global_step3"), f"{run.name}/global_step3"):
        assert checkpoint.Checkpoint(find_checkpoint(tmp_path, asked)).progress.step == 3
    assert checkpoint.Checkpoint(find_checkpoint(tmp_path, "")).progress.step == 6


def test_two_runs_of_one_second_get_two_names(tmp_path: Path) -> None:
    first = new_name(tmp_path)
    (tmp_path / first).mkdir()
    assert new_name(tmp_path) != first
