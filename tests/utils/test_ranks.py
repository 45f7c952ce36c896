"""What the processes of a run do together."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest

from tests.processes import run_ranks
from utils.ranks import LaunchError, Ranks, any_rank, barrier, by_first, connect, largest


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


def first(ranks: Ranks) -> tuple[list[int], list[str], str | None]:
    """Job of a rank: which ranks had to work, what two of three got, and what who waits in vain gets."""
    worked: list[int] = []

    def work() -> str:
        worked.append(ranks.rank)
        time.sleep(0.2)
        return f"made by {ranks.rank}"

    # The main rank does not come.
    made = [by_first(ranks, "both", work)] if ranks.rank else []
    barrier()
    if ranks.rank == 1:
        by_first(ranks, "slow", lambda: time.sleep(1))
    in_vain = by_first(ranks, "slow", lambda: "never", timedelta(seconds=0.1)) if ranks.rank == 2 else None
    return worked, made, in_vain


def test_what_one_makes_others_get() -> None:
    found = run_ranks(first, 3)
    (worker,) = [rank for worked, *_ in found for rank in worked]
    assert [made for _, made, _ in found] == [[], *[[f"made by {worker}"]] * 2]
    assert by_first(Ranks(), "alone", lambda: "mine") == "mine"
