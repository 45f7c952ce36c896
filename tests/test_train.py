"""The command line from TOML to exports, on real processes: training, resuming, stopping."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toml
import torch
from PIL import Image

from tests.runs import (
    COLOURS,
    ROOT,
    launch,
    metrics,
    newest_export,
    only_run,
    rewind,
)
from utils.dataset.held_out import place_of


def test_a_run_leaves_what_is_promised(write_config: Callable[..., Path]) -> None:
    evaluation = write_config()
    shutil.copy(evaluation.parent / "data.toml", evaluation.parent / "eval.toml")
    config = write_config(
        eval_datasets=[{"name": "seen", "config": str(evaluation.parent / "eval.toml")}],
        eval_every_n_epochs=1,
        pipeline_stages=2,
        partition_method="time",
        save_every_n_epochs=1,
        save_format="both",
        activation_checkpointing=True,
        sampling={
            "prompts": ["a red picture"],
            "sample_before_first_step": True,
            "width": 64,
            "height": 64,
            "steps": 2,
        },
    )
    codes, log = launch(config, processes=2)
    assert codes == [0, 0], log
    run = only_run(config)
    assert (run / "config.toml").read_text() == config.read_text()
    first, last = re.findall(r"stage \d \(layers? (\d+)(?: to \d+)?\): [\d.e-]+ TFLOP", log)
    assert first == "0" and toml.load(run / "settings.toml")["partition_split"] == [int(last)], log
    assert {p.name for p in run.iterdir()} >= {
        "dataset.toml",
        "settings.toml",
        "tensorboard_logs",
        "samples",
        "latest",
        "global_step6",
        "epoch1",
        "epoch2",
        "epoch3",
    }
    if not torch.cuda.is_available():
        assert not metrics(run, "train/peak_memory_gib")
    check_numbers_of_steps(run)
    assert sorted(metrics(run, "train/epoch_loss")) == [2, 4, 6]
    assert sorted(metrics(run, "seen/loss")) == [0, 2, 4, 6]
    quantiles = [metrics(run, f"seen/loss_quantile_{q / 10:.2f}")[6] for q in range(1, 10)]
    assert metrics(run, "seen/loss")[6] == pytest.approx(sum(quantiles) / 9)
    with Image.open(run / "samples" / "step000006" / "00_a_red_picture.png") as picture:
        assert picture.size == (64, 64)
    assert (run / "epoch3" / "adapter_model_comfyui.safetensors").is_file()
    assert re.search(r"cache vae: wanted=7 reused=0 encoded=7 failed=0", log)
    check_page(run)


def check_numbers_of_steps(run: Path) -> None:
    parts = [f"{part}_time_sec" for part in ("step", "data", "compute", "communication", "optimizer")]
    shares = ["samples_per_sec", "tokens_per_sec", "host_memory_gib", "bubble_share"]
    for name in ("loss", "grad_norm", "lr", *parts, *shares):
        assert sorted(metrics(run, f"train/{name}")) == [1, 2, 3, 4, 5, 6], name
    for step in range(1, 7):
        whole, *own = (metrics(run, f"train/{part}")[step] for part in parts)
        assert 0 < sum(own) <= whole and own[1] > 0
        # Two stages wait at least for a third of the time with two micro-batches.
        assert 1 / 3 - 1e-6 <= metrics(run, "train/bubble_share")[step] < 0.9
        # Of a picture of 4096 pixels, of which a latent has one for 64, and a token is four of them.
        pace = metrics(run, "train/tokens_per_sec")[step] / metrics(run, "train/samples_per_sec")[step]
        assert 10 <= pace <= 20
    levels = [metrics(run, f"train_deciles/loss_{level / 20:.2f}") for level in range(1, 20, 2)]
    assert {step for own in levels for step in own} == {1, 2, 3, 4, 5, 6}


def check_page(run: Path) -> None:
    page = (run / "run.html").read_text()
    # Its state, its evaluation, its warnings, its pictures, its data and its plan.
    for text in ("6 of 6", "seen/loss at step 6", "in both sets: ", "data:image/jpeg", "64 x 64", "global batch:"):
        assert text in page, text
    assert page.count("data:image/jpeg") == 2


@pytest.mark.parametrize(
    ("keys", "steps"),
    [({"epochs": 2, "max_steps": None}, 4), ({"epochs": 2, "max_steps": 3}, 3), ({"max_steps": 5}, 5)],
)
def test_epochs_and_max_steps_end_a_run(write_config: Callable[..., Path], keys: dict[str, Any], steps: int) -> None:
    config = write_config(checkpoint_every_n_steps=None, **keys)
    codes, log = launch(config)
    assert codes == [0], log
    run = only_run(config)
    assert sorted(metrics(run, "train/loss")) == list(range(1, steps + 1))
    assert not (run / "latest").exists()


def test_evaluation_is_the_same_on_any_layout_and_in_any_batches_of_training(
    write_config: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    """To the last digit that is told; also of a set that has nothing for one of the data ranks, and of a part of the
    training data, which is that of a set of its own with those pictures."""
    held = {file.stem for file in pictures.glob("*.png") if place_of(digest_of(file)) < 0.5}
    assert 2 <= len(held) < len(COLOURS)
    for name, stems in {"one": {"1"}, "own": held}.items():
        (tmp_path / name).mkdir()
        for file in (file for file in pictures.iterdir() if file.stem in stems):
            shutil.copy(file, tmp_path / name)
    sets = {"seen": pictures, "one": tmp_path / "one", "own": tmp_path / "own"}
    for name, folder in sets.items():
        data = {"resolutions": [64], "enable_ar_bucket": True, "directory": [{"path": str(folder)}]}
        (tmp_path / f"{name}.toml").write_text(toml.dumps(data))
    entries = [{"name": name, "config": str(tmp_path / f"{name}.toml")} for name in sets]
    entries.append({"name": "part", "fraction": 0.5})
    results = []
    for processes, stages, trained, batch in ((1, 1, 1, 3), (2, 1, 4, 3), (2, 2, 4, 3), (1, 1, 1, 1)):
        batches = {"micro_batch_size_per_gpu": trained, "eval_micro_batch_size_per_gpu": batch}
        keys = {"pipeline_stages": stages, "eval_quantiles": [0.2, 0.9], **batches}
        codes, log = launch(write_config(max_steps=1, eval_datasets=entries, **keys), processes=processes)
        assert set(codes) == {0}, log
        run = only_run(tmp_path / "run.toml")
        assert set(samples_kept(run, "part")) == set(samples_kept(run, "own")) and len(samples_kept(run, "one")) == 1
        names = [f"{name}/loss{end}" for name in sets for end in ("", "_quantile_0.20", "_quantile_0.90")]
        results.append({name: metrics(run, name)[0] for name in [*names, "part/loss", "own/loss_standard_error"]})
        assert "took" in log and "in both sets" in log, log
        shutil.rmtree(run)
    assert results[0] == results[1] == results[2]
    # Products of other batches are added up in another order.
    assert results[3] == pytest.approx(results[0], rel=1e-6)
    assert [f"{loss:.5f}" for loss in results[3].values()] == [f"{loss:.5f}" for loss in results[0].values()]


def digest_of(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def samples_kept(run: Path, name: str) -> dict[str, float]:
    return json.loads((run / "evaluations" / "step000000.json").read_text())[name]["samples"]


@pytest.mark.parametrize(("processes", "stages"), [(1, 1), (2, 2), (2, 1)])
def test_resuming_computes_what_an_uninterrupted_run_would(
    write_config: Callable[..., Path], processes: int, stages: int
) -> None:
    config = write_config(pipeline_stages=stages)
    codes, log = launch(config, processes=processes)
    assert set(codes) == {0}, log
    run = only_run(config)
    weights, losses = newest_export(run), metrics(run, "train/loss")
    lines = len((run / "metrics.jsonl").read_text().splitlines())
    rewind(run)
    codes, log = launch(config, "--resume_from_checkpoint", processes=processes)
    assert set(codes) == {0}, log
    assert metrics(run, "train/loss") == losses
    assert len((run / "metrics.jsonl").read_text().splitlines()) == lines
    again = newest_export(run)
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_checkpoint_loads_on_another_layout(write_config: Callable[..., Path]) -> None:
    config = write_config(
        adapter__dropout=0.0, pipeline_stages=2, partition_method="memory", stage_weights=[2, 1], blocks_to_swap=[2, 1]
    )
    assert launch(config, processes=2)[0] == [0, 0]
    run = only_run(config)
    weights = newest_export(run)
    rewind(run)
    config = write_config(adapter__dropout=0.0)
    codes, log = launch(config, "--resume_from_checkpoint", str(run))
    assert codes == [0], log
    again = newest_export(run)
    assert all(torch.allclose(again[name], weights[name], atol=1e-4) for name in weights)


def test_older_checkpoints_go_but_for_the_one_that_was_resumed(write_config: Callable[..., Path]) -> None:
    config = write_config(max_steps=3, checkpoint_every_n_steps=1)
    assert launch(config)[0] == [0]
    run = only_run(config)
    config = write_config(checkpoint_every_n_steps=1, keep_checkpoints=2, save_every_n_steps=4)
    codes, log = launch(config, "--resume_from_checkpoint", str(run / "global_step2"))
    assert codes == [0], log
    assert {p.name for p in run.glob("global_step*")} == {"global_step2", "global_step5", "global_step6"}
    # And no export goes.
    assert {p.name for p in run.iterdir()} >= {"epoch2", "epoch3", "after_step2.set_aside"}
    assert {p.name for p in (run / "after_step2.set_aside").glob("*step3")} == {"step3", "global_step3"}


def test_an_export_takes_the_place_of_none_after_the_data_began_anew(write_config: Callable[..., Path]) -> None:
    config = write_config(max_steps=4, checkpoint_every_n_steps=1, ema={})
    codes, log = launch(config, "--deepspeed")
    assert codes == [0] and "--deepspeed: not used: DeepSpeed is always used" in log
    run = only_run(config)
    before = newest_export(run)
    words = ["--resume_from_checkpoint", str(run / "global_step3"), "--reset_dataloader"]
    codes, log = launch(write_config(max_steps=5, ema={}), *words)
    assert codes == [0], log
    # The second epoch, in which the checkpoint was made, begins anew: two more steps are its end.
    aside = run / "after_step3.set_aside"
    for place in (run, aside):
        assert {p.name for p in place.glob("epoch*")} == {"epoch2", "epoch2_ema"}
    again = newest_export(aside)
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_another_configs_run_goes_on_if_it_is_named_alone(write_config: Callable[..., Path]) -> None:
    config = write_config(max_steps=1, checkpoint_every_n_steps=1)
    assert launch(config)[0] == [0]
    run, other = only_run(config), config.with_name("other.toml")
    shutil.copy(config.with_name("data.toml"), other)
    config = write_config(max_steps=2, checkpoint_every_n_steps=1, dataset=str(other))
    codes, log = launch(config, "--resume_from_checkpoint")
    changed = f"dataset = {other} (checkpoint: {config.with_name('data.toml')})"
    assert codes == [1] and f"{run.name}: {changed}" in log and "cache vae" not in log, log
    codes, log = launch(config, "--resume_from_checkpoint", run.name)
    assert codes == [0] and f"global_step1 goes on with {changed}" in log, log
    # From then on it is that config's.
    codes, log = launch(write_config(max_steps=3, dataset=str(other)), "--resume_from_checkpoint")
    assert codes == [0] and "goes on from" in log and (run / "resumed_step2" / "settings.toml").is_file(), log


def test_a_signal_to_one_process_stops_all_after_the_step(write_config: Callable[..., Path]) -> None:
    config = write_config(pipeline_stages=2, max_steps=500)
    codes, log = launch(config, processes=2, stop_after="step 2/500")
    assert codes == [143, 143], log
    run = only_run(config)
    done = int((run / "latest").read_text().removeprefix("global_step"))
    assert 2 <= done < 500
    assert max(metrics(run, "train/loss")) == done


def test_a_stop_before_the_first_step_keeps_what_is_cached(write_config: Callable[..., Path]) -> None:
    config = write_config(sampling__prompts=["a red picture"], sampling__sample_every_n_steps=1, max_steps=500)
    codes, log = launch(config, stop_after="cache vae: wanted=7")
    assert codes == [143], log
    assert "Traceback" not in log
    codes, log = launch(config, "--cache_only")
    assert codes == [0] and "cache vae: wanted=7 reused=7 encoded=0" in log


def test_a_stop_leaves_an_evaluation_half_done(write_config: Callable[..., Path], pictures: Path) -> None:
    config = write_config(data={"resolutions": list(range(64, 192, 16))})
    evaluation = config.with_name("evaluation.toml")
    config.with_name("data.toml").rename(evaluation)
    config = write_config(pipeline_stages=2, eval_datasets=[{"name": "held", "config": str(evaluation)}])
    codes, log = launch(config, processes=2, stop_after="ready after")
    assert codes == [143, 143] and "stopped before a step was made" in log, log
    assert not metrics(only_run(config), "held/loss")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_in_bfloat16_and_resumes_to_the_bit(write_config: Callable[..., Path]) -> None:
    config = write_config(
        model__dtype="bfloat16",
        activation_checkpointing=True,
        sampling={"prompts": ["a red picture"], "sample_every_n_steps": 6, "width": 64, "height": 64, "steps": 2},
    )
    # In processes of its own: those of `launch` are kept off the GPU.
    command = [sys.executable, "train.py", "--config", str(config)]
    subprocess.run(command, cwd=ROOT, check=True)
    run = only_run(config)
    weights, losses = newest_export(run), metrics(run, "train/loss")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    memory = metrics(run, "train/peak_memory_gib")
    assert sorted(memory) == sorted(losses)
    assert all(0.001 < peak < 1.0 for peak in memory.values())
    rewind(run)
    subprocess.run([*command, "--resume_from_checkpoint"], cwd=ROOT, check=True)
    assert metrics(run, "train/loss") == losses
    again = newest_export(run)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
