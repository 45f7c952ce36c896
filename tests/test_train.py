"""The command line from TOML to exports, on real processes: training, resuming, mistakes of the user's."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toml
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from tests.processes import run_command

ROOT = Path(__file__).parents[1]
MINI_FLUX = ROOT / "examples" / "mini_flux"
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven captioned pictures of two shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(COLOURS):
        size = (96, 48) if number % 3 == 0 else (64, 64)
        Image.new("RGB", size, colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} picture")
    return folder


@pytest.fixture
def write_config(tmp_path: Path, pictures: Path) -> Callable[..., Path]:
    return config_writer(tmp_path, pictures)


def config_writer(tmp_path: Path, pictures: Path) -> Callable[..., Path]:
    """Writes a run's TOML; keys given as `section__key` change one key, None leaves it out."""

    def write(directory: Path = pictures, data: Mapping[str, Any] | None = None, **changes: Any) -> Path:
        dataset = {
            "resolutions": [64],
            "enable_ar_bucket": True,
            "directory": [{"path": str(directory)}],
            **(data or {}),
        }
        (tmp_path / "data.toml").write_text(toml.dumps(dataset))
        config: dict[str, Any] = {
            "output_dir": str(tmp_path / "runs"),
            "dataset": str(tmp_path / "data.toml"),
            "max_steps": 6,
            "micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "warmup_steps": 2,
            "lr_scheduler": "cosine",
            "checkpoint_every_n_steps": 3,
            "model": {"type": "flux", "dtype": "float32", "diffusers_path": str(MINI_FLUX), "max_sequence_length": 16},
            "adapter": {"type": "lora", "rank": 4, "dropout": 0.2},
            "optimizer": {"type": "adamw", "lr": 1e-2},
        }
        for name, value in changes.items():
            table, _, key = name.rpartition("__")
            place = config.setdefault(table, {}) if table else config
            place[key] = value
            if value is None:
                del place[key]
        (tmp_path / "run.toml").write_text(toml.dumps(config))
        return tmp_path / "run.toml"

    return write


def launch(config: Path, *words: str, processes: int = 1, stop_after: str | None = None) -> tuple[list[int], str]:
    log = config.parent / "log.txt"
    log.unlink(missing_ok=True)
    codes = run_command(["--config", str(config), *words], processes, log, stop_after)
    return codes, log.read_text()


def only_run(config: Path) -> Path:
    (run,) = [p for p in (config.parent / "runs").iterdir() if re.match(r"\d{8}_", p.name)]
    return run


def metrics(run: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["value"] for line in lines if line["name"] == name}


def newest_export(run: Path) -> dict[str, torch.Tensor]:
    (export,) = [p for p in run.iterdir() if re.match(r"(step|epoch)\d+$", p.name)]
    return load_file(export / "adapter_model.safetensors")


def rewind(run: Path) -> None:
    """Makes a run of six steps look as if it had been stopped after its checkpoint at step 3."""
    for leftover in (run / "global_step6", *run.glob("epoch*"), *run.glob("step*")):
        shutil.rmtree(leftover)
    (run / "latest").write_text("global_step3")


def test_a_run_leaves_what_is_promised(write_config: Callable[..., Path]) -> None:
    evaluation = write_config()
    shutil.copy(evaluation.parent / "data.toml", evaluation.parent / "eval.toml")
    config = write_config(
        eval_datasets=[{"name": "seen", "config": str(evaluation.parent / "eval.toml")}],
        eval_every_n_epochs=1,
        pipeline_stages=2,
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
    for name in ("train/loss", "train/grad_norm", "train/lr", "train/step_time_sec", "train/samples_per_sec"):
        assert sorted(metrics(run, name)) == [1, 2, 3, 4, 5, 6]
    assert sorted(metrics(run, "train/epoch_loss")) == [2, 4, 6]
    assert sorted(metrics(run, "seen/loss")) == [0, 2, 4, 6]
    quantiles = [metrics(run, f"seen/loss_quantile_{q / 10:.2f}")[6] for q in range(1, 10)]
    assert metrics(run, "seen/loss")[6] == pytest.approx(sum(quantiles) / 9)
    with Image.open(run / "samples" / "step000006" / "00_a_red_picture.png") as picture:
        assert picture.size == (64, 64)
    assert (run / "epoch3" / "adapter_model_comfyui.safetensors").is_file()
    assert re.search(r"cache vae: wanted=7 reused=0 encoded=7 failed=0", log)


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


def test_evaluation_is_the_same_on_more_data_ranks(
    write_config: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    """Also of a set that has nothing for one of them."""
    (tmp_path / "one").mkdir()
    for file in pictures.glob("1.*"):
        shutil.copy(file, tmp_path / "one")
    sets = {"seen": pictures, "one": tmp_path / "one"}
    for name, folder in sets.items():
        data = {"resolutions": [64], "enable_ar_bucket": True, "directory": [{"path": str(folder)}]}
        (tmp_path / f"{name}.toml").write_text(toml.dumps(data))
    entries = [{"name": name, "config": str(tmp_path / f"{name}.toml")} for name in sets]
    config = write_config(max_steps=1, eval_datasets=entries)
    results = []
    for processes in (1, 2):
        codes, log = launch(config, processes=processes)
        assert set(codes) == {0}, log
        results.append([metrics(only_run(config), f"{name}/loss")[0] for name in sets])
        shutil.rmtree(only_run(config))
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_adding_one_picture_encodes_one(write_config: Callable[..., Path], pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "own")
    config = write_config(folder)
    codes, log = launch(config, "--cache_only", processes=2)
    assert codes == [0, 0], log
    Image.new("RGB", (64, 64), "orange").save(folder / "new.png")
    (folder / "new.txt").write_text("an orange picture")
    codes, log = launch(config, "--cache-only")
    assert codes == [0]
    assert "cache vae: wanted=8 reused=7 encoded=1 failed=0" in log
    assert "cache t5: wanted=8 reused=7 encoded=1 failed=0" in log
    assert not (tmp_path / "runs").joinpath("latest").exists()


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
    config = write_config(adapter__dropout=0.0, pipeline_stages=2)
    assert launch(config, processes=2)[0] == [0, 0]
    run = only_run(config)
    weights = newest_export(run)
    rewind(run)
    config = write_config(adapter__dropout=0.0)
    codes, log = launch(config, "--resume_from_checkpoint", str(run))
    assert codes == [0], log
    again = newest_export(run)
    assert all(torch.allclose(again[name], weights[name], atol=1e-4) for name in weights)


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


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"adapter__alpha": 8.0}, r"\[adapter\] alpha = 8.0 \(checkpoint: not set\)"),
        ({"seed": 5}, r"seed = 5 \(checkpoint: 0\)"),
        ({"optimizer__lr": 1e-3}, "pass --reset_optimizer_params"),
    ],
)
def test_resuming_as_another_run_is_refused(
    stopped: tuple[Path, dict[str, Any]], write_config: Callable[..., Path], changes: dict[str, Any], told: str
) -> None:
    run, keys = stopped
    codes, log = launch(write_config(**keys, **changes), "--resume_from_checkpoint", str(run))
    assert codes == [1]
    assert re.search(told, log), log


@pytest.fixture(scope="module")
def stopped(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with a checkpoint, and the keys that it was made with."""
    folder = tmp_path_factory.mktemp("stopped")
    keys: dict[str, Any] = {"max_steps": 1, "checkpoint_every_n_steps": 1}
    config = config_writer(folder, pictures)(**keys)
    assert launch(config)[0] == [0]
    return only_run(config), keys


def test_check_without_a_launcher_plans_one_pipeline(write_config: Callable[..., Path]) -> None:
    codes, log = launch(write_config(pipeline_stages=3), "--check")
    assert codes == [0], log
    assert "3 = 3 stages x 1 data ranks" in log
    assert log.count("stage ") >= 3


MISTAKES: dict[str, tuple[dict[str, Any], list[str], int, str]] = {
    "unknown key": ({"optimizer__learning_rate": 1e-4}, [], 1, r"\[optimizer\].*learning_rate.*\blr\b"),
    "wrong type": ({"epochs": "ten"}, [], 1, r"epochs.*ten"),
    "missing path": ({"dataset": "/nowhere/data.toml"}, [], 1, r"dataset.*/nowhere/data.toml"),
    "stages": ({"pipeline_stages": 2}, [], 1, r"pipeline_stages.*2"),
    "stages of two": ({"pipeline_stages": 3}, [], 2, r"pipeline_stages.*3"),
    "split": (
        {"pipeline_stages": 2, "partition_method": "manual", "partition_split": [1, 2]},
        [],
        2,
        r"partition_split.*\[1, 2\]",
    ),
    "split beyond the layers": (
        {"pipeline_stages": 2, "partition_method": "manual", "partition_split": [50]},
        [],
        2,
        r"partition_split.*8 layers",
    ),
    "no checkpoint": ({}, ["--resume_from_checkpoint"], 2, r"no run with a checkpoint"),
    "no such checkpoint": ({}, ["--resume_from_checkpoint", "/nowhere"], 1, r"no such folder '/nowhere'"),
    "not a lora": (
        {"adapter__init_from_existing": str(MINI_FLUX / "vae" / "diffusion_pytorch_model.safetensors")},
        [],
        2,
        r"no LoRA factors.*",
    ),
    "unknown model": ({"model__type": "fluks"}, [], 1, r"fluks.*flux"),
    "nothing to adapt": ({"adapter__include": ["nothing"]}, [], 1, r"\[adapter\].*nothing to adapt"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("check", [False, True], ids=["run", "check"])
def test_a_mistake_is_told_in_one_screen(write_config: Callable[..., Path], mistake: str, check: bool) -> None:
    changes, words, processes, expected = MISTAKES[mistake]
    if check and (words or mistake == "stages"):
        pytest.skip("--check opens no checkpoints, and plans for as many processes as there are stages")
    codes, log = launch(write_config(**changes), *words, *(["--check"] if check else []), processes=processes)
    # With --check the other ranks leave at once: the main rank alone looks.
    assert (codes[:1] if check else list(set(codes))) == [1], log
    assert re.search(expected, log, re.DOTALL), log
    assert "Traceback" not in log
    told = log[log.index("error:") :]
    assert len(told.splitlines()) < 30


def test_mistakes_in_the_data_are_told_together(
    write_config: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pictures, tmp_path / "own")
    (folder / "0.txt").unlink()
    (folder / "1.png").write_bytes(b"no picture")
    empty = tmp_path / "empty"
    empty.mkdir()
    config = write_config(data={"directory": [{"path": str(folder)}, {"path": str(empty)}]})
    codes, log = launch(config, processes=2)
    assert codes == [1, 1]
    assert "Traceback" not in log
    for part in ("0.txt", "1.png", str(empty)):
        assert part in log


def test_the_dataset_is_shown_as_the_trainer_sees_it(
    write_config: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    """What is shown is the stock VAE's own round trip of each picture."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in pictures.glob("*.png"):
        Image.new("L", (64, 64), 128).save(masks / path.name)
    data = {"directory": [{"path": str(pictures), "mask_path": str(masks), "unmasked_weight": 0.5}]}
    config = write_config(data=data | {"trigger_word": "zzz"}, model__latents="mode")
    codes, log = launch(config, "--dump_dataset", str(tmp_path / "shown"))
    assert codes == [0], log
    page = (tmp_path / "shown" / "index.html").read_text()
    assert all(f"zzz, a {colour} picture" in page for colour in COLOURS)
    files = re.findall(r'<img src="([^"]+)"', page)
    assert len(files) == 3 * len(COLOURS) and all((tmp_path / "shown" / file).is_file() for file in files)
    vae = AutoencoderKL.from_pretrained(MINI_FLUX / "vae")
    for name in ("train/000001", "train/000002"):
        source, decoded = (Image.open(tmp_path / "shown" / f"{name}{what}.png") for what in ("_source", ""))
        pixels_BCHW = torch.from_numpy(np.array(source)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            expected = vae.decode(vae.encode(pixels_BCHW).latent_dist.mode()).sample[0].clamp(-1, 1)
        shown = torch.from_numpy(np.array(decoded)).permute(2, 0, 1) / 127.5 - 1
        assert (shown - expected).abs().max() < 1.5 / 127.5


def test_captions_may_be_encoded_as_they_are_needed(write_config: Callable[..., Path]) -> None:
    """With nothing drawn of them, training is what it is with cached ones."""
    losses = []
    for cached in (True, False):
        config = write_config(cache_text_embeddings=cached, pipeline_stages=2, max_steps=3)
        codes, log = launch(config, processes=2)
        assert codes == [0, 0], log
        assert ("cache t5: wanted=7" in log) is cached
        losses.append(metrics(only_run(config), "train/loss"))
        shutil.rmtree(config.parent / "runs")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_micro_batches_of_several_sizes_share_a_step(write_config: Callable[..., Path]) -> None:
    """The loss of a step that takes the whole set is the mean over its samples, however they are batched."""
    losses = []
    for sizes, accumulation in (([[64, 1]], 7), ([[64, 4], [68, 3]], 2)):
        config = write_config(
            data={"resolutions": [64], "enable_ar_bucket": True},
            micro_batch_size_per_gpu=sizes,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            adapter__dropout=0.0,
        )
        codes, log = launch(config)
        assert codes == [0], log
        losses.append(metrics(only_run(config), "train/loss")[1])
        shutil.rmtree(config.parent / "runs")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_broken_files_are_left_out(write_config: Callable[..., Path], pictures: Path, tmp_path: Path) -> None:
    """One is seen to be broken by its header, one only when it is decoded."""
    folder = shutil.copytree(pictures, tmp_path / "own")
    Image.effect_noise((256, 256), 90).save(folder / "2.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:20_000])
    (folder / "3.png").write_bytes(b"no picture")
    codes, log = launch(write_config(folder), processes=2)
    assert codes == [1, 1] and "max_failed_fraction" in log
    codes, log = launch(write_config(folder, max_failed_fraction=0.5, pipeline_stages=2), processes=2)
    assert codes == [0, 0], log
    assert "cache vae: wanted=6 reused=0 encoded=5 failed=1" in log
    with (tmp_path / "runs" / "cache" / "failed.csv").open() as file:
        assert [Path(row["file"]).name for row in csv.DictReader(file)] == ["3.png", "2.png"]
    codes, log = launch(write_config(folder, max_failed_fraction=0.5), "--check")
    assert codes == [0] and "3.png" in log


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
    rewind(run)
    subprocess.run([*command, "--resume_from_checkpoint"], cwd=ROOT, check=True)
    assert metrics(run, "train/loss") == losses
    again = newest_export(run)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
