"""Blocks that leave a stage while it is loaded: what is held at every moment, and that no value is another one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from mmap import PAGESIZE
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from models.assembly.exports import export_plan
from models.assembly.placement import block_swap, homes_of
from models.assembly.stage import StagedModel, load_stage
from models.foundation.checkpoints.denoiser import DenoiserWeights
from models.foundation.checkpoints.first_weights import FirstWeights
from models.foundation.checkpoints.weights import Weights
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from tests.processes import run_ranks
from utils.adapters.lora import LoraSettings
from utils.adapters.presets import TensorSource
from utils.adapters.vera import VeraSettings
from utils.diffusion.seeds import normal
from utils.parallel.partition import repeated_blocks
from utils.parallel.shared_memory import SharedMemory
from utils.parallel.transfers import ALIGNMENT
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.schema import AdapterSettings

BLOCKS = 6
LORA = LoraSettings(type="lora", rank=4)


class Case(NamedTuple):
    """How weights are divided or swapped.

    Attributes:
        options, keys: of the model, and of the run.
        presets: a fused adapter and one beside the weights.
    """

    adapter: AdapterSettings | None
    options: dict[str, Any]
    keys: dict[str, Any]
    presets: bool = False


DIVIDED = {"zero_stage": 3, "blocks_to_swap": 1}
CASES = {
    "in full": Case(None, {}, DIVIDED),
    "in full from a preset": Case(None, {}, DIVIDED, presets=True),
    "adapted": Case(LORA, {}, DIVIDED, presets=True),
    "adapted, in 8 bits": Case(LORA, {"transformer_dtype": "float8"}, DIVIDED, presets=True),
    "from the weights' own directions": Case(LoraSettings(type="lora", rank=4, init="pissa"), {}, DIVIDED),
    "with lengths of rows": Case(
        LoraSettings(type="lora", rank=4, dora=True), {"transformer_dtype": "int8"}, DIVIDED, presets=True
    ),
    "with matrices that all blocks share": Case(VeraSettings(type="vera", rank=4), {}, DIVIDED),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, so that what is read in 16 bits takes memory of its own; its blocks are larger than what is beside
    them."""
    sizes = {"num_attention_heads": 6, "num_layers": 2, "num_single_layers": BLOCKS - 2}
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"), **sizes)


@pytest.fixture(scope="module")
def presets(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A LoRA with an effect, fused and beside the weights."""
    flux, place = tiny_flux.pipeline(folder), tmp_path_factory.mktemp("preset") / "out"
    staged = load_stage(flux, settings_of(flux, LORA), 0)
    with torch.no_grad():
        for name, parameter in staged.trained(staged.layers).items():
            parameter.add_(normal(tuple(parameter.shape), 0, name), alpha=0.1)
    export(place, Ranks(), staged.trained(staged.layers), export_plan(flux, settings_of(flux, LORA), staged), 1)
    return [{"path": place, "weight": 0.7, "fused": True}, {"path": place, "weight": 0.1, "fused": False}]


def tensors_of(layers: list[nn.Module]) -> dict[str, torch.Tensor]:
    """What layers have, by name."""
    every = nn.ModuleList(layers)
    named = [*every.named_parameters(remove_duplicate=False), *every.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if not tensor.is_meta}


def sum_of(tensors: list[torch.Tensor]) -> int:
    """The bytes of the memory in which they lie."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Held:
    """Looks what is held whenever something is read.

    Attributes:
        most: the bytes of a stage's tensors, with what has left it.
        read: for each tensor that was read, in order: its name, and how many blocks had left.
    """

    def __init__(self) -> None:
        self.most, self.read = 0, list[tuple[str, int]]()
        self._staged: StagedModel | None = None

    def homes_of(self, make: Callable[[StagedModel], Any], staged: StagedModel) -> Any:
        homes = make(staged)
        self._layers, self._homes = staged.layers, homes
        return homes

    def look(self, name: str) -> None:
        blocks = self._homes.blocks
        kept = [block.home for block in blocks.values() if hasattr(block, "home")]
        self.most = max(self.most, sum_of([*kept, *tensors_of(self._layers).values()]))
        self.read.append((name, len(blocks)))

    @contextmanager
    def watching(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for kind in (Weights, FirstWeights):
                patch.setattr(kind, "read", self._looking(kind.read))
            yield

    def _looking(self, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def read(source: TensorSource, name: str) -> torch.Tensor:
            values = plain(source, name)
            self.look(name)
            return values

        return read


def loaded(
    folder: Path, case: Case, ranks: Ranks, presets: list[dict[str, Any]], given: Ranks | None = None
) -> tuple[StagedModel, Held]:
    """A stage, and what was held meanwhile; with those `given` ranks that load together."""
    options = {"dtype": "bfloat16", **case.options, "preset_adapters": presets if case.presets else []}
    flux, held = tiny_flux.pipeline(folder, **options), Held()
    settings = settings_of(flux, case.adapter, **case.keys)
    make = partial(held.homes_of, partial(homes_of, settings, ranks, trained=case.adapter is None))
    with held.watching():
        return load_stage(flux, settings, ranks.stage, make, ranks=given), held


@pytest.mark.parametrize("name", CASES)
def test_divided_weights_are_those_that_were_read_and_never_whole(
    folder: Path, presets: list[dict[str, Any]], name: str
) -> None:
    """The pieces of both ranks together, and what is not divided; never more is held than these and a block."""
    case = CASES[name]
    plain, of_all = loaded(folder, case._replace(keys={}), Ranks(), presets)
    assert not plain.homes.blocks
    expected = tensors_of(plain.layers)
    ranks, held = zip(*(loaded(folder, case, Ranks(rank, 2), presets) for rank in range(2)), strict=True)
    first, second = (staged.homes.blocks for staged in ranks)
    names = {id(tensor): name for name, tensor in tensors_of(ranks[0].layers).items()}
    seen = set()
    for block, other in zip(first.values(), second.values(), strict=True):
        for tensor, values in zip(block._tensors, block.views(torch.cat([block.home, other.home])), strict=True):
            wanted = expected[names[id(tensor)]]
            assert torch.equal(values, wanted) and values.dtype == wanted.dtype, names[id(tensor)]
            seen.add(names[id(tensor)])
    assert len(first) == BLOCKS and [block.on_host for block in first.values()] == [True] + [False] * (BLOCKS - 1)
    for staged in ranks:
        found = tensors_of(staged.layers)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], wanted) for name, wanted in expected.items() if name not in seen)
    # Nothing of a block stays but what is trained beside frozen weights, or frozen beside trained ones, and what blocks
    # share.
    in_blocks = {name for name in expected if int(name.partition(".")[0]) in first}
    stays = [name for name in in_blocks - seen if expected[name].requires_grad == (case.adapter is None)]
    assert all("projections" in name for name in stays) and len(seen) > BLOCKS
    assert bool(stays) == isinstance(case.adapter, VeraSettings)
    # Presets beside weights are there before these are read.
    beside = sum_of([tensor for name, tensor in expected.items() if ".preset" in name])
    for staged, one in zip(ranks, held, strict=True):
        assert one.most <= room_for(staged) + beside
        assert one.most < 0.8 * of_all.most <= sum_of(list(expected.values()))
        assert_one_after_the_other(staged, one)


def room_for(staged: StagedModel) -> int:
    """The bytes of a rank's pieces, of what it does not divide, and of a block."""
    blocks = staged.homes.blocks.values()
    pieces = sum(block.home.untyped_storage().nbytes() for block in blocks)
    gone = {id(tensor) for block in blocks for tensor in block._tensors}
    stays = sum_of([tensor for tensor in tensors_of(staged.layers).values() if id(tensor) not in gone])
    return pieces + max(block.size for block in blocks) + stays


def assert_one_after_the_other(staged: StagedModel, held: Held) -> None:
    """All of a block is read when those before it have left, and nothing of those behind it."""
    by_block: dict[int, set[str]] = {}
    for name, left in held.read:
        by_block.setdefault(left, set()).add(".".join(name.split(".")[:2]))
    assert list(by_block) == list(range(BLOCKS + 1))
    assert all(len(by_block[left]) == 1 for left in range(BLOCKS))
    assert len(set.union(*(by_block[left] for left in range(BLOCKS)))) == BLOCKS
    assert repeated_blocks(staged.layers) == list(staged.homes.blocks)


def share(ranks: Ranks, folder: Path, readable: bool) -> dict[str, Any]:
    """Job of a rank, of which the blocks wait in memory that both share: what it holds on the way, and then."""
    if not readable:
        SharedMemory._file_of = lambda *_: None
    staged, held = loaded(folder, Case(LORA, {}, {"blocks_to_swap": BLOCKS}), ranks, [])
    blocks = list(staged.homes.blocks.values())
    assert_one_after_the_other(staged, held)
    before = digest(staged)
    block_swap(settings_of(tiny_flux.pipeline(folder), LORA), staged.homes)
    assert all(tensor.numel() == 0 for block in blocks for tensor in block._tensors)
    stays = sum_of(list(tensors_of(staged.layers).values()))
    kept = sum(block.size for block in blocks)
    return {"most": held.most, "stays": stays, "largest": max(b.size for b in blocks), "kept": kept, "digest": before}


def digest(staged: StagedModel) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors_of(staged.layers).items()):
        found.update(name.encode() + tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("readable", [True, False])
def test_swapped_blocks_are_there_once_a_machine_while_they_are_loaded(folder: Path, readable: bool) -> None:
    """Or once a process, where it may not look into another one's memory."""
    expected = digest(loaded(folder, Case(LORA, {}, {}), Ranks(), [])[0])
    for number, rank in enumerate(run_ranks(share, 2, folder, readable)):
        assert rank["digest"] == expected
        room = rank["largest"] + rank["stays"]
        if readable or not number:
            assert rank["most"] <= room < 0.6 * (rank["kept"] + rank["stays"])
        else:
            assert rank["kept"] < rank["most"] <= room + rank["kept"] + BLOCKS * (PAGESIZE + ALIGNMENT)


def draw(ranks: Ranks, folder: Path, keys: dict[str, Any], readable: bool) -> dict[str, Any]:
    """Job of a rank that starts from scratch: how often it draws the weights of all, and what it has of them."""
    if not readable:
        SharedMemory._file_of = lambda *_: None
    ranks, drawn, draws = ranks.with_stages(keys.get("pipeline_stages", 1)), DenoiserWeights._drawn, []

    def counted(weights: DenoiserWeights, factory: Callable[[], nn.Module]) -> nn.Module:
        draws.append(factory)
        return drawn(weights, factory)

    DenoiserWeights._drawn = counted
    staged, held = loaded(folder, Case(None, {"from_scratch": True}, keys), ranks, [], given=ranks)
    if staged.homes.blocks:
        assert held.most <= room_for(staged)
        assert_one_after_the_other(staged, held)
    # What another rank has is without memory, or NaN.
    values = {
        name: tensor.detach().float().numpy().copy()
        for name, tensor in staged.denoiser.named_parameters()
        if not (tensor.is_meta or tensor.isnan().any())
    }
    return {"draws": len(draws), "values": values}


@pytest.mark.parametrize(
    ("keys", "readable"), [({"zero_stage": 3}, True), ({"pipeline_stages": 2}, True), ({"zero_stage": 3}, False)]
)
def test_first_weights_are_drawn_once_a_machine(folder: Path, keys: dict[str, Any], readable: bool) -> None:
    """Or once a process, where it may not look into another one's memory."""
    whole = loaded(folder, Case(None, {"from_scratch": True}, {}), Ranks(), [])[0].denoiser
    expected = {name: tensor.detach().float() for name, tensor in whole.named_parameters()}
    first, second = run_ranks(draw, 2, folder, keys, readable)
    assert (first["draws"], second["draws"]) == (1, int(not readable))
    assert {*first["values"], *second["values"]} == {*expected} and len(first["values"]) < len(expected)
    for name, value in [*first["values"].items(), *second["values"].items()]:
        assert torch.equal(torch.from_numpy(value), expected[name]), name
