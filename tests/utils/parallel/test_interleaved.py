"""The interleaved schedule: every pass is done once, no stage waits for ever, and all wait as little as can be."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import product
from typing import NamedTuple

import pytest
from deepspeed.runtime.pipe import schedule

from utils.parallel.interleaved import (
    BACKWARD_TIME,
    FORWARD_TIME,
    Layout,
    Message,
    Pass,
    Step,
    groups,
    in_flight,
    passes,
    steps_of_all,
    timeline,
)
from utils.parallel.schedules import schedule_of

LAYOUTS = [
    Layout(stages, pieces, micro_batches, trains)
    for stages, pieces, micro_batches, trains in product((2, 3, 4, 5), (2, 3), (1, 2, 3, 4, 5, 7, 8, 11), (True, False))
]


class Event(NamedTuple):
    """What a stage does at one time: a pass, or one side of a message."""

    kind: str
    message: Message | None = None
    under_way: int = 0


def events(steps: Sequence[Step]) -> Iterator[Event]:
    for step in steps:
        yield from (Event("receive", message) for message in step.before)
        yield Event("pass")
        yield from (Event("receive", message) for message in step.after)
        if step.sent:
            yield Event("send", step.sent, step.under_way)


def pair(message: Message) -> tuple[int, int]:
    return min(message.sender, message.receiver), max(message.sender, message.receiver)


class Rendezvous:
    """Messages of two processes that have one queue, as over NCCL: one arrives once both have asked for it, and all
    that either has asked for before it have arrived."""

    def __init__(self, stages: int):
        self.asked: dict[tuple[tuple[int, int], int], list[Message]] = defaultdict(list)
        self.sent: dict[tuple[int, int], list[Message]] = defaultdict(list)
        self.posted: list[Message | None] = [None] * stages

    def receives(self, stage: int, message: Message) -> bool:
        """Whether it arrives now."""
        if self.posted[stage] != message:
            self.posted[stage] = message
            self.asked[pair(message), stage].append(message)
        return self.has_arrived(message)

    def sends(self, stage: int, message: Message, under_way: int) -> bool:
        """Whether what is waited for before it is sent has arrived."""
        before = self.sent[stage, message.receiver]
        if not all(self.has_arrived(one) for one in before[: len(before) - under_way]):
            return False
        before.append(message)
        self.asked[pair(message), stage].append(message)
        return True

    def has_arrived(self, message: Message) -> bool:
        one, other = (self.asked[pair(message), stage] for stage in (message.sender, message.receiver))
        if message not in one or message not in other:
            return False
        assert one[: one.index(message)] == other[: other.index(message)], "asked for in two orders"
        return True


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_stage_waits_for_ever(layout: Layout) -> None:
    left, mail = [deque(events(steps)) for steps in steps_of_all(layout)], Rendezvous(layout.stages)
    moved = True
    while moved:
        moved = False
        for stage, of_stage in enumerate(left):
            while of_stage:
                kind, message, under_way = of_stage[0]
                asked = sum(map(len, mail.asked.values()))
                if kind == "receive" and not mail.receives(stage, message):
                    moved |= sum(map(len, mail.asked.values())) > asked
                    break
                if kind == "send" and not mail.sends(stage, message, under_way):
                    break
                of_stage.popleft()
                moved = True
    assert not any(left)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_pass_has_what_it_needs(layout: Layout) -> None:
    """Each is done once, in the order of micro-batches, and has received what the one before it has sent."""
    directions = (True, False) if layout.trains else (True,)
    wanted = set(product(directions, range(layout.pieces), range(layout.micro_batches)))
    last = layout.stages - 1, layout.pieces - 1
    for stage, steps in enumerate(steps_of_all(layout)):
        assert [step.one for step in steps] == passes(layout, stage)
        assert {tuple(step.one) for step in steps} == wanted and len(steps) == len(wanted)
        for forward, piece in product(directions, range(layout.pieces)):
            own = [one.micro_batch for one, *_ in steps if (one.forward, one.piece) == (forward, piece)]
            assert own == sorted(own), "gradients are added up in one order"
        received: set[Pass] = set()
        for step in steps:
            received |= {message.of for message in step.before}
            begins = (stage, step.one.piece) == ((0, 0) if step.one.forward else last)
            assert begins or step.one in received
            received |= {message.of for message in step.after}


@pytest.mark.parametrize(("stages", "pieces"), product((2, 3, 4, 8), (1, 2, 3, 4)))
def test_stages_idle_no_longer_than_they_must(stages: int, pieces: int) -> None:
    """(p - 1) / (v m + p - 1) of the time, for all numbers of micro-batches from that of the stages on."""
    for micro_batches in range(stages, 3 * stages + 2):
        end = max(of_stage[-1].end for of_stage in timeline(Layout(stages, pieces, micro_batches)))
        busy = pieces * micro_batches * (FORWARD_TIME + BACKWARD_TIME)
        assert 1 - Fraction(busy, end) == Fraction(stages - 1, pieces * micro_batches + stages - 1)


def test_micro_batches_are_dealt_into_groups_of_nearly_one_size() -> None:
    found = {count: groups(Layout(4, 2, count)) for count in (1, 3, 4, 7, 8, 9, 13)}
    assert found == {1: [1], 3: [3], 4: [4], 7: [7], 8: [4, 4], 9: [5, 4], 13: [5, 4, 4]}


def test_what_is_in_flight_at_a_backward_pass() -> None:
    # F0 F0 F1 F1, and back.
    layout = Layout(2, 2, 2)
    assert passes(layout, 1) == [
        Pass(True, 0, 0),
        Pass(True, 0, 1),
        Pass(True, 1, 0),
        Pass(False, 1, 0),
        Pass(True, 1, 1),
        Pass(False, 1, 1),
        Pass(False, 0, 0),
        Pass(False, 0, 1),
    ]
    assert in_flight(layout, 1) == {(1, (2, 1)), (0, (2, 0)), (0, (1, 0))}
    # Never more than the micro-batches of two groups and what is ahead of the other stages.
    layout = Layout(4, 2, 16)
    assert max(sum(counts) for _, counts in in_flight(layout, 0)) == 2 * 3 + 4 + 1


def test_instructions_say_what_is_done_with_which_micro_batch() -> None:
    steps = list(schedule_of(Layout(2, 2, 2), 0).steps())
    told = [[(type(one).__name__, *one.kwargs.values()) for one in step] for step in steps]
    assert told[0] == [("LoadMicroBatch", 0, 0), ("ForwardPass", 0, 0), ("SendActivation", 0, 0, 0)]
    # The second piece of the first micro-batch, in a place of its own.
    assert told[2] == [("RecvActivation", 2, 1), ("ForwardPass", 2, 1), ("SendActivation", 2, 1, 0)]
    assert [type(one) for one in steps[-1]] == [
        schedule.ReduceTiedGrads,
        schedule.ReduceGrads,
        schedule.OptimizerStep,
    ]
    assert isinstance(schedule_of(Layout(2, 1, 2), 0), schedule.TrainSchedule)
    assert isinstance(schedule_of(Layout(2, 1, 2, trains=False), 0), schedule.InferenceSchedule)
