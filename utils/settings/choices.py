"""The tables of a run's file whose `type` chooses their class. The caller provides the classes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin

from pydantic import BaseModel

from utils.settings.values import SettingsTable

Classes = Mapping[str, type[SettingsTable]]


@dataclass(frozen=True)
class Choice:
    """What the `type` of a table may be.

    Attributes:
        find: type, as the user writes it -> the class of the table's keys; a ValueError names the known types.
        classes: all classes by type, if they cost nothing to look at: a key that stands in a wrong place is looked for
            in them.
        spelling: a type that `find` knows -> as it is spelled here; for classes whose `type` may be any text.
    """

    find: Callable[[str], type[SettingsTable]]
    classes: Classes = field(default_factory=dict)
    spelling: Callable[[str], str] = str


Choices = Mapping[str, Choice]
"""By table: "model", "adapter" and "optimizer", all of which the reader asks for."""


def type_of(cls: type[BaseModel]) -> str | None:
    """The one `type` that a class of keys is for; None where its `type` may be any text."""
    annotation = cls.model_fields["type"].annotation
    return get_args(annotation)[0] if get_origin(annotation) is Literal else None


def own_keys(cls: type[BaseModel], shared: type[BaseModel]) -> list[str]:
    """The keys of a class that are not as in the class whose keys all types share, without `type`: further ones, and
    those with another type, default or meaning."""

    def facts(owner: type[BaseModel], key: str) -> tuple[object, ...]:
        info = owner.model_fields[key]
        return info.annotation, info.default, info.description, tuple(map(repr, info.metadata))

    return [
        key
        for key in cls.model_fields
        if key != "type" and (key not in shared.model_fields or facts(cls, key) != facts(shared, key))
    ]
