"""Interleaved 1F1B: a schedule in which every stage has several pieces of the model.

Of p stages with v pieces each, stage s has the pieces s, p + s, 2 p + s, ...: a micro-batch goes round the stages v
times, and the others wait for a piece where they would wait for a stage. Of m micro-batches a stage idles for
(p - 1) / (v m + p - 1) of a step instead of (p - 1) / (m + p - 1). The order of passes is that of Narayanan et al.
2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", section 2.2, for any number of
micro-batches: they are dealt into groups as equal as possible, of one micro-batch for each stage or a few more, that go
through a piece one after the other.

Two stages may have messages for each other in both directions at once. Over NCCL these follow one another, so both must
ask for them in one order, or each would wait for the other. It is that in which they are sent where every pass takes
its time exactly. A message is received as late as this order and its use allow, since passes do not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

FORWARD_TIME, BACKWARD_TIME = 1, 2
InFlight = tuple[int, tuple[int, ...]]
"""Of a backward pass: its piece of the stage, and how many micro-batches have gone forward through each of the stage's
pieces, and not back."""


class Pass(NamedTuple):
    """That of a micro-batch through a piece of the stage."""

    forward: bool
    piece: int
    micro_batch: int


class Layout(NamedTuple):
    """What a schedule follows from.

    Attributes:
        pieces: of each stage.
        trains: whether micro-batches go back, too.
    """

    stages: int
    pieces: int
    micro_batches: int
    trains: bool = True


class Timed(NamedTuple):
    """A pass, and its time where each takes `FORWARD_TIME` or `BACKWARD_TIME`."""

    one: Pass
    start: int
    end: int


class Message(NamedTuple):
    """What a pass sends to the stage that goes on with it. Messages between two stages follow one another in the order
    of these tuples.

    Attributes:
        sent_at: when the pass is over.
        of: the pass that goes on with it.
    """

    sent_at: int
    sender: int
    receiver: int
    of: Pass


class Step(NamedTuple):
    """A pass with its messages.

    Attributes:
        before: what is received for it, and what has its turn before that.
        after: what is received before its own message is sent, since it has its turn before.
        sent: None if the micro-batch is at its end.
        under_way: how many messages to the same stage may still be so when it is sent. The others are received by
            then, whatever this stage does.
    """

    one: Pass
    before: Sequence[Message] = ()
    after: Sequence[Message] = ()
    sent: Message | None = None
    under_way: int = 0


def groups(layout: Layout) -> list[int]:
    """How many micro-batches go through a piece one after the other, in each group of them."""
    count = max(1, layout.micro_batches // layout.stages)
    size, larger = divmod(layout.micro_batches, count)
    return [size + (number < larger) for number in range(count)]


def passes(layout: Layout, stage: int) -> list[Pass]:
    """Those of one stage in their order: forward passes until the first micro-batch is back, then one of each kind in
    turn, then the backward passes that are left."""
    forward, backward, first = [], [], 0
    for size in groups(layout):
        micro_batches, pieces = range(first, first + size), range(layout.pieces)
        forward += [Pass(True, piece, number) for piece in pieces for number in micro_batches]
        backward += [Pass(False, piece, number) for piece in reversed(pieces) for number in micro_batches]
        first += size
    if not layout.trains:
        return forward
    ahead = min(len(forward), (layout.pieces - 1) * groups(layout)[0] + 2 * (layout.stages - 1 - stage))
    in_turn = [one for both in zip(forward[ahead:], backward, strict=False) for one in both]
    return [*forward[:ahead], *in_turn, *backward[len(forward) - ahead :]]


def in_flight(layout: Layout, stage: int) -> set[InFlight]:
    """What there is at the backward passes of a stage."""
    counts, found = [0] * layout.pieces, set()
    for one in passes(layout, stage):
        if not one.forward:
            found.add((one.piece, tuple(counts)))
        counts[one.piece] += 1 if one.forward else -1
    return found


def next_pass(layout: Layout, stage: int, one: Pass) -> tuple[int, Pass] | None:
    """The stage and the pass that go on with a micro-batch after this pass of this stage, in the same direction."""
    piece = stage + one.piece * layout.stages + (1 if one.forward else -1)
    if not 0 <= piece < layout.stages * layout.pieces:
        return None
    return piece % layout.stages, Pass(one.forward, piece // layout.stages, one.micro_batch)


def timeline(layout: Layout) -> list[list[Timed]]:
    """The passes of every stage."""
    waiting = [deque(passes(layout, stage)) for stage in range(layout.stages)]
    timed: list[list[Timed]] = [[] for _ in waiting]
    # A micro-batch turns round at the last piece.
    ready = {(0, Pass(True, 0, number)): 0 for number in range(layout.micro_batches)}
    while any(waiting):
        stage = next(stage for stage, left in enumerate(waiting) if left and (stage, left[0]) in ready)
        one = waiting[stage].popleft()
        start = max(ready[stage, one], timed[stage][-1].end if timed[stage] else 0)
        end = start + (FORWARD_TIME if one.forward else BACKWARD_TIME)
        timed[stage].append(Timed(one, start, end))
        ready[next_pass(layout, stage, one) or (stage, one._replace(forward=False))] = end
    return timed


@lru_cache
def waiting_share(layout: Layout) -> float:
    """For how much longer a step takes than a stage is busy in it, as a part of that, if all pieces are alike."""
    end = max(of_stage[-1].end for of_stage in timeline(layout))
    busy = layout.pieces * layout.micro_batches * (FORWARD_TIME + BACKWARD_TIME)
    return end / busy - 1


class _OneWay:
    """The messages from one stage to another.

    Attributes:
        waiting: those that are not received yet, in their order.
        times: when each of the others is, at the latest.
    """

    def __init__(self) -> None:
        self.waiting: deque[Message] = deque()
        self.times: list[int] = []

    def received(self, last: Message, time: int) -> list[Message]:
        """Receives what has its turn until that of `last`, which may go the other way."""
        found = []
        while self.waiting and self.waiting[0] <= last:
            found.append(self.waiting.popleft())
            self.times.append(time)
        return found


def steps_of_all(layout: Layout) -> list[list[Step]]:
    """What every stage does, in order."""
    times = timeline(layout)
    sent = {
        (stage, one): Message(end, stage, *following)
        for stage, of_stage in enumerate(times)
        for one, _, end in of_stage
        if (following := next_pass(layout, stage, one))
    }
    needed = {(message.receiver, message.of): message for message in sent.values()}
    ways: dict[tuple[int, int], _OneWay] = defaultdict(_OneWay)
    for message in sorted(sent.values()):
        ways[message.sender, message.receiver].waiting.append(message)
    steps: list[list[Step]] = [[] for _ in times]
    for stage, of_stage in enumerate(times):
        for one, start, end in of_stage:
            wanted, own = needed.get((stage, one)), sent.get((stage, one))
            before = ways[wanted.sender, stage].received(wanted, start) if wanted else []
            after = ways[own.receiver, stage].received(own, end) if own else []
            steps[stage].append(Step(one, before, after, own))
    return [list(_with_under_way(of_stage, ways)) for of_stage in steps]


def _with_under_way(steps: Sequence[Step], ways: Mapping[tuple[int, int], _OneWay]) -> Iterator[Step]:
    sent_before: Counter[int] = Counter()
    for step in steps:
        if (message := step.sent) is None:
            yield step
            continue
        number = sent_before[message.receiver]
        sent_before[message.receiver] += 1
        received = bisect_left(ways[message.sender, message.receiver].times, message.sent_at, hi=number)
        yield step._replace(under_way=number - received)
