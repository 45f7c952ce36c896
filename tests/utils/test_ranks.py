"""What the processes of a run do together."""

from __future__ import annotations

from tests.processes import run_ranks
from utils.ranks import Ranks, any_rank, largest


def agreed(ranks: Ranks) -> tuple[list[float], list[bool]]:
    """Job of a rank."""
    return largest([1.5, -ranks.rank, 1e10 + ranks.rank]), any_rank([False, ranks.rank == 1, True])


def test_ranks_agree() -> None:
    assert run_ranks(agreed, 2) == [([1.5, 0.0, 1e10 + 1], [False, True, True])] * 2
    assert largest([3.0]) == [3.0] and any_rank([False, True]) == [False, True]
