"""Memory that the processes of one machine share."""

from __future__ import annotations

from datetime import timedelta

import torch

from tests.processes import run_ranks
from utils.parallel import shared_memory
from utils.parallel.shared_memory import shared_by_stage
from utils.ranks import Ranks, gather

SIZE = 3 * 4096 + 100


def share(ranks: Ranks, stages: int, readable: bool) -> dict[str, object]:
    """Job of a rank: memory filled with the number of the rank that filled it, and what is left of that after the last
    rank has written into its own first byte."""
    ranks = ranks.with_stages(stages)
    filled = []

    def fill(memory: torch.Tensor) -> None:
        filled.append(memory.nbytes)
        memory.fill_(ranks.rank)

    if not readable:
        shared_memory._memory_of = lambda *_: None
    given = shared_by_stage(ranks, SIZE if ranks.stage == 0 else 0, fill, pinned=False)
    if given is None:
        for tag in ("seen", "written"):
            gather(ranks, tag, None, timedelta(seconds=60))
        return {"shared": False, "filled": filled}
    memory, leads = given
    before = memory.unique().tolist()
    gather(ranks, "seen", None, timedelta(seconds=60))
    if ranks.data_rank == ranks.data_ranks - 1:
        memory[0] = 7
    gather(ranks, "written", None, timedelta(seconds=60))
    return {"shared": True, "leads": leads, "filled": filled, "before": before, "first": int(memory[0])}


def test_data_ranks_of_a_stage_see_the_same_memory() -> None:
    leader, other = run_ranks(share, 2, 1, True)
    assert (leader["leads"], leader["filled"]) == (True, [SIZE])
    assert (other["leads"], other["filled"]) == (False, [])
    assert leader["before"] == other["before"] == [0]
    assert leader["first"] == other["first"] == 7


def test_stages_share_nothing() -> None:
    assert all(rank == {"shared": False, "filled": []} for rank in run_ranks(share, 2, 2, True))


def test_a_process_that_may_not_see_the_memory_has_its_own() -> None:
    leader, other = run_ranks(share, 2, 1, False)
    assert leader["shared"] and leader["filled"] == [SIZE] and leader["first"] == 0
    assert other == {"shared": False, "filled": []}
