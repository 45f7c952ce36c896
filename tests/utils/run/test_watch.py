"""A rank that fails, dies or hangs ends the others, which say which, where and why."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable
from unittest.mock import patch

import pytest

from tests.processes import run_ranks
from utils.ranks import Ranks
from utils.run.watch import Watch, Work

STAGES, BEAT, GRACE, HANGING = 2, 0.05, 0.2, 1.0
Behaviour = Callable[[Watch], None]


def dies(watch: Watch) -> None:
    time.sleep(3 * BEAT)
    os._exit(9)


def fails(watch: Watch) -> None:
    watch.failed(RuntimeError("no\nroom"))


def leaves(watch: Watch) -> None:
    watch.close()


def ended(ranks: Ranks, at_fault: int, behaviour: Behaviour) -> tuple[str, int | None]:
    """What a rank that waits in vain writes, and the exit code with which it ends; None if it does not."""
    released, codes, said = threading.Event(), [], io.StringIO()

    def end(code: int) -> None:
        codes.append(code)
        released.set()

    watch = Watch(end=end, beat=BEAT, grace=GRACE)
    with patch.object(sys, "stderr", said):
        ranks = ranks.with_stages(STAGES)
        watch.begin(ranks, HANGING / 60)
        if ranks.rank == at_fault:
            watch.at(Work("step 7, waiting for its data", lambda: [f"{letter}.png" for letter in "abcdefghijk"]))
            behaviour(watch)
        released.wait(1.0 if behaviour is leaves else 20)
    return said.getvalue(), codes[0] if codes else None


def hang_first(ranks: Ranks) -> tuple[str, int | None]:
    """Rank 3 stands still in its step, the others somewhat later."""
    released, codes, said = threading.Event(), [], io.StringIO()
    watch = Watch(end=lambda code: (codes.append(code), released.set()), beat=BEAT, grace=GRACE)
    with patch.object(sys, "stderr", said):
        watch.begin(ranks.with_stages(STAGES), HANGING / 60)
        began, stands_after = time.monotonic(), 0.0 if ranks.rank == 3 else 0.5
        progress = lambda: min(time.monotonic() - began, stands_after)  # noqa: E731
        watch.at(Work("step 7", lambda: ["a.png"], progress))
        released.wait(20)
    return said.getvalue(), codes[0] if codes else None


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (dies, "its process has ended without a word: killed, perhaps by the system for the memory that it took"),
        (fails, "RuntimeError: no room"),
    ],
)
def test_a_rank_that_is_lost_ends_the_others(behaviour: Behaviour, reason: str) -> None:
    lost = [3] if behaviour is dies else []
    results = run_ranks(ended, 4, 3, behaviour, lost=lost)
    (said, code), *others = results[:3]
    assert code == 1 and [code for _, code in others] == [1, 1]
    assert said.startswith(
        f"\nerror: rank 3 (stage 1, data rank 1): {reason}. It was at: step 7, waiting for its data "
        "(a.png, b.png, c.png, d.png, e.png, f.png, g.png, h.png, ...)\n"
    )
    assert "--resume_from_checkpoint goes on from the newest checkpoint" in said
    assert [text for text, _ in others] == ["", ""]


def test_the_main_rank_itself_may_die() -> None:
    (said, code), *others = run_ranks(ended, 4, 0, dies, lost=[0])[1:]
    assert code == 1 and others == [("", 1), ("", 1)]
    assert "error: rank 0, at whose store the ranks meet, is gone. It was at: step 7, waiting" in said


def test_a_rank_that_hangs_is_told_with_its_call() -> None:
    (said, code), *others = run_ranks(hang_first, 4)
    assert [code, *(code for _, code in others)] == [1, 1, 1, 1]
    first, table = said.splitlines()[1], said.splitlines()[2:6]
    assert "rank 3 (stage 1, data rank 1) stands longest. It was at: step 7 (a.png)" in first
    assert table[0].startswith("  rank 3 ") and " in test_watch.py:" in table[0] and "hang_first" in table[0]


def test_a_rank_that_has_done_its_work_ends_nobody() -> None:
    assert run_ranks(ended, 2, 1, leaves) == [("", None), ("", None)]


def test_who_leaves_in_time_is_not_ended() -> None:
    """An error that all ranks meet: each tells it and leaves by itself."""
    assert run_ranks(all_fail, 2) == [None, None]


def all_fail(ranks: Ranks) -> int | None:
    codes: list[int] = []
    watch = Watch(end=codes.append, beat=BEAT, grace=1.0)
    watch.begin(ranks, HANGING)
    watch.failed(ValueError("the same"))
    time.sleep(3 * BEAT)
    watch.close()
    time.sleep(1.2)
    return codes[0] if codes else None
