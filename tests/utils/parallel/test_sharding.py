"""Data ranks that divide optimizer state, gradients and weights: they train to the bit as those that keep all of it."""

from __future__ import annotations

import weakref
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from models.assembly.placement import block_swap, homes_of, shares_of
from models.assembly.stage import StagedModel
from models.assembly.trainer import restore_or_start
from models.flux import FluxOptions, FluxPipeline
from optimizers import find
from optimizers.parameter_groups import groups_of
from tests.models.tiny_folder import settings_of
from tests.processes import run_ranks
from tests.utils.parallel import toy_flux
from utils.adapters.lora import LoraSettings
from utils.parallel import transfers, travelling
from utils.parallel.sharding import HostCopies, Shares, owners
from utils.parallel.together import numbers_of_all
from utils.parallel.transfers import ALIGNMENT
from utils.parallel.travelling import buckets
from utils.ranks import Ranks
from utils.run.checkpoint import Checkpoint, ResumeFlags
from utils.run.parts import RunParts
from utils.run.progress import Progress
from utils.run.saving import save
from utils.settings.run_tables import EMASettings

CLIP = 0.05
SINGLE_BLOCKS_ONLY = LoraSettings(type="lora", rank=4, include=["single_transformer_blocks.1"])
AVERAGES = EMASettings(decay=0.5, warmup="none")


class Way(NamedTuple):
    """One way to train."""

    zero_stage: int
    dtype: str = "float32"
    accumulation: int = 1
    adapted: bool = False
    offload: bool = False
    optimizer: str = "adamw"
    recompute: bool = False
    swapped: int = 0
    pieces: int = 1

    @property
    def plain(self) -> Way:
        """The same without what is to be shown."""
        return self._replace(zero_stage=0, offload=False, swapped=0)

    @property
    def then(self) -> Way:
        """Another way, in which a run goes on; plain training goes on as it is."""
        if self == self.plain:
            return self
        offload = not self.offload and self.optimizer == "adamw"
        following = {0: 2, 1: 0 if self.adapted else 3, 2: 1, 3: 0}
        return self._replace(zero_stage=following[self.zero_stage], offload=offload, swapped=0)


ALL = ((0, False), (0, True), (1, False), (2, False), (2, True))
OF_EACH = ((0, False), (1, True), (2, False))
BF16, ACCUMULATED = Way(0, "bfloat16"), Way(0, "bfloat16", accumulation=3)
ADAPTED = Way(0, "float32", accumulation=2, adapted=True)
IN_PIECES = Way(0, accumulation=3, pieces=2)
EIGHT_BIT = Way(0, optimizer="adamw8bit")
FROZEN = Way(0, "bfloat16", adapted=True, recompute=True)
LAYOUTS = {
    (1, 2): [
        *(ACCUMULATED._replace(zero_stage=zero, offload=offload) for zero, offload in ALL),
        *(BF16._replace(zero_stage=zero, offload=offload) for zero, offload in OF_EACH),
        *(EIGHT_BIT._replace(zero_stage=zero) for zero in (0, 1, 2)),
        ACCUMULATED._replace(zero_stage=3, swapped=2),
        BF16._replace(zero_stage=3, offload=True),
        BF16._replace(zero_stage=1, offload=True, swapped=2),
        *(FROZEN._replace(zero_stage=zero, swapped=swapped) for zero, swapped in ((0, 0), (3, 0), (3, 2))),
        *(Way(zero, adapted=True) for zero in (0, 3)),
    ],
    (2, 2): [
        *(ADAPTED._replace(zero_stage=zero, offload=offload) for zero, offload in OF_EACH),
        *(IN_PIECES._replace(zero_stage=zero, offload=offload) for zero, offload in OF_EACH),
    ],
    (1, 3): [Way(zero) for zero in (0, 1, 2, 3)],
}
"""By stages and data ranks, what is tried on them; the plain way first."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_flux.write_folder(tmp_path_factory.mktemp("flux"), num_layers=1)


def train(ranks: Ranks, folder: Path, stages: int) -> dict[Way, dict[str, Any]]:
    """Job of a rank: what each way of training leaves."""
    from utils.parallel.backend import initialize_deepspeed

    initialize_deepspeed()
    # So that there are several, which wait for one another.
    travelling.BUCKET_ELEMENTS = 2000
    ways = LAYOUTS[stages, ranks.world_size // stages]
    return {way: train_in(ranks.with_stages(stages), folder, way) for way in ways}


class Training:
    """The stage of a rank that trains in some way."""

    def __init__(self, ranks: Ranks, folder: Path, way: Way):
        from utils.adapters.attach import base_name
        from utils.parallel.engine import Engine
        from utils.parallel.partition import of_stage, stage_bounds, within
        from utils.parallel.pipeline import DenoiserPipeline
        from utils.parallel.together import optimizer_for_frozen_stage

        self.ranks, self.way = ranks, way
        self.flux = FluxPipeline(FluxOptions(type="flux", dtype=way.dtype, diffusers_path=folder), seed=0)
        denoiser, layers = toy_flux.denoiser_and_layers(self.flux, SINGLE_BLOCKS_ONLY if way.adapted else None)
        bounds = stage_bounds("uniform", [1] * len(layers), ranks.stages * way.pieces)
        recompute = int(ranks.stages == 2 or way.recompute)
        own = within(of_stage(bounds, ranks.stage, ranks.stages), layers)
        held = {id(p) for layer in own for p in layer.parameters()}
        named = {base_name(name): p for name, p in denoiser.named_parameters()}
        self.trained = {name: p for name, p in named.items() if p.requires_grad and id(p) in held}
        keys = {"zero_stage": way.zero_stage, "blocks_to_swap": way.swapped, "offload_optimizer": way.offload}
        settings = settings_of(self.flux, SINGLE_BLOCKS_ONLY if way.adapted else None, **keys)
        staged = StagedModel(denoiser, layers, bounds, [way.swapped] * ranks.stages)
        self.shares = shares_of(settings, ranks, staged, self.trained)
        groups = groups_of(
            self.shares.stepped.items(), lr=1e-3, weight_decay=0.1, own_lr=lambda name: 5e-3 if "attn" in name else None
        )
        # Not by `optimizers.build`, which wants a GPU for that of 8 bits.
        build, keys = find(way.optimizer).build, {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        self.optimizer = build(groups, **keys) if groups else optimizer_for_frozen_stage()
        # After what looks at parameters, since those of divided blocks have no values then.
        homes = homes_of(settings, ranks, staged, trained=not way.adapted).filled()
        formed = {"stages": ranks.stages, "recompute": recompute, "swap": block_swap(settings, homes)}
        module = DenoiserPipeline(layers, bounds, self.flux.stream_type, self.flux.maths.loss, **formed)
        self.engine = Engine(
            module,
            self.optimizer,
            accumulation=way.accumulation,
            clip_norm=CLIP,
            float32_gradients=way.accumulation > 1,
            shares=self.shares,
        )
        step_once, self.with_gradients = self.optimizer.step, set()

        def step() -> None:
            """The optimizer's, which looks at what has a gradient on the device."""
            self.with_gradients |= {name for name, p in self.trained.items() if p.grad is not None}
            step_once()

        self.engine.optimizer.step = step

    def ranks_that_step_others(self, rank: int) -> list[float]:
        """The ranks with which an optimizer adds up what it sums over all parameters."""
        group = None if self.shares.divided else self.engine.grid.get_pipe_parallel_group()
        return [number for (number,) in numbers_of_all(self.engine.device, group)([float(rank)])]

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """Goes on from a checkpoint, or begins."""
        settings = settings_of(self.flux, ema=AVERAGES)
        optimizer = settings.optimizer.model_copy(update={"type": self.way.optimizer})
        settings = settings.model_copy(update={"optimizer": optimizer})
        progress = checkpoint.progress if checkpoint else Progress()
        given = settings, ResumeFlags(), checkpoint, progress, self.trained, self.optimizer, self.shares
        self.ema = restore_or_start(*given)

    def step(self, number: int) -> list[float]:
        """Loss and norm of a step."""
        batches = [
            toy_flux.micro_batch(self.flux, number, self.ranks.data_rank, index)
            for index in range(self.way.accumulation)
        ]
        result = self.engine.train_step(batches, number)
        self.ema.update(number + 1)
        return [result.loss, result.grad_norm]

    def evaluate(self, number: int) -> list[float]:
        """The losses of some samples, of which the ranks have different numbers."""
        batches = [toy_flux.micro_batch(self.flux, number, self.ranks.stage, index) for index in range(2)]
        own, swap = batches[: (self.ranks.data_rank + 1) % 3], self.engine.module.swap
        with swap.hand_in_hand():
            found = self.engine.evaluate(own, len(own)) if own else []
        return [loss for losses_B in found for loss in losses_B.tolist()]

    def held_bytes(self) -> dict[str, int]:
        """Of weights: what is divided, what this rank keeps of that, the buffers, and all that is not divided."""
        module = self.engine.module
        blocks, ring = module.swap._blocks if self.way.zero_stage == 3 else (), module.swap._ring
        memory = [*(block.home for block in blocks), *(slot.memory for slot in (ring._slots if ring else ()))]
        elsewhere = {tensor.untyped_storage().data_ptr() for tensor in memory}
        storages = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
        others = {one.data_ptr(): one.nbytes() for one in storages if one.data_ptr() not in elsewhere}
        return {
            "divided": sum(form.nbytes for block in blocks for form in block._forms),
            "kept": sum(block.home.nbytes for block in blocks),
            "buffers": ring.nbytes if ring else 0,
            "largest": max((block.size for block in blocks), default=0),
            "others": sum(others.values()),
        }


def train_in(ranks: Ranks, folder: Path, way: Way) -> dict[str, Any]:
    """Two steps in this way, a checkpoint, and a third in another."""
    first = Training(ranks, folder, way)
    first.begin(None)
    evaluated = first.evaluate(7)
    results = [number for step in range(2) for number in first.step(step)]
    evaluated += first.evaluate(8)
    place = folder / f"{ranks.stages} {ranks.data_ranks} {tuple(way)}"
    if ranks.is_main:
        place.mkdir()
    made_with = {"identity": {}, "optimizer": {}, "steps_in_epoch": 9}
    state = Progress(step=2), first.trained, first.optimizer, made_with, first.ema, first.shares
    checkpoint = Checkpoint(save(place, ranks, *state))
    # Now, since optimizers change the memory from which it is read.
    saved = numbers({key: file.get_tensor(key) for key, file in checkpoint._files.items()})
    then = Training(ranks, folder, way.then)
    then.begin(checkpoint)
    results += then.step(2)
    weights = numbers(then.shares.held)
    with then.ema.swapped():
        averaged = numbers(then.shares.held)
    assert same(numbers(then.shares.held), weights)
    return {
        "numbers": results,
        "checkpoint": saved,
        "evaluated": evaluated,
        "held": first.held_bytes(),
        "weights": weights,
        "averaged": averaged,
        "state": {name: numbers(first.optimizer.state[p]) for name, p in first.shares.stepped.items()},
        "gradients": first.with_gradients,
        "added up with": first.ranks_that_step_others(ranks.rank),
        "on host": sum(p.data_ptr() != first.trained[name].data_ptr() for name, p in first.shares.stepped.items()),
    }


def numbers(values: Any) -> dict[str, Any]:
    return {name: torch.as_tensor(value).detach().float().numpy().copy() for name, value in values.items()}


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(abs(one[name] - other[name]).max() <= tolerance for name in one)


def size(tables: dict[str, Any]) -> int:
    return sum(value.size for values in tables.values() for value in values.values())


@pytest.mark.parametrize(("stages", "data_ranks"), LAYOUTS)
def test_what_is_divided_changes_nothing(folder: Path, stages: int, data_ranks: int) -> None:
    """Weights, averages and what checkpoints hold, to the bit; but for gradients of several micro-batches or more than
    two ranks, which the second stage adds up in another order."""
    returned = run_ranks(train, stages * data_ranks, folder, stages)
    for way in LAYOUTS[stages, data_ranks]:
        exact = not {2, 3} & {way.zero_stage, way.then.zero_stage} or (way.accumulation == 1 and data_ranks == 2)
        # A rounded weight may be rounded to the other side.
        tolerance = 0.0 if exact else 1e-6 if way.dtype == "float32" else 1e-2
        for stage in range(stages):
            of_stage = [rank[way] for rank in returned[stage * data_ranks : (stage + 1) * data_ranks]]
            expected = returned[stage * data_ranks][way.plain]
            for kind in ("weights", "averaged", "checkpoint"):
                assert {name for rank in of_stage for name in rank[kind]} == expected[kind].keys()
            for data_rank, rank in enumerate(of_stage):
                plain, near = (
                    returned[stage * data_ranks + data_rank][way.plain],
                    {"rel": 0 if exact else 1e-5, "abs": 0},
                )
                assert rank["numbers"] == pytest.approx(expected["numbers"], **near), way
                assert rank["evaluated"] == pytest.approx(plain["evaluated"], **near), way
                assert len(rank["evaluated"]) == 4 * ((data_rank + 1) % 3), "some have more to evaluate, some nothing"
                for kind in ("weights", "averaged", "checkpoint"):
                    own = {name: expected[kind][name] for name in rank[kind]}
                    assert same(rank[kind], own, tolerance), (way, kind)
                divided = way.zero_stage > 0
                together = [one for one in range(len(returned)) if divided or one % data_ranks == data_rank]
                assert rank["added up with"] == together, way
                if not way.swapped:
                    assert rank["on host"] == (len(rank["state"]) if way.offload else 0)
            assert bool(expected["state"]) == (not way.adapted or stage == stages - 1), "one stage has nothing to train"
            for rank in of_stage:
                assert_divided(way, rank, data_ranks if way.zero_stage else 1, expected)
            assert_weights_are_divided(way, [rank["held"] for rank in of_stage], expected["held"]["others"])


def assert_divided(way: Way, rank: dict[str, Any], shares: int, expected: dict[str, Any]) -> None:
    """A rank has its part of the state, and in the second stage of the gradients when the optimizer steps."""
    whole, largest = size(expected["state"]), max((size({"": one}) for one in expected["state"].values()), default=0)
    assert size(rank["state"]) <= whole / shares + largest
    if way.zero_stage > 1:
        assert rank["gradients"] == (set() if way.offload else rank["state"].keys()), way
    elif not way.offload:
        assert rank["gradients"] == expected["weights"].keys()


def assert_weights_are_divided(way: Way, of_ranks: list[dict[str, int]], whole: int) -> None:
    """In the third stage a rank keeps its part of the blocks, and has room for two of them beside."""
    if way.zero_stage != 3:
        return
    for held in of_ranks:
        assert held["divided"] > whole / 2 and held["buffers"] == 2 * held["largest"]
        # Of what is elsewhere, a number each is left.
        assert 0 <= held["others"] - (whole - held["divided"]) <= 1000
        assert abs(held["kept"] - held["divided"] / len(of_ranks)) < 0.1 * held["divided"]
    padding = ALIGNMENT * 100
    assert 0 <= sum(held["kept"] for held in of_ranks) - of_ranks[0]["divided"] <= padding


def test_a_share_follows_from_names_and_sizes() -> None:
    sizes = {f"block.{number}": size for number, size in enumerate([700, 10, 400, 400, 10, 300, 190])}
    found = owners(sizes, 3)
    assert found == owners(dict(reversed(sizes.items())), 3)
    held = [sum(size for name, size in sizes.items() if found[name] == rank) for rank in range(3)]
    assert held == [700, 700, 610]
    assert owners({"a": 1}, 4) == {"a": 0}


def test_more_ranks_than_parameters_leave_some_without() -> None:
    shares = [Shares({"a": nn.Parameter(torch.ones(3))}, Ranks(rank, 2), 1) for rank in range(2)]
    assert [list(share.stepped) for share in shares] == [["a"], []]


def test_what_travels_together_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(travelling, "BUCKET_ELEMENTS", 10)
    sizes = [3, 7, 1, 30, 2, 8]
    found = buckets(nn.Parameter(torch.ones(size)) for size in sizes)
    assert [[parameter.numel() for parameter in bucket] for bucket in found] == [[3, 7], [1], [30], [2, 8]]


@pytest.mark.parametrize("offload", [False, True])
def test_one_process_has_all_of_it(offload: bool) -> None:
    parameters = {"a": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(()).bfloat16())}
    parameters["channels last"] = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    shares = Shares(parameters, Ranks(), 2, offload=offload)
    assert not shares.divided and not shares.divides_gradients
    for name, twin in shares.stepped.items():
        parameter = parameters[name]
        assert (twin is parameter) != offload
        assert torch.equal(twin, parameter) and twin.dtype == parameter.dtype and twin.stride() == parameter.stride()


def test_what_the_processor_steps_stays_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it is there: memory is unlocked with its tensor, of which what lies in it is a view."""
    unlocked: list[None] = []
    monkeypatch.setattr(transfers, "lock", lambda memory: weakref.finalize(memory, unlocked.append, None).alive)
    parameter = nn.Parameter(torch.ones(3, 2))
    copies = HostCopies([parameter], pinned=True)
    parameter.grad = torch.ones(3, 2)
    copies.take_gradients()
    assert not unlocked
    del copies
    assert len(unlocked) == 2


def test_averages_are_there_before_the_processor_trains_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's copies get other values right behind, and the device may still be reading them."""
    happened = []

    class Averaging(torch.optim.SGD):
        def eval(self) -> None:
            happened.append("eval")

        def train(self) -> None:
            happened.append("train")

    shares = Shares({"a": nn.Parameter(torch.ones(3))}, offload=True)
    for name in ("give_values", "wait"):
        monkeypatch.setattr(HostCopies, name, lambda self, name=name: happened.append(name))
    optimizer = Averaging(shares.stepped.values(), lr=0.1)
    run = RunParts(
        **dict.fromkeys(field.name for field in fields(RunParts)) | {"optimizer": optimizer, "shares": shares}
    )
    with run.weights_to_use():
        pass
    assert happened == ["eval", "give_values", "wait", "train"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_of_a_gpus_parameters_lie_in_locked_memory() -> None:
    parameter = nn.Parameter(torch.ones(300, 200, device="cuda"))
    copies = HostCopies([parameter], pinned=True)
    for step in range(1, 4):
        parameter.grad = torch.full_like(parameter, step)
        copies.take_gradients()
        (twin,) = copies.twins
        assert twin.is_pinned() and twin.grad.is_pinned() and bool((twin.grad == step).all())
        with torch.no_grad():
            twin.add_(twin.grad)
        copies.give_values()
    assert bool((parameter == 7).all())
