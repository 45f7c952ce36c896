"""What a rule about several keys of a run is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from utils.errors import Problem
from utils.settings.schema import Settings


@dataclass(frozen=True)
class SettingsRule:
    """A check, and the keys that it reads."""

    keys: tuple[str, ...]
    check: Callable[[Settings, int], Iterable[Problem]]


def at(place: str, message: str) -> Problem:
    """A problem of a run's file."""
    return Problem("", place, message)
