"""What `--check` tells against what is there when it is counted."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import optimizers
from models.assembly.memory import held_bytes
from models.assembly.preflight import check_run, describe
from models.assembly.stage import load_stage, partition
from optimizers.parameter_groups import groups_of
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from utils.adapters.lora import LoraSettings
from utils.dataset.collection import Collection, Source
from utils.dataset.samples import Bucket, MediaFile, Sample, Take
from utils.dataset.sources import Locator
from utils.errors import UserError
from utils.ranks import Ranks
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
    assert held_bytes(staged.layers, settings.optimizer) == (weights, expected)
    averages = 4 * sum(parameter.numel() for parameter in parameters.values())
    assert held_bytes(staged.layers, settings.optimizer, averages=True) == (weights, expected + averages)


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
    ("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float8", 1), ("int8", 1), ("nf4", 0.5625)]
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


def test_swapped_blocks_count_as_their_buffers(folder: Path) -> None:
    enlarge(folder)
    flux = tiny_flux.pipeline(folder, dtype="bfloat16")
    settings = settings_of(flux, LoraSettings(type="lora", rank=1), blocks_to_swap=57)
    staged = partition(flux, settings, flux.weights.build_empty())
    before = held_bytes(staged.layers, settings.optimizer)[0] / 2**30
    text = describe(settings, Ranks(), flux, staged, [collection(5)])
    after = float(re.search(r"weights ([\d.]+)", text)[1])
    shared, host = map(float, re.search(r"57 swapped blocks share ([\d.]+) .* take ([\d.]+) GiB of", text).groups())
    # A double block has 339.8 million parameters.
    assert shared == pytest.approx(2 * 339.8e6 * 2 / 2**30, abs=0.01)
    assert after == pytest.approx(before - host + shared, abs=0.05) and host > 20
