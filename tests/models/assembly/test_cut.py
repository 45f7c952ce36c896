"""Cuts by counted operations and by planned memory, against all cuts that there are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from models.assembly.cut import cut_text, operations_of, with_cut
from models.assembly.fitting import fit
from models.assembly.memory import Planner
from models.assembly.plan import memory_text
from tests.models.assembly.test_fitting import AUTO, BLOCKS, card_for, large_folder, planner_of
from utils.dataset.samples import Bucket
from utils.errors import UserError
from utils.settings.schema import Settings

LAYERS = BLOCKS + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_folder(tmp_path_factory.mktemp("flux"))


def all_cuts(settings: Settings) -> Iterator[Settings]:
    """The settings with every cut written out, each stage with as many blocks as it swaps."""
    for split in combinations(range(1, LAYERS), settings.pipeline_stages - 1):
        yield settings.model_copy(
            update={"partition_method": "manual", "partition_split": list(split), "stage_weights": None}
        )


def peaks(planner: Planner, settings: Settings) -> list[int]:
    return [plan.total for plan in planner.plans(settings, planner.swapped(settings))]


def largest(taken: list[Any], weights: list[float]) -> float:
    return max(amount / weight for amount, weight in zip(taken, weights, strict=True))


def test_time_balances_operations(folder: Path) -> None:
    planner = planner_of(
        folder,
        pipeline_stages=2,
        partition_method="time",
        activation_checkpointing=True,
        activation_checkpointing_every_n_blocks=2,
    )
    for weights in ([1.0, 1.0], [2.0, 1.0], [1.0, 1.0, 1.0]):
        asked = planner.settings.model_copy(update={"pipeline_stages": len(weights), "stage_weights": weights})
        cut = with_cut(planner, asked)
        assert (cut.partition_method, cut.stage_weights) == ("manual", None)
        best = min(largest(operations_of(planner, other), weights) for other in all_cuts(asked))
        assert largest(operations_of(planner, cut), weights) == best
        # A double block of Flux has 2.4 times a single one's parameters, and does not take that much more time.
        assert largest(operations_of(planner, asked), weights) > 1.1 * best


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("weights", "swapped"), [([1.0, 1.0], 0), ([1.0, 3.0], 0), ([1.0, 1.0, 1.0], 0), ([1.0, 1.0], [4, 3])]
)
def test_memory_balances_peaks(folder: Path, accumulation: int, weights: list[float], swapped: Any) -> None:
    planner = planner_of(
        folder,
        pipeline_stages=len(weights),
        partition_method="memory",
        stage_weights=weights,
        gradient_accumulation_steps=accumulation,
        blocks_to_swap=swapped,
    )
    found = []
    for other in all_cuts(planner.settings):
        try:
            found.append(largest(peaks(planner, other), weights))
        except ValueError:
            assert swapped, "some stage has fewer blocks than it is to swap"
    assert largest(peaks(planner, with_cut(planner, planner.settings)), weights) == min(found)


def test_a_first_stage_holds_more_micro_batches_and_gets_fewer_layers(folder: Path) -> None:
    ends = []
    for accumulation in (1, 4):
        planner = planner_of(
            folder, pipeline_stages=3, partition_method="memory", gradient_accumulation_steps=accumulation
        )
        ends.append(planner.bounds(with_cut(planner, planner.settings)))
    (alone, accumulating) = ends
    assert accumulating[0][1] < alone[0][1] and accumulating[2][0] < alone[2][0]


INTERLEAVED = {"pipeline_stages": 2, "schedule": "interleaved", "gradient_accumulation_steps": 4}


def test_pieces_of_stages_are_balanced(folder: Path) -> None:
    """The slowest piece decides, since stages wait for pieces."""
    planner = planner_of(folder, partition_method="time", **INTERLEAVED)
    cut = with_cut(planner, planner.settings)
    assert len(cut.partition_split) == 3 and len(planner.bounds(cut)) == 4
    found = []
    for split in combinations(range(1, LAYERS), 3):
        other = cut.model_copy(update={"partition_split": list(split)})
        costs = [
            sum(one.of_step(recomputed=False) for one in planner.operations[slice(*piece)])
            for piece in planner.bounds(other)
        ]
        found.append(max(costs))
        if split == tuple(cut.partition_split):
            chosen, of_stages = max(costs), [costs[0] + costs[2], costs[1] + costs[3]]
    assert chosen == min(found)
    assert operations_of(planner, cut) == of_stages
    lines = cut_text(planner, cut).splitlines()
    assert lines[0] == 'cut into 2 stages of 2 pieces each, partition_method = "time":'
    assert [line.split()[1] for line in lines[1:-1]] == ["0", "1", "0", "1"]


def test_pieces_have_their_stage_s_share(folder: Path) -> None:
    planner = planner_of(folder, partition_method="parameters", stage_weights=[3.0, 1.0], **INTERLEAVED)
    sizes = [stop - start for start, stop in planner.bounds(planner.settings)]
    assert sizes[0] > sizes[1] and sizes[2] > sizes[3]
    assert "37.5% wanted" in cut_text(planner, planner.settings)


def test_a_stage_of_pieces_holds_what_all_of_them_do(folder: Path) -> None:
    """And more micro-batches of them, each of a part of the stage, than the stages that wait for whole ones."""
    keys = {"partition_method": "uniform", **INTERLEAVED}
    planner, plain = planner_of(folder, **keys), planner_of(folder, **{**keys, "schedule": "1f1b"})
    plans, others = (one.plans(one.settings, one.swapped(one.settings)) for one in (planner, plain))
    assert [len(plan.pieces) for plan in plans] == [2, 2]
    assert sum(plan.weights for plan in plans) == sum(plan.weights for plan in others)
    assert str(plans[0]).startswith("(layers 0 to ") and " and " in str(plans[0]).split("):")[0]
    assert others[0].activations < plans[0].activations < 2 * others[0].activations


def test_more_pieces_than_layers_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="2 stages of 6 pieces are more than the model has layers, 11"):
        planner_of(folder, **INTERLEAVED, pieces_per_stage=6)


def test_a_cut_is_told_with_what_each_stage_takes(folder: Path) -> None:
    for method, unit in (("time", "TFLOP"), ("memory", "GiB"), ("uniform", "parameters")):
        planner = planner_of(folder, pipeline_stages=2, partition_method=method, stage_weights=[2.0, 1.0])
        cut = with_cut(planner, planner.settings)
        told = cut_text(planner, cut)
        assert told.splitlines()[0] == f'cut into 2 stages, partition_method = "{method}":'
        shares = re.findall(rf"stage \d \(layers (\d+) to (\d+)\): [\d.,]+ {unit}.*, ([\d.]+)%, ([\d.]+)% wanted", told)
        assert [(int(first), int(last) + 1) for first, last, *_ in shares] == planner.bounds(cut)
        assert sum(float(share) for *_, share, _ in shares) == pytest.approx(100, abs=0.11)
        assert [wanted for *_, wanted in shares] == ["66.7", "33.3"]
    assert told in memory_text(planner, None)
    assert cut_text(planner_of(folder), planner.settings.model_copy(update={"pipeline_stages": 1})) == ""


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"gradient_accumulation_steps": 1}, "50% of a step of 1 micro-batch, if they are alike"),
        (
            {"gradient_accumulation_steps": 2},
            '33% of a step of 2 micro-batches, if they are alike; with schedule = "interleaved" 20%',
        ),
        (INTERLEAVED, "11% of a step of 4 micro-batches, if they are alike"),
        # The model has no layers for twelve pieces.
        (
            {"pipeline_stages": 6, "gradient_accumulation_steps": 6},
            "45% of a step of 6 micro-batches, if they are alike",
        ),
    ],
)
def test_how_long_stages_wait_is_told(folder: Path, keys: dict[str, Any], words: str) -> None:
    planner = planner_of(folder, **{"pipeline_stages": 2, **keys})
    assert cut_text(planner, planner.settings).splitlines()[-1] == f"  stages wait for one another for {words}"


def test_operations_are_those_of_the_size_that_takes_most_time(folder: Path) -> None:
    planner = planner_of(folder, pipeline_stages=2, partition_method="time")
    assert planner.frequent == planner.bucket == Bucket(1024, 1024, 1)
    often = planner_of(folder, buckets={Bucket(1024, 1024, 1): 1, Bucket(512, 512, 1): 5}, pipeline_stages=2)
    assert often.frequent == Bucket(512, 512, 1) and often.bucket == Bucket(1024, 1024, 1)
    assert sum(one.forward for one in often.operations) < 0.5 * sum(one.forward for one in planner.operations)
    assert "TFLOP per micro-batch of 1024x1024x1" in cut_text(planner, with_cut(planner, planner.settings))


def test_a_teacher_runs_forward_once_more(folder: Path) -> None:
    alone, taught = (
        planner_of(folder, pipeline_stages=2, partition_method="time", regularisation_target=target)
        for target in ("data", "parent")
    )
    forward = sum(one.forward for one in alone.operations)
    assert sum(operations_of(taught, taught.settings)) == sum(operations_of(alone, alone.settings)) + forward


def test_what_is_chosen_by_memory_has_a_cut_of_its_own(folder: Path) -> None:
    planner = planner_of(folder, pipeline_stages=2, partition_method="memory", **AUTO)
    offloaded = with_cut(planner, planner.settings.model_copy(update={"activation_checkpointing": "offload"}))
    chosen = fit(planner, card_for(max(peaks(planner, offloaded.model_copy(update={"blocks_to_swap": [3, 3]})))))
    assert (chosen.activation_checkpointing, chosen.partition_method) == ("offload", "manual")
    assert chosen.partition_split == offloaded.partition_split and any(chosen.blocks_to_swap)
    assert planner.swapped(chosen) == chosen.blocks_to_swap
    plain = fit(planner, float("inf"))
    assert plain.activation_checkpointing is False
    assert plain.partition_split == with_cut(planner, planner.settings).partition_split


@pytest.mark.parametrize("method", ["time", "memory"])
def test_a_cut_leaves_each_stage_the_blocks_that_it_is_to_swap(folder: Path, method: str) -> None:
    keys = {"pipeline_stages": 3, "partition_method": method}
    planner = planner_of(folder, blocks_to_swap=[7, 1, 1], **keys)
    cut = with_cut(planner, planner.settings)
    assert planner.swapped(cut) == [7, 1, 1]
    for numbers in ([8, 1, 1], [0, 0, BLOCKS]):
        with pytest.raises(UserError, match=r"key `blocks_to_swap`: no cut of the model's 9 blocks"):
            planner_of(folder, blocks_to_swap=numbers, **keys)


@pytest.mark.parametrize("method", ["time", "parameters"])
def test_pieces_have_the_blocks_that_their_stage_swaps(folder: Path, method: str) -> None:
    planner = planner_of(folder, partition_method=method, blocks_to_swap=[4, 3], **INTERLEAVED)
    assert planner.swapped(with_cut(planner, planner.settings)) == [4, 3]
    with pytest.raises(UserError, match=r"key `blocks_to_swap`"):
        planner_of(folder, partition_method=method, blocks_to_swap=[4, 7], **INTERLEAVED)
