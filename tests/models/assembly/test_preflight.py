"""What `--check` tells against what is there when it is counted."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import optimizers
from models.assembly.data import encoders_of
from models.assembly.kept import Kept, weight_bytes
from models.assembly.memory import Planner
from models.assembly.placement import block_swap, homes_of
from models.assembly.plan import epochs_of
from models.assembly.preflight import check_run, describe
from models.assembly.stage import load_stage, partition
from models.base import BasePipeline
from optimizers.adamw import AdamW8bitSettings
from optimizers.parameter_groups import groups_of
from tests.models import tiny_flux, tiny_sdxl_texts
from tests.models.tiny_folder import settings_of
from utils.adapters.attach import is_within
from utils.adapters.lora import LoraSettings
from utils.dataset.collection import Collection, Source
from utils.dataset.samples import Bucket, MediaFile, Sample, Take
from utils.dataset.sources import Locator
from utils.errors import UserError
from utils.parallel import attention
from utils.parallel.sharding import Shares
from utils.ranks import Ranks
from utils.run.progress import Progress
from utils.run.trainer import last_step_of
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings
from utils.settings.run_tables import EMASettings
from utils.settings.schema import AdapterSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_flux.write_folder(tmp_path)


def collection(count: int) -> Collection:
    bucket = Bucket(64, 64, 1)
    media = MediaFile(Locator("picture.png"), "0" * 32, 64, 64, 1)
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
    assert weight_bytes(staged.layers) == weights
    assert Kept(settings.optimizer).bytes_of(parameters) == (expected, 0)
    averages = 4 * sum(parameter.numel() for parameter in parameters.values())
    assert Kept(settings.optimizer, averages=True).bytes_of(parameters) == (expected + averages, 0)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_what_data_ranks_divide_is_counted_of_the_rank_that_has_most(
    folder: Path, zero_stage: int, offload: bool
) -> None:
    flux = tiny_flux.pipeline(folder, dtype="bfloat16")
    keys = {"gradient_accumulation_steps": 2, "ema": EMASettings()}
    settings = settings_of(flux, zero_stage=zero_stage, offload_optimizer=offload, **keys)
    staged = partition(flux, settings, flux.weights.build_empty())
    trained = staged.trained(staged.layers)
    found = []
    for data_rank in range(3):
        own = Shares(trained, Ranks(data_rank, 3), zero_stage).stepped.values()
        elements = sum(parameter.numel() for parameter in own)
        # Two moments and a master, beside copies of the weight and of its gradient if they are in the host's memory.
        state = elements * 12
        # All that the model has is sent at once, since that is little, as a copy.
        gradients = 2 * 4 * sum(parameter.numel() for parameter in trained.values())
        if zero_stage > 1:
            gradients += 4 * elements
        averages = 4 * elements
        found.append((gradients + averages + (0 if offload else state), state + elements * 6 if offload else 0))
    assert Kept.of(settings, 3).bytes_of(trained) == (max(d for d, _ in found), max(h for _, h in found))
    text = describe(settings, Ranks(0, 3), flux, staged, [collection(5)])
    assert ("the optimizer takes 0.00 GiB of the host's memory" in text) == offload
    assert ("adamw in the machine's memory, lr" in text) == offload
    weights = "optimizer state, gradients and trained weights of the blocks"
    divided = {1: "optimizer state", 2: "optimizer state and gradients", 3: weights}.get(zero_stage)
    assert (f"zero_stage:   {zero_stage}, {divided} divided among 3 data ranks" in text) == (zero_stage > 0)
    alone = describe(settings, Ranks(), flux, staged, [collection(5)])
    assert (f"zero_stage:   {zero_stage} changes nothing here: there is 1 data rank" in alone) == (zero_stage > 0)


@pytest.mark.parametrize("adapter", [None, LoraSettings(type="lora", rank=4)])
def test_divided_weights_are_counted_as_ranks_keep_them(folder: Path, adapter: LoraSettings | None) -> None:
    """Of the rank that keeps most; the piece of one block waits in the machine's memory."""
    flux = tiny_flux.pipeline(folder, dtype="bfloat16")
    settings = settings_of(flux, adapter, zero_stage=3, blocks_to_swap=1)
    staged = partition(flux, settings, flux.weights.build_empty())
    (plan,) = Planner(settings, flux, staged, encoders_of(flux, [collection(5)]), {Bucket(64, 64, 1): 1.0}, 3).plans(
        settings, [1]
    )
    on_device, on_host, buffers = [], [], set()
    for data_rank in range(3):
        loaded = load_stage(
            flux, settings, 0, partial(homes_of, settings, Ranks(data_rank, 3), trained=adapter is None)
        )
        swap = block_swap(settings, loaded.homes)
        pieces = [(block.home.nbytes, block.on_host) for block in swap._blocks]
        on_device.append(weight_bytes(loaded.layers) + sum(size for size, away in pieces if not away))
        on_host.append(sum(size for size, away in pieces if away))
        buffers.add(2 * max(block.size for block in swap._blocks))
    assert max(on_host) == plan.divided.on_host > 0
    assert {max(on_device) + plan.divided.buffers} == {plan.weights} and buffers == {plan.divided.buffers}
    text = str(plan)
    assert f"of {len(pieces)} divided blocks a rank keeps" in text and "1 of them take" in text
    if adapter is None:
        # Two moments and a master, and a gradient, beside its owner's weights of 16 bits, between which there are gaps.
        assert plan.divided.on_host * (1 + 12 / 2 + 4 / 2) >= plan.host > plan.divided.on_host * (1 + 12 / 2)


def test_an_optimizer_of_the_gpu_does_not_step_in_the_machines_memory(folder: Path) -> None:
    flux = tiny_flux.pipeline(folder)
    settings = settings_of(flux, offload_optimizer=True)
    check_run(settings, Ranks(), flux)
    eight_bit = settings.model_copy(update={"optimizer": AdamW8bitSettings(type="adamw8bit", lr=1e-3)})
    with pytest.raises(UserError, match='offload_optimizer lets the processor .*"adamw8bit" runs on GPUs only'):
        check_run(eight_bit, Ranks(), flux)
    swapping = eight_bit.model_copy(update={"offload_optimizer": False, "blocks_to_swap": 2})
    with pytest.raises(UserError, match='steps of swapped blocks of a full fine-tune: "adamw8bit" runs on GPUs only'):
        check_run(swapping, Ranks(), flux)


def test_what_needs_a_gpu_is_planned_where_there_is_none(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`--check` may look at the file of a run for another machine."""
    flux = tiny_flux.pipeline(folder)
    settings = settings_of(flux, LoraSettings(type="lora", rank=1))
    eight_bit = settings.model_copy(update={"optimizer": AdamW8bitSettings(type="adamw8bit", lr=1e-3)})
    with pytest.raises(UserError, match='"adamw8bit" runs on GPUs only'):
        check_run(eight_bit, Ranks(), flux)
    assert check_run(eight_bit, Ranks(), flux, elsewhere=True).denoiser
    assert '[optimizer] type: "adamw8bit" runs on GPUs only' in caplog.text and "machine with a GPU" in caplog.text
    with pytest.raises(UserError, match="offload_optimizer lets the processor"):
        check_run(eight_bit.model_copy(update={"offload_optimizer": True}), Ranks(), flux, elsewhere=True)
    with pytest.raises(UserError, match="computes in 16 bits alone"):
        check_run(settings.model_copy(update={"attention": "flash"}), Ranks(), flux, elsewhere=True)


def test_what_is_built_for_a_gpu_is_planned_without_it(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no GPU, `--check` says what is not there; where there is one, a run needs it."""
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setattr(Ranks, "device", torch.device("cpu"))
    flux = tiny_flux.pipeline(folder, dtype="bfloat16")
    keys = {"attention": "flash", "compile": True}
    settings = settings_of(flux, LoraSettings(type="lora", rank=1)).model_copy(update=keys)
    assert check_run(settings, Ranks(), flux, elsewhere=True).denoiser
    told = [message for message in caplog.messages if message.endswith("; the plan is for a machine with a GPU")]
    (needs_gpu, needs_library, needs_compiler) = told
    assert needs_gpu.startswith('key `attention`: "flash" needs a GPU, and there is none')
    assert needs_library.startswith('key `attention`: "flash" needs flash_attn, which is not installed: pip install')
    assert needs_compiler.startswith("key `compile`: needs a C++ compiler")
    monkeypatch.setattr(Ranks, "device", torch.device("cuda"))
    with pytest.raises(UserError, match="flash_attn, which is not installed"):
        check_run(settings, Ranks(), flux, elsewhere=True)
    monkeypatch.setenv("CC", "no-compiler")
    with pytest.raises(UserError, match="needs a C compiler"):
        check_run(settings.model_copy(update={"attention": "auto"}), Ranks(), flux, elsewhere=True)


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


def enlarge(folder: Path, double: int = 19, single: int = 38) -> None:
    """Gives a tiny Flux the size of Flux.1, or its width and these numbers of blocks."""
    file = folder / "transformer" / "config.json"
    large = {"num_layers": double, "num_single_layers": single, "num_attention_heads": 24, "attention_head_dim": 128}
    config = {**json.loads(file.read_text()), **large, "axes_dims_rope": [16, 56, 56]}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float32", 4), ("bfloat16", 2), ("float8", 1), ("int8", 1), ("nf4", 0.5625), ("int4", 0.546875)],
)
def test_a_large_model_is_planned_in_its_own_type(folder: Path, dtype: str, size: float) -> None:
    """Of billions of weights, which is told without memory for them."""
    enlarge(folder, double=5, single=9)
    flux = tiny_flux.pipeline(folder, dtype="bfloat16", transformer_dtype=dtype, from_scratch=True)
    settings = settings_of(flux, LoraSettings(type="lora", rank=1), epochs=2, gradient_accumulation_steps=2)
    staged = check_run(settings, Ranks(), flux)
    text = describe(settings, Ranks(), flux, staged, [collection(5)])
    total, trained = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:in all,|trained)", text))
    weights = float(re.search(r"weights ([\d.]+)", text)[1])
    outside = sum(p.numel() for name, p in staged.denoiser.named_parameters() if not is_within(name, flux.blocks))
    # The adapter's own weights are float32; scales of rows are a thousandth.
    expected = (total - trained - outside) * size + outside * max(size, 2) + trained * 4
    assert weights == pytest.approx(expected / 2**30, abs=0.01)
    assert weights > 2.5 * size
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
    pipeline = tiny_flux.pipeline(folder)
    settings = settings_of(pipeline, **keys)
    epochs = epochs_of(settings, Ranks(), pipeline, collection(5).samples)
    assert last_step_of(settings, epochs, begun) == last


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


def test_swapped_blocks_that_are_trained_leave_buffers_of_gradients(folder: Path) -> None:
    enlarge(folder)
    flux = tiny_flux.pipeline(folder, dtype="bfloat16")
    settings = settings_of(flux, blocks_to_swap=57, gradient_accumulation_steps=2)
    staged = partition(flux, settings, flux.weights.build_empty())
    in_blocks = sum(p.numel() for layer in staged.layers[1:-1] for p in layer.parameters())
    others = sum(p.numel() for p in staged.denoiser.parameters()) - in_blocks
    text = describe(settings, Ranks(), flux, staged, [collection(5)])
    weights, state = map(float, re.search(r"weights ([\d.]+) \+ gradients and optimizer ([\d.]+)", text).groups())
    host = float(re.search(r"57 swapped blocks .* take ([\d.]+) GiB of", text)[1])
    largest, gib = 339.8e6, 2**30
    # On the device two buffers for weights of 16 bits and two for float32 gradients of the largest block; what is not
    # swapped has float32 gradients, two moments and a master.
    assert weights == pytest.approx((2 * 2 * largest + 2 * others) / gib, abs=0.01)
    assert state == pytest.approx((2 * 4 * largest + 16 * others) / gib, abs=0.01)
    assert host == pytest.approx(18 * in_blocks / gib, abs=0.05) and host > 180
