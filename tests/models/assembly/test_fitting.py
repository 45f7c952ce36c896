"""What is chosen by a GPU's memory, for some blocks of the size of Flux.1 on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.assembly.fitting import Attempt, fit
from models.assembly.memory import GIB, Planner
from models.assembly.placement import stepped_at_home
from models.assembly.room import MARGIN, SHARE, memory_of
from models.assembly.stage import partition
from optimizers.adamw import AdamW8bitSettings
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from utils.adapters.lora import LoraSettings
from utils.dataset.samples import Bucket
from utils.errors import UserError
from utils.ranks import Ranks
from utils.settings.schema import Settings

LARGE = {"num_layers": 3, "num_single_layers": 6, "num_attention_heads": 24, "attention_head_dim": 128}
BLOCKS = 9
AUTO = {"activation_checkpointing": "auto", "blocks_to_swap": "auto"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_folder(tmp_path_factory.mktemp("flux"))


def large_folder(place: Path) -> Path:
    """Of a Flux with blocks of full size."""
    folder = tiny_flux.write_folder(place)
    file = folder / "transformer" / "config.json"
    config = {**json.loads(file.read_text()), **LARGE, "axes_dims_rope": [16, 56, 56]}
    file.write_text(json.dumps(config))
    return folder


def planner_of(folder: Path, adapter: Any = None, buckets: Any = None, data_ranks: int = 1, **keys: Any) -> Planner:
    flux = tiny_flux.pipeline(folder, dtype="bfloat16")
    settings = settings_of(flux, LoraSettings(type="lora", rank=16) if adapter is None else adapter or None, **keys)
    shapes = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in tiny_flux.features((512, 512)).items()}
    encoder = SimpleNamespace(feature_shapes=lambda bucket: shapes)
    staged = partition(flux, settings, flux.weights.build_empty())
    buckets = buckets or {Bucket(1024, 1024, 1): 1, Bucket(512, 512, 1): 1}
    return Planner(settings, flux, staged, [encoder], buckets, data_ranks)


def total(planner: Planner, **keys: Any) -> int:
    settings = planner.settings.model_copy(update=keys)
    return Attempt(settings, planner.plans(settings, planner.swapped(settings))).total


def card_for(planned: float) -> float:
    """The memory of a GPU on which this much just fits."""
    return (planned + MARGIN * GIB) / (1 - SHARE) + 1


def chosen(settings: Settings) -> tuple[Any, Any]:
    return settings.activation_checkpointing, settings.blocks_to_swap


def test_the_fastest_that_fits_is_chosen(folder: Path) -> None:
    planner = planner_of(folder, **AUTO)
    plain = total(planner, activation_checkpointing=False, blocks_to_swap=0)
    recomputed = total(planner, activation_checkpointing=True, blocks_to_swap=0)
    offloaded = total(planner, activation_checkpointing="offload", blocks_to_swap=0)
    assert plain > 1.5 * recomputed > 1.5 * offloaded
    assert chosen(fit(planner, float("inf"))) == (False, 0)
    assert chosen(fit(planner, card_for(plain))) == (False, 0)
    assert chosen(fit(planner, card_for(plain - 1))) == (True, 0)
    assert chosen(fit(planner, card_for(recomputed))) == (True, 0)
    assert chosen(fit(planner, card_for(recomputed - 1))) == ("offload", 0)
    for count in (4, 6, BLOCKS):
        swapped = total(planner, activation_checkpointing="offload", blocks_to_swap=count)
        assert chosen(fit(planner, card_for(swapped))) == ("offload", count)


def test_what_is_set_stays_as_it_is(folder: Path) -> None:
    recomputing = planner_of(folder, activation_checkpointing=True, blocks_to_swap="auto")
    least = total(recomputing, blocks_to_swap=BLOCKS)
    assert chosen(fit(recomputing, card_for(least))) == (True, BLOCKS)
    swapping = planner_of(folder, activation_checkpointing="auto", blocks_to_swap=5)
    assert chosen(fit(swapping, card_for(total(swapping, activation_checkpointing=True)))) == (True, 5)
    nothing_open = planner_of(folder, activation_checkpointing=False, blocks_to_swap=3)
    assert fit(nothing_open, 1.0) is nothing_open.settings


def test_each_stage_gets_its_own_number(folder: Path) -> None:
    planner = planner_of(folder, pipeline_stages=2, **AUTO)
    least = planner.plans(planner.settings.model_copy(update={"activation_checkpointing": "offload"}), [4, 5])
    way, numbers = chosen(fit(planner, card_for(max(plan.total for plan in least))))
    assert way == "offload" and len(numbers) == 2 and numbers != [0, 0]


def test_what_fits_nowhere_is_told_with_what_was_tried(folder: Path) -> None:
    planner = planner_of(folder, memory_budget_gb=2.0, **AUTO)
    with pytest.raises(UserError) as caught:
        fit(planner, memory_of(planner.settings, Ranks()))
    told = str(caught.value)
    least = total(planner, activation_checkpointing="offload", blocks_to_swap=BLOCKS)
    short = (least - (2.0 * GIB * (1 - SHARE) - MARGIN * GIB)) / GIB
    assert "memory_budget_gb" in told and f"falls short by {short:.2f} GiB" in told
    for line in ("activation_checkpointing = false, blocks_to_swap = 0:", f"'offload', blocks_to_swap = {BLOCKS}:"):
        assert line in told


def test_a_full_fine_tune_swaps_what_is_trained(folder: Path) -> None:
    planner = planner_of(folder, adapter=False, **AUTO)
    plain = total(planner, activation_checkpointing="offload", blocks_to_swap=0)
    swapped = total(planner, activation_checkpointing="offload", blocks_to_swap=BLOCKS)
    assert swapped < 0.6 * plain
    assert chosen(fit(planner, card_for(swapped))) == ("offload", BLOCKS)


@pytest.mark.parametrize("adapter", [None, False])
def test_divided_weights_leave_room_for_what_else_would_wait_in_the_machines_memory(
    folder: Path, adapter: bool | None
) -> None:
    """Where that is not enough, pieces wait there."""
    keys = {"activation_checkpointing": True, "blocks_to_swap": "auto", "adapter": adapter}
    whole, divided = planner_of(folder, **keys), planner_of(folder, **keys, zero_stage=3, data_ranks=8)
    alone = planner_of(folder, **keys, zero_stage=3)
    plain, none, every = total(whole, blocks_to_swap=0), *(total(divided, blocks_to_swap=n) for n in (0, BLOCKS))
    assert every < none < plain == total(alone, blocks_to_swap=0)
    assert chosen(fit(whole, card_for(none)))[1] > 0
    assert chosen(fit(divided, card_for(none)))[1] == 0
    assert 0 < chosen(fit(divided, card_for((none + every) / 2)))[1] < BLOCKS


def test_an_optimizer_for_gpus_alone_swaps_nothing(folder: Path) -> None:
    planner = planner_of(folder, adapter=False, **AUTO)
    optimizer = AdamW8bitSettings(type="adamw8bit", lr=1e-4)
    planner.settings = planner.settings.model_copy(update={"optimizer": optimizer})
    with pytest.raises(UserError, match="nothing fits") as caught:
        fit(planner, 2.0 * GIB)
    assert f"blocks_to_swap = {BLOCKS}" not in str(caught.value)
    assert 'No block is swapped: the processor would step it, and "adamw8bit" runs on GPUs only' in str(caught.value)


def test_without_a_gpu_and_a_budget_there_is_no_limit(folder: Path) -> None:
    planner = planner_of(folder, **AUTO)
    if not torch.cuda.is_available():
        assert memory_of(planner.settings, Ranks()) is None
    budget = planner.settings.model_copy(update={"memory_budget_gb": 24})
    assert memory_of(budget, Ranks()) == 24 * GIB


def test_what_stays_of_a_full_fine_tune_may_be_stepped_by_the_processor_too(folder: Path) -> None:
    """The state of the optimizer leaves the device then, with copies of what stays there; that of swapped blocks is at
    home in the machine's memory either way."""
    plain, offloading = (planner_of(folder, adapter=False, offload_optimizer=on, **AUTO) for on in (False, True))
    for number in (0, 4):
        (before,), (after,) = (planner.plans(planner.settings, [number]) for planner in (plain, offloading))
        at_home = sum(tensor.numel() for block in after.swap.trained.values() for tensor in block)
        staying = sum(p.numel() for part in offloading._trained for p in part.values()) - at_home
        # AdamW keeps two moments and a master of 16 bits' weights, all of four bytes.
        assert before.state - after.state == staying * 12 and before.weights == after.weights
        assert after.host == before.host and before.stepped == 0
        assert after.stepped == staying * (12 + 2 + 2)
    less = total(offloading, activation_checkpointing="offload", blocks_to_swap=BLOCKS)
    assert less < total(plain, activation_checkpointing="offload", blocks_to_swap=BLOCKS)
    assert chosen(fit(offloading, card_for(less))) == ("offload", BLOCKS)


def test_the_largest_micro_batch_counts_and_not_the_largest_sample(folder: Path) -> None:
    """Small samples may be trained and evaluated in larger micro-batches."""
    small, large = Bucket(512, 512, 1), Bucket(1024, 1024, 1)
    alike, more = (planner_of(folder, micro_batch_size_per_gpu=size) for size in (1, [[512, 16], [1024, 1]]))
    assert (alike.bucket, more.bucket) == (large, small) and "512x512x1, 16 samples at once" in more.text(more.settings)
    assert "at once" not in alike.text(alike.settings)
    assert total(more) > 1.5 * total(alike)


def test_a_stage_steps_at_home_what_is_swapped_of_it(folder: Path) -> None:
    flux, keys = tiny_flux.pipeline(folder, dtype="bfloat16"), {"pipeline_stages": 2, "blocks_to_swap": [1, 2]}
    settings = settings_of(flux, offload_optimizer=True, **keys)
    staged = partition(flux, settings, flux.weights.build_empty())
    for stage, count in enumerate(keys["blocks_to_swap"]):
        at_home = set(map(id, stepped_at_home(settings, Ranks(stage, 2, stages=2), staged)))
        layers = staged.stage_layers(stage)
        swapped = [layer for layer in layers if at_home & set(map(id, layer.parameters()))]
        assert len(swapped) == count
        assert at_home == {id(parameter) for layer in swapped for parameter in layer.parameters()}
    adapted = settings_of(flux, LoraSettings(type="lora", rank=2), **keys)
    assert stepped_at_home(adapted, Ranks(0, 2, stages=2), staged) == []
