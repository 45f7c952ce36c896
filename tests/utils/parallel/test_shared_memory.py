"""Memory that the processes of one machine share."""

from __future__ import annotations

from datetime import timedelta

from tests.processes import run_ranks
from utils.parallel.shared_memory import SharedMemory
from utils.ranks import Ranks, gather

SIZES = (3 * 4096 + 100, 7)


def share(ranks: Ranks, stages: int, readable: bool) -> dict[str, object]:
    """Job of a rank: pieces filled with the numbers 10 and 11 by the rank that fills them, and what is left of that
    after the last rank has written into its own first byte."""
    ranks = ranks.with_stages(stages)
    if not readable:
        SharedMemory._file_of = lambda *_: None
    memory = SharedMemory(ranks, "numbers", ranks.stage, len(SIZES) if ranks.stage == 0 else 0)
    pieces = [memory.add(size) for size in SIZES] if memory.shared else []
    for number, (_, piece) in enumerate(pieces):
        if piece is not None:
            piece.fill_(10 + number)
    whole = memory.complete(pinned=False)
    told: dict[str, object] = {"shared": memory.shared, "leads": memory.leads}
    told["writes"] = [piece.nbytes for _, piece in pieces if piece is not None]
    if whole is not None:
        told["before"] = [
            whole[start : start + size].unique().tolist() for (start, _), size in zip(pieces, SIZES, strict=True)
        ]
    gather(ranks, "seen", None, timedelta(seconds=60))
    if whole is not None and ranks.data_rank == ranks.data_ranks - 1:
        whole[0] = 7
    gather(ranks, "written", None, timedelta(seconds=60))
    return told if whole is None else {**told, "first": int(whole[0])}


NOTHING = {"shared": False, "leads": False, "writes": []}


def test_data_ranks_of_a_stage_see_the_same_memory() -> None:
    leader, other = run_ranks(share, 2, 1, True)
    assert leader["leads"] and leader["writes"] == list(SIZES)
    assert other["shared"] and not other["leads"] and other["writes"] == []
    assert leader["before"] == other["before"] == [[10], [11]]
    assert leader["first"] == other["first"] == 7


def test_stages_share_nothing() -> None:
    assert all(rank == NOTHING for rank in run_ranks(share, 2, 2, True))


def test_a_process_that_may_not_see_the_memory_has_its_own() -> None:
    leader, other = run_ranks(share, 2, 1, False)
    assert leader["leads"] and leader["writes"] == list(SIZES) and leader["first"] == 10
    assert other == NOTHING
