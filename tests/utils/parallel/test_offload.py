"""Inputs that wait in the host's memory, on devices that are pretended: one that copies as late as it may, and one that
has a clock."""

from __future__ import annotations

import pytest
import torch

from tests.utils.parallel.late import Late
from utils.diffusion.seeds import normal
from utils.parallel.offload import HostInputs, Kept

PLACE = 3


def forward(host: HostInputs, inputs: list[torch.Tensor]) -> list[Kept]:
    host.begin()
    return [host.keep({PLACE: tensor}) for tensor in inputs]


def check(host: HostInputs, kept: list[Kept], inputs: list[torch.Tensor]) -> None:
    """The pass back."""
    for one, tensor in zip(reversed(kept), reversed(inputs), strict=True):
        (brought,) = host.bring(one).values()
        assert torch.equal(brought, tensor) and brought.stride() == tensor.stride()


def inputs_of(pass_: int, layers: int = 5, width: int = 8) -> list[torch.Tensor]:
    return [normal((3, width, 2), pass_, layer).transpose(0, 1) for layer in range(layers)]


def test_what_comes_back_is_what_left_with_several_passes_in_flight() -> None:
    host = HostInputs(Late(), Late(), smallest=1)
    first, second = inputs_of(0), inputs_of(1)
    kept_first = forward(host, first)
    kept_second = forward(host, second)
    check(host, kept_first, first)
    third = inputs_of(2)
    kept_third = forward(host, third)
    check(host, kept_second, second)
    check(host, kept_third, third)


def test_host_memory_is_used_again_whatever_the_sizes() -> None:
    host = HostInputs(Late(), Late(), smallest=1)
    for pass_, width in enumerate((8, 4, 16, 8, 16)):
        inputs = inputs_of(pass_, width=width)
        check(host, forward(host, inputs), inputs)
        assert len(host._spare) == len(inputs) - 1, "the last inputs stay on the device"
    assert {buffer.memory.nbytes for buffer in host._spare} == {inputs[0].nbytes}


def test_small_tensors_stay() -> None:
    host = HostInputs(Late(), Late(), smallest=100)
    kept = host.keep({0: torch.zeros(24), 1: torch.zeros(25)})
    assert 0 not in kept and 1 in kept


def test_a_layer_whose_backward_pass_is_left_out_does_no_harm() -> None:
    host = HostInputs(Late(), Late(), smallest=1)
    inputs = inputs_of(0)
    kept = forward(host, inputs)
    check(host, [kept[1], kept[4]], [inputs[1], inputs[4]])


class Clock:
    """What the device has computed, in time; both directions are one-way streets of their own."""

    now = 0.0

    def compute(self, seconds: float) -> None:
        self.now += seconds


class Timed:
    """`Transfers` of one direction. A mark is a time."""

    def __init__(self, clock: Clock, seconds: float):
        self.clock, self.seconds, self.copied = clock, seconds, 0.0

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: float | None) -> float:
        self.copied = max(self.copied, *(mark or 0.0 for mark in after)) + self.seconds
        return self.copied

    def computed(self) -> float:
        return self.clock.now

    def wait(self, mark: float) -> None:
        self.clock.now = max(self.clock.now, mark)


@pytest.mark.parametrize(("copy", "slower"), [(0.5, 1.0), (1.0, 1.0), (3.0, 1.0), (6.0, 2.0)])
def test_copies_hide_behind_computation(copy: float, slower: float) -> None:
    """A layer takes 1 forward, and 3 when it is run again and goes back. Only copies that take longer are waited for:
    those of all layers but the last, of which the first to come back also waits for itself to have left."""
    clock, layers = Clock(), 20
    host = HostInputs(Timed(clock, copy), Timed(clock, copy), smallest=1)
    kept = []
    for _ in range(layers):
        clock.compute(1.0)
        kept.append(host.keep({0: torch.zeros(1)}))
    for one in reversed(kept):
        host.bring(one)
        clock.compute(3.0)
    plain = layers * (1.0 + 3.0)
    # The last to leave does so when all others have left.
    left = max(layers * 1.0, (layers - 1) * copy + 1.0)
    assert clock.now <= max(plain, left + layers * max(copy, 3.0)) + 2 * copy
