"""Keys of other trainers: what each means here. For users who come with another trainer's config.

What only diffusion-pipe has stands in `diffusion_pipe`, table by table; what kohya's scripts, musubi-tuner,
SimpleTuner, OneTrainer and DiffSynth-Studio have, in `kohya_and_others`, wherever it is written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Keys = Mapping[str, Any]


def _never(value: Any) -> bool:
    return False


@dataclass(frozen=True)
class Foreign:
    """A key that only other trainers have.

    Attributes:
        advice: what to do about it, as in "write instead: `max_steps`".
        keys: its value -> keys of the same table that say the same; None if there are none.
        harmless: its value -> whether nothing is lost by leaving the key out; then it is passed over, with a warning.
        why_harmless: what the warning says, if it is not the advice.
    """

    advice: str
    keys: Callable[[Any], Keys] | None = None
    harmless: Callable[[Any], bool] = _never
    why_harmless: str = ""

    @property
    def may_be_harmless(self) -> bool:
        """Whether there is a value with which it is."""
        return self.harmless is not _never

    @property
    def warning(self) -> str:
        """What to tell where it is harmless."""
        return f"not used: {self.why_harmless}" if self.why_harmless else f"not used; {self.advice}"


def write(what: str, *, unless: tuple[Any, ...] = (), since: str = "it changes nothing with this value") -> Foreign:
    """A key in whose place `what` is to be written; with a value in `unless` there is nothing to write, `since` ..."""
    advice = f"write instead: {what}"
    if not unless:
        return Foreign(advice)
    return Foreign(advice, harmless=lambda value: _is_one_of(value, unless), why_harmless=since)


def leave_out(why: str, *, only: tuple[Any, ...] | None = None) -> Foreign:
    """A key for which there is nothing to write; with a value beside `only` it asks for what there is not."""
    if only is None:
        return Foreign(f"leave it out: {why}", harmless=lambda value: True, why_harmless=why)
    return Foreign(f"leave it out: {why}", harmless=lambda value: _is_one_of(value, only))


def read_as(key: str, value_of: Callable[[Any], Any] = lambda value: value) -> Foreign:
    """A key that means `key`, whose value is `value_of` its own."""
    return Foreign(f"write instead: `{key}`", lambda value: {key: value_of(value)})


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    # To Python true is 1, and to a user it is not.
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


@dataclass(frozen=True)
class ForeignType:
    """A `type` of another trainer.

    Attributes:
        means: the type here that does the same; "" if there is none.
        note: why it does the same, or what to take.
    """

    means: str
    note: str
