"""State that is written and read again, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.families.ddpm import DDPMOptions
from utils.adapters.lokr import LokrSettings
from utils.adapters.lora import LoraSettings
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run import checkpoint, saving
from utils.run.folder import find_checkpoint, new_name
from utils.run.progress import Progress
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import AdapterSettings, Settings

LORA = {"seed": 0, "[adapter] type": "lora", "[adapter] rank": 4, "[adapter] alpha": None}
ADAMW = {"type": "adamw", "lr": 1e-3, "betas": [0.9, 0.999]}
MADE_WITH = {"optimizer": ADAMW, "steps_in_epoch": 4, "identity": LORA}


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
    saving.save(folder, Ranks(), progress, parameters, optimizer, MADE_WITH)
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

    # Below 4096 elements it keeps 32 bits. Of two, the tables of what 8 bits stand for are one tensor on a CPU.
    draw = torch.Generator().manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(64, 128, generator=draw)) for name in ("weight", "other")}
    optimizer = AdamW8bit(parameters.values(), lr=1e-2)
    step(parameters, optimizer)
    saving.save(tmp_path, Ranks(), Progress(step=1), parameters, optimizer, MADE_WITH)
    fresh = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    other = AdamW8bit(fresh.values(), lr=1e-2)
    checkpoint.Checkpoint(tmp_path / "global_step1").load_optimizer(fresh, other)
    kept, again = optimizer.state[parameters["weight"]], other.state[fresh["weight"]]
    assert {key: type(value) for key, value in again.items()} == {key: type(value) for key, value in kept.items()}
    step(parameters, optimizer)
    step(fresh, other)
    assert all(torch.equal(fresh[name], parameters[name]) for name in parameters)


def test_latest_follows_and_leaves_nothing_unfinished(tmp_path: Path) -> None:
    for number in (3, 6):
        save(tmp_path, Progress(step=number))
    assert (tmp_path / "latest").read_text() == "global_step6"
    assert {p.name for p in tmp_path.iterdir()} == {"global_step3", "global_step6", "latest"}


def test_parameters_that_do_not_fit_are_told(tmp_path: Path) -> None:
    save(tmp_path, Progress(step=1))
    opened = checkpoint.Checkpoint(tmp_path / "global_step1")
    with pytest.raises(UserError, match="other.*not in the checkpoint"):
        opened.load_weights({"other": torch.nn.Parameter(torch.zeros(1))})
    with pytest.raises(UserError, match=r"\[3, 2\], this run's is \[5\]"):
        opened.load_weights({"block.0.weight": torch.nn.Parameter(torch.zeros(5))})


def test_what_a_run_trains_is_compared_by_the_headers(tmp_path: Path) -> None:
    parameters, _ = save(tmp_path, Progress(step=1))
    opened = checkpoint.Checkpoint(tmp_path / "global_step1")
    opened.check_weights(parameters)
    with pytest.raises(UserError, match="'weights/other' is not in the checkpoint"):
        opened.check_weights({**parameters, "other": parameters["head.bias"]})
    with pytest.raises(UserError, match=r"\[3, 2\], this run's is \[4\]"):
        opened.check_weights({**parameters, "block.0.weight": parameters["head.bias"]})
    with pytest.raises(UserError, match="has 'weights/head.bias', which this run does not train"):
        opened.check_weights({"block.0.weight": parameters["block.0.weight"]})


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
        with pytest.raises(UserError, match=told):
            opened.check_optimizer(settings, **flags)


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Changes what `progress.json` says."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / "progress.json").read_text())
        change(content)
        (folder / "progress.json").write_text(json.dumps(content))

    return spoil


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda folder: (folder / "progress.json").write_text("{"), "progress.json\n  is not JSON"),
    "no object": (lambda folder: (folder / "progress.json").write_text("3"), "progress.json\n  holds no JSON object"),
    "no progress.json": (lambda folder: (folder / "progress.json").unlink(), "progress.json\n  cannot be read"),
    "no epoch": (rewrite(lambda content: content["progress"].pop("epoch")), "lacks `epoch`"),
    "no progress": (rewrite(lambda content: content.pop("progress")), "lacks `progress`"),
    "no identity": (rewrite(lambda content: content["made_with"].pop("identity")), "lacks `identity`"),
    "a truncated state": (
        lambda folder: os.truncate(folder / "state-0.safetensors", 100),
        "state-0.safetensors\n  not a whole safetensors file",
    ),
    "a lost state": (
        lambda folder: (folder / "state-0.safetensors").unlink(),
        "state-0.safetensors\n  not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_names_the_one_before(tmp_path: Path, damage: str) -> None:
    for step_number in (9, 10, 12):
        save(tmp_path, Progress(step=step_number))
    spoil, words = DAMAGE[damage]
    spoil(tmp_path / "global_step10")
    with pytest.raises(UserError) as raised:
        checkpoint.Checkpoint(tmp_path / "global_step10")
    assert words in str(raised.value)
    assert f"--resume_from_checkpoint {tmp_path / 'global_step9'}" in str(raised.value)
    spoil(tmp_path / "global_step9")
    with pytest.raises(UserError, match="there is none before it"):
        checkpoint.Checkpoint(tmp_path / "global_step9")


def test_a_checkpoint_of_another_format_is_told(tmp_path: Path) -> None:
    save(tmp_path, Progress(step=1))
    (tmp_path / "global_step1" / "progress.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="another version"):
        checkpoint.Checkpoint(tmp_path / "global_step1")


def identity(adapter: AdapterSettings | None, model: ModelSettings | None = None) -> dict[str, Any]:
    model = model or ModelSettings(type="flux")
    optimizer = {"type": "adamw", "lr": 1e-3}
    return checkpoint.identity_of(
        Settings(output_dir="runs", dataset="dataset.toml", model=model, optimizer=optimizer, adapter=adapter)
    )


def made_with(tmp_path: Path, identity: dict[str, Any]) -> checkpoint.Checkpoint:
    parameters, optimizer = trained()
    others = {**MADE_WITH, "identity": identity}
    saving.save(tmp_path, Ranks(), Progress(step=1), parameters, optimizer, others)
    return checkpoint.Checkpoint(tmp_path / "global_step1")


def lora(**keys: Any) -> LoraSettings:
    return LoraSettings(type="lora", **{"rank": 4, **keys})


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        (lora(rank=8), r"\[adapter\] rank = 8 \(checkpoint: 4\)"),
        (lora(alpha=2.0), r"\[adapter\] alpha = 2.0 \(checkpoint: not set\)"),
        (lora(include=["to_q"]), r"\[adapter\] include = \['to_q'\] \(checkpoint: \[\]\)"),
        (lora(exclude=["to_q"]), r"\[adapter\] exclude = \['to_q'\] \(checkpoint: \[\]\)"),
        (
            LokrSettings(type="lokr", rank=4, factor=8),
            r"type = lokr \(checkpoint: lora\), .* factor = 8 \(.*not",
        ),
        (None, r"\[adapter\] type = not set \(checkpoint: lora\)"),
    ],
)
def test_another_adapter_is_told_by_key_and_values(tmp_path: Path, adapter: AdapterSettings | None, told: str) -> None:
    opened = made_with(tmp_path, identity(lora()))
    opened.check_identity(identity(lora()))
    with pytest.raises(UserError, match=told):
        opened.check_identity(identity(adapter))


def test_each_table_says_what_binds_it(tmp_path: Path) -> None:
    preset = {"path": tmp_path / "style.safetensors", "weight": 0.5}
    assert identity(None, ModelSettings(type="flux", preset_adapters=[preset])) == {
        "seed": 0,
        "[model] type": "flux",
        "[model] preset_adapters": [["style.safetensors", 0.5]],
        "[model] rescale_betas_zero_snr": False,
        "[model] train": [],
    }
    ddpm = identity(None, DDPMOptions(type="sdxl", prediction_type="v_prediction"))
    assert ddpm["[model] prediction_type"] == "v_prediction" and ddpm["[model] beta_schedule"] is None
    keys = {key.removeprefix("[adapter] ") for key in identity(lora()) if key.startswith("[adapter]")}
    sizes = {"rank", "alpha", "conv_dim", "conv_alpha", "dim_from_weights"}
    assert keys == {"type", "include", "exclude", "rslora", "dora", "init"} | sizes
    assert identity(LokrSettings(type="lokr", factor=8))["[adapter] factor"] == 8


BEFORE = {
    "seed": 0,
    "[model] type": "flux",
    "[model] preset_adapters": [],
    "[model] prediction_type": None,
    "[model] beta_schedule": None,
    "[model] rescale_betas_zero_snr": False,
    "[adapter] type": "lora",
    "[adapter] rank": 4,
    "[adapter] alpha": None,
    "[adapter] factor": None,
    "[adapter] factors": None,
    "[adapter] include": [],
    "[adapter] exclude": [],
}
"""What a checkpoint says that has every key, whether a table has it or not."""


@pytest.mark.parametrize("without", [(), ("[model] preset_adapters", "[model] rescale_betas_zero_snr")])
def test_checkpoints_from_before_go_on(tmp_path: Path, without: tuple[str, ...]) -> None:
    """Those that have all keys, and those from when there were fewer."""
    opened = made_with(tmp_path, {key: value for key, value in BEFORE.items() if key not in without})
    opened.check_identity(identity(lora()))
    with pytest.raises(UserError, match=r"\[model\] rescale_betas_zero_snr = True"):
        opened.check_identity(identity(lora(), DDPMOptions(type="flux", rescale_betas_zero_snr=True)))
    with pytest.raises(UserError, match=r"seed = 1 \(checkpoint: 0\)"):
        opened.check_identity({**identity(lora()), "seed": 1})


def test_a_key_that_only_the_checkpoint_has_counts(tmp_path: Path) -> None:
    opened = made_with(tmp_path, {**BEFORE, "[model] prediction_type": "v_prediction"})
    with pytest.raises(UserError, match=r"prediction_type = not set \(checkpoint: v_prediction\)"):
        opened.check_identity(identity(lora()))


def test_files_are_readable_by_whom_the_umask_says(tmp_path: Path) -> None:
    save(tmp_path, Progress(step=1))
    (tmp_path / "other").write_text("")
    expected = (tmp_path / "other").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "global_step1").iterdir()} == {expected}


def of_this_run(folder: Path) -> list[str]:
    return []


def test_the_newest_run_with_a_checkpoint_is_found(tmp_path: Path) -> None:
    runs = [tmp_path / f"2026010{day}_00-00-00" for day in (1, 2, 3)]
    for run in runs:
        run.mkdir()
    (tmp_path / "cache").mkdir()
    for run in runs[:2]:
        save(run, Progress(step=1))
    assert find_checkpoint(tmp_path, "", of_this_run) == runs[1] / "global_step1"
    assert find_checkpoint(tmp_path, runs[0].name, of_this_run) == runs[0] / "global_step1"
    assert find_checkpoint(tmp_path, str(runs[0] / "."), of_this_run) == runs[0] / "global_step1"
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path, str(runs[2]), of_this_run)
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoint(tmp_path, "nowhere", of_this_run)


@pytest.mark.parametrize("text", [None, b"", b"global_step9\n", b"\xff\x00", b"../other", b"."])
def test_without_latest_the_newest_is_taken_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: bytes | None
) -> None:
    run = tmp_path / "20260101_00-00-00"
    for number in (3, 10):
        save(run, Progress(step=number))
    (run / "latest").unlink()
    if text is not None:
        (run / "latest").write_bytes(text)
    (tmp_path / "20260102_00-00-00").mkdir()
    for asked in ("", run.name):
        assert find_checkpoint(tmp_path, asked, of_this_run) == run / "global_step10"
    assert f"'latest' is missing or names no checkpoint; the newest is taken: {run / 'global_step10'}" in caplog.text
    assert "passed over a newer run, which has no checkpoint: 20260102_00-00-00" in caplog.text


def test_an_older_checkpoint_that_is_named_is_taken(tmp_path: Path) -> None:
    run = tmp_path / "20260101_00-00-00"
    for number in (3, 6):
        save(run, Progress(step=number))
    for asked in (str(run / "global_step3"), f"{run.name}/global_step3"):
        assert checkpoint.Checkpoint(find_checkpoint(tmp_path, asked, of_this_run)).progress.step == 3
    assert checkpoint.Checkpoint(find_checkpoint(tmp_path, "", of_this_run)).progress.step == 6


def test_two_runs_of_one_second_get_two_names(tmp_path: Path) -> None:
    first = new_name(tmp_path)
    (tmp_path / first).mkdir()
    assert new_name(tmp_path) != first


@pytest.mark.parametrize(
    ("keep", "spared", "left"),
    [
        (1, None, {"global_step12", "global_step20"}),
        (2, None, {"global_step10", "global_step12", "global_step20"}),
        (2, "global_step3", {"global_step3", "global_step10", "global_step12", "global_step20"}),
        (9, None, {"global_step3", "global_step9", "global_step10", "global_step12", "global_step20"}),
    ],
)
def test_older_checkpoints_are_removed(tmp_path: Path, keep: int, spared: str | None, left: set[str]) -> None:
    """Nothing else; and not one of a later step, which a run left that went on from an older checkpoint."""
    others = {"epoch3", "step9", "step9_ema", "latest", "global_step_mine"}
    for name in ("global_step3", "global_step9", "global_step10", "global_step12", "global_step20", *others):
        (tmp_path / name).mkdir()
    (tmp_path / "global_step1.removed").mkdir()
    # Another way to the same folder.
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    saving.remove_older(tmp_path / "global_step12", keep, spared and tmp_path / "link" / spared)
    assert {p.name for p in tmp_path.iterdir()} == left | others | {"link"}
