"""Classes that a `type` chooses, and what of their keys is their own."""

from typing import Literal

from utils.settings.choices import own_keys, type_of
from utils.settings.values import Count, SettingsTable


class Shared(SettingsTable):
    type: str
    """Which."""
    size: Count = 1
    """How large."""
    names: list[str] = []
    """Which ones."""


class Own(Shared):
    type: Literal["own"]
    """Which."""
    size: Count = 2
    """How large."""
    depth: Count
    """How deep."""


class Described(Shared):
    type: Literal["described"]
    """Which."""
    names: list[str] = []
    """Which ones, in another sense."""


class Narrow(Shared):
    type: Literal["narrow"]
    """Which."""
    size: Literal[1] = 1
    """How large."""


def test_a_type_is_that_of_the_literal() -> None:
    assert [type_of(cls) for cls in (Shared, Own, Narrow)] == [None, "own", "narrow"]


def test_own_keys_are_further_ones_and_those_that_are_otherwise() -> None:
    assert own_keys(Shared, Shared) == []
    assert own_keys(Own, Shared) == ["size", "depth"]
    assert own_keys(Described, Shared) == ["names"]
    assert own_keys(Narrow, Shared) == ["size"]
