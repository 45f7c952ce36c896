"""What the processes of a run do together."""

from __future__ import annotations

import pytest

from tests.processes import run_ranks
from utils.ranks import LaunchError, Ranks, any_rank, connect, largest


def agreed(ranks: Ranks) -> tuple[list[float], list[bool], str]:
    """Job of a rank: what all agree on, and what one is told that comes where there is one of its number already, as
    the second process of another run does whose main process has not got the port."""
    told = ""
    if not ranks.is_main:
        with pytest.raises(LaunchError) as error:
            connect(ranks)
        told = str(error.value)
    return largest([1.5, -ranks.rank, 1e10 + ranks.rank]), any_rank([False, ranks.rank == 1, True]), told


def test_ranks_agree_and_let_no_other_run_in() -> None:
    (*agreement, nothing), (*same, told) = run_ranks(agreed, 2)
    assert agreement == same == [[1.5, 0.0, 1e10 + 1], [False, True, True]]
    assert not nothing and "is taken, perhaps by another run" in told
    assert largest([3.0]) == [3.0] and any_rank([False, True]) == [False, True]
