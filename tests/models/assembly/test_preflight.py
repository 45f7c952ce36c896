"""What `--check` tells against what is there when it is counted."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import optimizers
from models.assembly.memory import state_bytes, trained_of, weight_bytes
from models.assembly.plan import epochs_of
from models.assembly.preflight import check_run, describe
from models.assembly.stage import load_stage, partition
from models.base import BasePipeline
from optimizers.parameter_groups import groups_of
from tests.models import tiny_flux, tiny_sdxl_texts
from tests.models.tiny_folder import settings_of
from utils.adapters.lora import LoraSettings
from utils.dataset.collection import Collection, Source
from utils.dataset.samples import Bucket, MediaFile, Sample, Take
from utils.dataset.sources import Locator
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.progress import Progress
from utils.run.trainer import last_step_of
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings
from utils.settings.schema import AdapterSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_flux.write_folder(tmp_path)


def collection(count: int) -> Collection:
    bucket = Bucket(64, 64, 1)
    media = MediaFile(Locator(Path("picture.png")), "0" * 32, 64, 64, 1)
    rules = DirectorySettings(path="pictures")
    samples = [
        Sample(str(number), media, bucket, (Take(),), ("a caption",), (), None, 0.0, 1, rules)
        for number in range(count)
    ]
    data = DatasetSettings(resolutions=[64], directory=[rules])
    return Collection(Source("train", Path("dataset.toml"), data), samples, [], [], count)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [None, LoraSettings(type="lora", rank=4)], ids=["full", "lora"])
def test_what_a_stage_holds_is_counted(folder: Path, dtype: str, adapter: AdapterSettings | None) -> None:
    flux = tiny_flux.pipeline(folder, dtype=dtype)
    settings = settings_of(flux, adapter)
    staged = load_stage(flux, settings, stage=0)
    parameters = staged.trained(staged.layers)
    optimizer = optimizers.build(groups_of(parameters.items(), lr=1e-3, weight_decay=0.0), settings.optimizer)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    expected = sum(tensor.nbytes for tensor in [*kept, *(p.grad for p in parameters.values())])
    weights = sum(p.nbytes for p in staged.denoiser.parameters())
    trained = trained_of(staged.layers)
    assert (weight_bytes(staged.layers), state_bytes(trained, settings.optimizer)) == (weights, expected)
    averages = 4 * sum(parameter.numel() for parameter in parameters.values())
    assert state_bytes(trained, settings.optimizer, averages=True) == expected + averages


def test_a_library_that_is_missing_is_told_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flux = tiny_flux.pipeline(folder, transformer_dtype="nf4")
    settings = settings_of(flux, LoraSettings(type="lora", rank=1))
    check_run(settings, Ranks(), flux)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check_run(settings, Ranks(), flux)


def test_what_does_not_train_needs_no_account(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    flux = tiny_flux.pipeline(folder)
    settings = settings_of(flux, monitoring={"enable_wandb": True})
    with pytest.raises(UserError, match="no account"):
        check_run(settings, Ranks(), flux)
    assert check_run(settings, Ranks(), flux, trains=False).denoiser


def enlarge(folder: Path) -> None:
    """Gives a tiny Flux the size of Flux.1."""
    file = folder / "transformer" / "config.json"
    large = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128}
    config = {**json.loads(file.read_text()), **large, "axes_dims_rope": [16, 56, 56]}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float32", 4), ("bfloat16", 2), ("float8", 1), ("int8", 1), ("nf4", 0.5625), ("int4", 0.546875)],
)
def test_a_large_model_is_planned_in_its_own_type(folder: Path, dtype: str, size: float) -> None:
    """Of the size of Flux.1, which is told without memory for it."""
    enlarge(folder)
    flux = tiny_flux.pipeline(folder, dtype="bfloat16", transformer_dtype=dtype, from_scratch=True)
    settings = settings_of(flux, LoraSettings(type="lora", rank=1), epochs=2, gradient_accumulation_steps=2)
    text = describe(settings, Ranks(), flux, check_run(settings, Ranks(), flux), [collection(5)])
    total, trained = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:in all,|trained)", text))
    weights = float(re.search(r"weights ([\d.]+)", text)[1])
    # The adapter's own weights are float32.
    # What does not lie in blocks is a hundredth of the model; scales of rows are a thousandth.
    assert weights == pytest.approx(((total - trained) * size + trained * 4) / 2**30, abs=0.01 if size > 1 else 0.2)
    assert weights > 10 * size
    assert "3 per epoch, 6 in all" in text


def plan_of(pipeline: BasePipeline, adapter: AdapterSettings | None = None, **keys: Any) -> dict[str, str]:
    """The facts of the plan of a run on five pictures, by name."""
    settings = settings_of(pipeline, adapter, **keys)
    text = describe(settings, Ranks(), pipeline, check_run(settings, Ranks(), pipeline), [collection(5)])
    return dict(re.findall(r"(?m)^([a-z ]+): +(.+)$", text))


def test_a_plan_says_what_is_trained(folder: Path, tmp_path: Path) -> None:
    flux = tiny_flux.pipeline(folder)
    adapter = LoraSettings(type="lora", rank=4, include=["attn.to_q"])
    staged = partition(flux, settings_of(flux, adapter), flux.weights.build_empty())
    adapted = len(staged.trained(staged.layers)) // 2
    assert plan_of(flux, adapter)["training"] == f"LoRA of rank 4 on {adapted} modules of transformer"
    assert plan_of(flux)["training"] == "full fine-tune of transformer, since there is no [adapter]"
    assert plan_of(flux)["model"] == f"flux, {folder / 'transformer'}"
    (tmp_path / "sdxl").mkdir()
    sdxl = tiny_sdxl_texts.pipeline(tiny_sdxl_texts.write_folder(tmp_path / "sdxl"))
    plan = plan_of(sdxl)
    assert plan["training"].startswith("full fine-tune of unet, text_encoder, text_encoder_2,")
    assert plan["optimizer"] == "adamw, lr 0.01, 0.005, 0.002 by part, constant"


def test_a_plan_says_when_and_where(folder: Path) -> None:
    flux = tiny_flux.pipeline(folder)
    often = {"save_every_n_epochs": 1, "save_every_n_steps": 50, "checkpoint_every_n_minutes": 7.5}
    plan = plan_of(
        flux,
        LoraSettings(type="lora", rank=1),
        max_steps=40,
        warmup_steps=3,
        lr_scheduler="cosine",
        keep_checkpoints=2,
        save_format="comfyui",
        ema={},
        sampling={"prompts": ["one", "two"], "sample_before_first_step": True, "width": 64, "height": 48},
        eval_datasets=["held_out.toml"],
        eval_every_n_examples=100,
        **often,
    )
    assert plan["steps"] == "5 per epoch, 40 in all"
    assert plan["optimizer"] == "adamw, lr 0.001, cosine, after 3 steps of warm-up"
    assert plan["run folder"] == "runs/<date and time>" and plan["cache"] == "runs/cache"
    assert plan["exports"] == "every 50 steps, every epoch, at the end: the adapter, and its average, for comfyui"
    assert plan["checkpoints"] == "every 7.5 minutes, at the end; the newest 2 are kept"
    assert plan["samples"] == "before the first step, at the end: 2 of 64 x 48"
    assert plan["evaluation"] == "before the first step, every 100 examples, at the end"
    plain = plan_of(flux, max_steps=1, force_constant_lr=0.5)
    assert plain["exports"] == "at the end: the model, for diffusers and comfyui"
    assert plain["checkpoints"] == "only if the run is stopped" and plain["optimizer"] == "adamw, lr 0.5 at every step"
    assert not {"samples", "evaluation", "goes on from"} & set(plain)


@pytest.mark.parametrize(
    ("keys", "begun", "last"),
    [
        ({}, Progress(), 5),
        ({"epochs": 3}, Progress(), 15),
        ({"epochs": 3}, Progress(step=7, epoch=1, step_in_epoch=2), 15),
        # The second epoch begins anew.
        ({"epochs": 3}, Progress(step=7, epoch=1), 17),
        ({"epochs": 3, "max_steps": 12}, Progress(step=7, epoch=1), 12),
        ({"max_steps": 12}, Progress(step=7, epoch=1), 12),
        ({"max_steps": 3}, Progress(step=7, epoch=1), 7),
        ({"epochs": 1}, Progress(step=10, epoch=2), 10),
    ],
)
def test_the_last_step_counts_from_where_a_run_goes_on(
    folder: Path, keys: dict[str, int], begun: Progress, last: int
) -> None:
    settings = settings_of(tiny_flux.pipeline(folder), **keys)
    assert last_step_of(settings, epochs_of(settings, Ranks(), collection(5).samples), begun) == last


def test_swapped_blocks_count_as_their_buffers(folder: Path) -> None:
    enlarge(folder)
    flux = tiny_flux.pipeline(folder, dtype="bfloat16")
    settings = settings_of(flux, LoraSettings(type="lora", rank=1), blocks_to_swap=57)
    staged = partition(flux, settings, flux.weights.build_empty())
    before = weight_bytes(staged.layers) / 2**30
    text = describe(settings, Ranks(), flux, staged, [collection(5)])
    after = float(re.search(r"weights ([\d.]+)", text)[1])
    shared, host = map(float, re.search(r"57 swapped blocks share ([\d.]+) .* take ([\d.]+) GiB of", text).groups())
    # A double block has 339.8 million parameters.
    assert shared == pytest.approx(2 * 339.8e6 * 2 / 2**30, abs=0.01)
    assert after == pytest.approx(before - host + shared, abs=0.05) and host > 20
