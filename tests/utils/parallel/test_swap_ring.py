"""The ring of buffers on a device that is pretended: what is copied when, and how long computation waits for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from utils.parallel.interleaved import Layout
from utils.parallel.ring import HostBlock, Ring, Turn
from utils.parallel.schedules import schedule_of, turns_of
from utils.parallel.swap_plan import Swappable, spread
from utils.parallel.transfers import ALIGNMENT

BACKWARD = 2.0
"""The time of a block's backward pass in those of its forward pass."""


class Clock:
    """`Transfers` to a device that computes and copies beside each other, and to which everything has been said in
    advance. A mark is a time. Each copy takes `seconds`."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.now = 0.0
        """When all computation is done that has been asked for."""
        self.copied = 0.0
        self.copies: list[int] = []
        """The first byte of what was copied, which is the number of the block."""
        self.buffers: list[torch.Tensor] = []
        self.reading: dict[int, float] = {}
        """Address of a buffer -> when the computation is done that reads it."""
        self.arrives: dict[int, float] = {}
        """Address of a buffer -> when its copy is done."""

    def buffer(self, size: int) -> torch.Tensor:
        self.buffers.append(torch.zeros(size, dtype=torch.uint8))
        return self.buffers[-1]

    def copy(self, buffer: torch.Tensor, source: torch.Tensor, *after: float) -> float:
        start = max(self.copied, *after)
        assert start >= self.reading.get(buffer.data_ptr(), 0.0), "overwritten while it was read"
        self.copied = start + self.seconds
        self.arrives[buffer.data_ptr()] = self.copied
        self.copies.append(int(source[0]))
        buffer.copy_(source)
        return self.copied

    def computed(self) -> float:
        return self.now

    def wait(self, mark: float) -> None:
        self.now = max(self.now, mark)

    def finish(self, mark: float) -> None:
        """The host may wait."""

    def compute(self, seconds: float, buffer: torch.Tensor | None = None) -> None:
        if buffer is not None:
            assert self.now >= self.arrives[buffer.data_ptr()], "read before it had arrived"
            self.reading[buffer.data_ptr()] = self.now + seconds
        self.now += seconds


def block_of(tensor: torch.Tensor) -> HostBlock:
    """A block of one tensor, at home."""
    block, memory = HostBlock([Swappable(tensor, (({}, "tensor"),))]), torch.empty(ALIGNMENT, dtype=torch.uint8)
    block.take_from(memory)
    block.move_into(memory)
    return block


def host_blocks(count: int) -> list[HostBlock]:
    """Blocks of one tensor, which is the block's number."""
    return [block_of(torch.full((4 + number % 3,), number, dtype=torch.uint8)) for number in range(count)]


class Stage:
    """A stage whose swapped blocks share a ring, and what it has waited."""

    def __init__(self, blocks: int, swapped: Sequence[int], seconds: float, buffers: int, pieces: int = 1):
        self.clock = Clock(seconds)
        self.numbers = {block: number for number, block in enumerate(swapped)}
        each = blocks // pieces
        self.blocks = [range(piece * each, (piece + 1) * each) for piece in range(pieces)]
        ends = [sum(block < of_piece.stop for block in swapped) for of_piece in self.blocks]
        numbers = [range(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
        self.ring = Ring(host_blocks(len(swapped)), self.clock, buffers, numbers)

    def forward(self, piece: int = 0) -> None:
        with self.ring.forward_pass():
            for block in self.blocks[piece]:
                self._compute(block, 1.0)
                if block in self.numbers:
                    self.ring.release(self.numbers[block])

    def backward(self, piece: int = 0) -> None:
        for block in reversed(self.blocks[piece]):
            self._compute(block, BACKWARD)

    def run(self, turns: Sequence[Turn]) -> None:
        """These passes, each of which is followed by the next one."""
        for turn, following in zip(turns, [*turns[1:], None], strict=True):
            self.ring.following = following
            (self.forward if turn.forward else self.backward)(turn.piece)

    def _compute(self, block: int, seconds: float) -> None:
        number = self.numbers.get(block)
        if number is None:
            self.clock.compute(seconds)
            return
        memory = self.ring.require(number).memory
        assert memory[0] == number
        assert self.ring.require(number).memory is memory, "it stays until another is required"
        self.clock.compute(seconds, memory)


def least_seconds(blocks: int, swapped: Sequence[int], seconds: float, buffers: int) -> float:
    """The time of a forward and a backward pass that begins and ends with the first blocks in the ring, if all copies
    are made one after the other and computation only waits for those: the larger of computation and copies between any
    two swapped blocks of which neither is there from the start."""
    total = 0.0
    for factor in (1.0, BACKWARD):
        gaps = [factor * (late - early) for early, late in zip(swapped, swapped[1:], strict=False)]
        # The last blocks of a pass are the first of the next.
        copied = len(gaps) + 1 - buffers
        waited = sorted(max(seconds - gap, 0.0) for gap in gaps)
        total += factor * blocks + sum(waited[len(waited) - copied :] if copied > 0 else [])
    return total


@pytest.mark.parametrize("buffers", [2, 3])
@pytest.mark.parametrize("seconds", [0.1, 1.0, 1.5, 3.0, 10.0])
@pytest.mark.parametrize(("blocks", "count"), [(12, 12), (13, 7), (25, 7), (8, 2), (5, 1)])
def test_computation_waits_no_longer_than_copies_take(blocks: int, count: int, seconds: float, buffers: int) -> None:
    swapped = spread(count, blocks)
    stage = Stage(blocks, swapped, seconds, buffers)
    stage.forward()
    stage.backward()
    start = stage.clock.now
    for _ in range(3):
        stage.forward()
        stage.backward()
    spent = (stage.clock.now - start) / 3
    assert spent <= least_seconds(blocks, swapped, seconds, min(buffers, count)) + 1e-6
    assert spent >= blocks * (1 + BACKWARD)


def test_each_block_comes_once_a_pass_and_what_is_there_is_kept() -> None:
    stage = Stage(6, range(6), 1.0, 2)
    stage.forward()
    assert stage.clock.copies == [0, 1, 2, 3, 4, 5]
    stage.backward()
    # 5 and 4 are still there when the pass turns round, and 1 and 0 for the next one.
    assert stage.clock.copies[6:] == [3, 2, 1, 0]
    stage.forward()
    assert stage.clock.copies[10:] == [2, 3, 4, 5]
    assert len(stage.clock.buffers) == 2


def test_evaluation_begins_again_with_the_first_block() -> None:
    stage = Stage(5, range(5), 1.0, 2)
    with torch.no_grad():
        stage.forward()
        stage.forward()
    assert stage.clock.copies == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_an_unexpected_order_costs_time_alone() -> None:
    stage = Stage(7, range(7), 1.0, 3)
    order = torch.randint(0, 7, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for index, block in enumerate(order):
        if index % 3:
            with stage.ring.forward_pass():
                stage._compute(block, 1.0)
                stage.ring.release(block)
        stage._compute(block, 1.0)


def test_what_a_step_has_written_is_not_brought_before() -> None:
    stage = Stage(4, range(4), 0.1, 2)
    stage.forward()
    stage.backward()
    stage.ring.settle()
    stage.clock.compute(100.0)
    stepped = stage.clock.now
    stage.forward()
    assert stage.clock.copies[-4:] == [0, 1, 2, 3] and stage.clock.copied >= stepped + 4 * 0.1
    assert stage.clock.now >= stepped + 0.1 + 4


def test_several_micro_batches_may_be_under_way() -> None:
    """As on the first of several stages."""
    stage = Stage(6, range(6), 1.0, 2)
    for name in "FFFBFBFBBB":
        (stage.forward if name == "F" else stage.backward)()
    # Only passes of the same direction one after the other are not foreseen.
    assert len(stage.clock.copies) == 6 + 9 * 4 + 4 * 2


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_passes_of_a_schedule_are_foreseen(stage: int, pieces: int) -> None:
    """Whatever pass comes next, the block with which it begins is there, or on its way."""
    turns = list(turns_of(schedule_of(Layout(3, pieces, 6), stage)))
    assert len(turns) == 2 * pieces * 6
    one = Stage(4 * pieces, range(4 * pieces), 0.5, 2, pieces)
    one.run(turns)
    busy = pieces * 6 * 4 * (1 + BACKWARD)
    assert one.clock.now == busy + 0.5, "only the first block is waited for"


def test_a_block_that_was_overwritten_can_be_read_at_home() -> None:
    tensors = [torch.full((4,), number, dtype=torch.uint8) for number in range(3)]
    ring = Ring([block_of(tensor) for tensor in tensors], Clock(1.0))
    for number in (0, 1, 2):
        ring.require(number)
        assert all((tensor == value).all() for value, tensor in enumerate(tensors))
    assert [ring.slot_of(tensor) is not None for tensor in tensors].count(True) == 2
