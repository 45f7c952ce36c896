"""Where garbage is not collected."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from utils.collector import without_collector


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_in_it_nor_looked_through_after_it() -> None:
    frozen = gc.get_freeze_count()
    with without_collector():
        assert not gc.isenabled()
        with without_collector():
            pass
        # The inner one ends before the outer.
        # What is frozen may go away by itself.
        assert not gc.isenabled() and gc.get_freeze_count() <= frozen
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(made)


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(ValueError, match="one"), without_collector():
        raise ValueError("one")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with without_collector():
        pass
    assert not gc.isenabled()
