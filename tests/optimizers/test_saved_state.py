"""State through a checkpoint: the next step is the same to the bit, at another number of stages too."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimizers
from optimizers import sums
from optimizers.averaging import weights_to_use
from optimizers.parameter_groups import groups_of
from optimizers.saved_state import packed, unpacked
from tests.optimizers.test_kinds import CASES, DEVICE
from utils.ranks import Ranks
from utils.run import saving
from utils.run.checkpoint import Checkpoint
from utils.run.progress import Progress

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
MADE_WITH = {"identity": {}, "optimizer": {}, "steps_in_epoch": 9}
SHAPES = {"0.matrix": (48, 9), "0.bias": (7,), "1.large": (70, 60), "1.kernel": (4, 2, 3, 3)}
CUT = [["0.matrix", "0.bias"], ["1.large", "1.kernel"]]
Named = dict[str, nn.Parameter]
ANY_LAYOUT = {name for name in optimizers.available() if name != "prodigy_plus_schedule_free"}
"""Those whose steps have the same bits however parameters are dealt; the library of the other sums in float32."""


def problem(names: Sequence[str] = tuple(SHAPES)) -> Named:
    draw = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    return {name: nn.Parameter(values[name].to(DEVICE)) for name in names}


def optimizer_of(named: Named, name: str, keys: dict[str, Any]) -> torch.optim.Optimizer:
    """As `optimizers.build`, also where it is not offered."""
    settings = optimizers.find(name).settings(type=name, lr=0.01, weight_decay=0.1, **keys)
    return optimizers.made(groups_of(named.items(), lr=0.01, weight_decay=0.1), settings)


def step(named: Named, optimizer: torch.optim.Optimizer, number: int) -> None:
    draw = torch.Generator().manual_seed(number)
    gradients = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    for name, weight in named.items():
        weight.grad = weight.detach() * 0.5 + gradients[name].to(DEVICE)
    torch.manual_seed(number)
    optimizer.step()


def restored(
    folder: Path, names: Sequence[str], name: str, keys: dict[str, Any]
) -> tuple[Named, torch.optim.Optimizer]:
    named = {one: nn.Parameter(torch.zeros(SHAPES[one], device=DEVICE)) for one in names}
    optimizer = optimizer_of(named, name, keys)
    checkpoint = Checkpoint(folder)
    checkpoint.load_weights(named)
    checkpoint.load_optimizer(named, optimizer)
    return named, optimizer


def at_two_stages(name: str, work: Callable[[int, sums.Total], None]) -> None:
    """Lets two threads work as two stages do, which exchange numbers where their optimizer sums."""
    barrier, numbers, errors = threading.Barrier(2), [[], []], []

    def of_stage(stage: int) -> None:
        def numbers_of_all(own: Sequence[float]) -> list[list[float]]:
            numbers[stage] = list(own)
            barrier.wait(10)
            gathered = [list(one) for one in numbers]
            barrier.wait(10)
            return gathered

        try:
            work(stage, sums.over(numbers_of_all))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=of_stage, args=(stage,)) for stage in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.parametrize(("name", "keys"), CASES)
def test_the_next_step_is_the_same_from_a_checkpoint(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    whole = problem()
    optimizer = optimizer_of(whole, name, keys)
    for number in range(4):
        step(whole, optimizer, number)
    saving.save(tmp_path, Ranks(), Progress(step=4), whole, optimizer, MADE_WITH)
    again, anew = restored(tmp_path / "global_step4", list(SHAPES), name, keys)
    for number in (4, 5):
        step(whole, optimizer, number)
        step(again, anew, number)
    assert all(torch.equal(again[one], weight) for one, weight in whole.items())


@pytest.mark.parametrize(("name", "keys"), CASES)
def test_two_stages_go_where_one_goes(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """1 -> 2 -> 1: from the checkpoint of one stage to that of two, and back."""
    if name == "prodigy_plus_schedule_free":
        # The order of threads decides what is drawn.
        keys = keys | {"stochastic_rounding": False}
    whole = problem()
    optimizer = optimizer_of(whole, name, keys)
    for number in range(2):
        step(whole, optimizer, number)
    saving.save(tmp_path, Ranks(), Progress(step=2), whole, optimizer, MADE_WITH)
    stages: list[tuple[Named, torch.optim.Optimizer]] = [({}, optimizer)] * 2

    def work(stage: int, total: sums.Total) -> None:
        stages[stage] = named, own = restored(tmp_path / "global_step2", CUT[stage], name, keys)
        own.total = total
        for number in (2, 3):
            step(named, own, number)

    at_two_stages(name, work)
    for number in (2, 3):
        step(whole, optimizer, number)
    both = {one: weight for named, _ in stages for one, weight in named.items()}
    joined = _saved_by_two(tmp_path, stages)
    again, anew = restored(joined, list(SHAPES), name, keys)
    step(whole, optimizer, 4)
    step(again, anew, 4)
    assert both.keys() == whole.keys()
    for one, weight in whole.items():
        if name in ANY_LAYOUT:
            assert torch.equal(again[one], weight), one
        else:
            torch.testing.assert_close(again[one], weight, rtol=1e-6, atol=1e-7)


def _saved_by_two(folder: Path, stages: Sequence[tuple[Named, torch.optim.Optimizer]]) -> Path:
    """The checkpoint that two stages write."""
    found = folder / "two"
    for stage, (named, optimizer) in enumerate(stages):
        saving.save(folder / str(stage), Ranks(), Progress(step=4), named, optimizer, MADE_WITH)
    (folder / "0" / "global_step4").rename(found)
    (folder / "1" / "global_step4" / "state-0.safetensors").rename(found / "state-1.safetensors")
    progress = (found / "progress.json").read_text().replace('"stages": 1', '"stages": 2')
    (found / "progress.json").write_text(progress)
    return found


@pytest.mark.parametrize("name", [name for name, kind in optimizers.available().items() if kind.averages])
def test_what_is_used_is_not_what_is_trained_and_looking_changes_nothing(name: str) -> None:
    looked, other = problem(), problem()
    first, second = (optimizer_of(one, name, {}) for one in (looked, other))
    for number in range(12):
        step(looked, first, number)
        step(other, second, number)
        trained = {key: weight.detach().clone() for key, weight in looked.items()}
        with weights_to_use(first):
            used = {key: weight.detach().clone() for key, weight in looked.items()}
        assert all(torch.equal(weight, trained[key]) for key, weight in looked.items())
    assert all(torch.equal(looked[key], other[key]) for key in looked)
    assert not any(torch.equal(used[key], trained[key]) for key in used)


@pytest.mark.parametrize(
    "value",
    [
        3,
        True,
        0.1,
        float("inf"),
        None,
        "text",
        (1, 2.5),
        [[], [torch.arange(3.0)], None],
        {"a": torch.ones(2, dtype=torch.bfloat16)},
        [torch.arange(6.0).view(2, 3).t(), torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)],
        deque([1, 2], 4),
        torch.bfloat16,
        torch.tensor(2.5),
        torch.tensor(2, dtype=torch.int32),
    ],
    ids=str,
)
def test_what_an_optimizer_keeps_comes_back_as_it_was(value: Any) -> None:
    tensors = packed("key", value)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    back = unpacked(tensors, torch.device("cpu"))
    assert list(back) == ["key"] and type(back["key"]) is type(value) and repr(back["key"]) == repr(value)
    if isinstance(value, list):
        strides = [one.stride() for one in value if isinstance(one, torch.Tensor)]
        assert [one.stride() for one in back["key"] if isinstance(one, torch.Tensor)] == strides


def test_what_cannot_be_saved_is_told() -> None:
    with pytest.raises(TypeError, match="an optimizer's set cannot be saved in a checkpoint"):
        packed("key", {1, 2})


@pytest.mark.parametrize("cut", range(7))
def test_sums_have_the_same_bits_however_they_are_dealt(cut: int) -> None:
    row = [1e16, 1.0, -1e16, 3e-9, 0.1, 0.2]
    sent: list[list[float]] = []

    def send(numbers: Sequence[float]) -> list[list[float]]:
        sent.append(list(numbers))
        return sent

    sums.over(send)([row[:cut]])
    assert sums.over(send)([row[cut:]]) == sums.alone([row])
