"""One table of a file -> a settings value, or what is wrong with it, in the spelling that the user wrote."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from utils.errors import Problem, UserError
from utils.settings.choices import Choices
from utils.settings.keys import (
    GROUPS,
    NESTED,
    SECTIONS,
    SPELLINGS,
    known_keys,
    unknown_key,
    unknown_table,
    unknown_tables,
)
from utils.settings.plain import explain, given

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Reading(Generic[T]):
    """The result of reading a table. `value` lacks the keys in `broken`; if there are any, only rules may read it."""

    value: T
    problems: list[Problem] = field(default_factory=list)
    broken: frozenset[str] = frozenset()

    def sound(self) -> T:
        """The value, or a UserError with the problems."""
        if self.problems:
            raise UserError(self.problems)
        return self.value


@dataclass
class Table:
    """The keys of a table, and where each was written (table title and spelling), for messages."""

    file: str
    keys: dict[str, Any] = field(default_factory=dict)
    locations: dict[str, tuple[str, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    title: str = ""

    def add(self, key: str, value: Any, title: str, written: str) -> None:
        """Adds a key; a second value for it is a problem."""
        if key in self.keys:
            first = where(*self.locations[key])
            self.complain(where(title, written), f"is given twice: {first} is the same key; keep one of them")
        else:
            self.keys[key], self.locations[key] = value, (title, written)

    def locate(self, loc: tuple[str | int, ...]) -> str:
        """Words for one of pydantic's locations in this table."""
        if not loc:
            return self.title
        title, written = self.locations.get(str(loc[0]), (self.title, str(loc[0])))
        inner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc[1:])
        return where(title, written + inner)

    def entry_title(self, key: str) -> str:
        """The heading of an array of tables in this file."""
        title, written = self.locations[key]
        return f"[[{'.'.join(filter(None, (title.strip('[]'), written)))}]]"

    def complain(self, location: str, message: str) -> None:
        """Notes a problem at `location`."""
        self.problems.append(Problem(self.file, location, message))


def where(title: str, key: str) -> str:
    """Words for a key: `[optimizer] lr`, or key `epochs` at the top of a file."""
    return f"{title} {key}".rstrip() if title else f"key `{key}`"


def one_table(file: str, section: str, title: str, written: Mapping[str, Any]) -> Table:
    """A table as written, with second spellings replaced by the keys that they stand for."""
    table = Table(file, title=title)
    for key, value in written.items():
        table.add(SPELLINGS.get(section, {}).get(key, key), value, title, key)
    return table


def run_table(file: str, raw: Mapping[str, Any], choices: Choices) -> Table:
    """The run's own keys, from the top of the file and from the tables that only group them."""
    table = Table(file)
    unknown = unknown_tables(raw, choices)
    for key, meant in unknown.items():
        table.complain(f"[{key}]", unknown_table(meant))
    top = {key: value for key, value in raw.items() if key not in {*GROUPS, *SECTIONS, *unknown}}
    for title, keys in [("", top), *((f"[{group}]", raw[group]) for group in GROUPS if group in raw)]:
        if not isinstance(keys, dict):
            table.complain(title, no_table(title, keys))
            continue
        for key, value in keys.items():
            if key in SECTIONS:
                table.complain(where(title, key), f"no such key here; [{key}] is a table of its own")
            else:
                table.add(key, value, title, key)
    return table


def no_table(title: str, value: Any) -> str:
    """What to tell of a value that is to be a table."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return f"is one table; write {title}, in single brackets"
    return f"must be a table; given: {given(value)}"


def check(cls: type[T], table: Table, known: Iterable[str], choices: Choices) -> Reading[T]:
    """`table` as a `cls`, which has the `known` keys in all their spellings; in the classes of `choices` too an unknown
    one is looked for."""
    try:
        return Reading(cls.model_validate(table.keys), table.problems)
    except ValidationError as error:
        errors = error.errors()
    problems = [*table.problems]
    for error in errors:
        loc = error["loc"]
        if error["type"] == "extra_forbidden":
            nested = str(loc[0])
            here = known_keys(nested, NESTED[nested]) if len(loc) > 1 else known
            message = unknown_key(str(loc[-1]), here, choices)
        elif error["type"] == "list_type" and isinstance(error["input"], dict):
            message = f"may have several entries; write {table.entry_title(str(loc[0]))}, in double brackets"
        else:
            message = explain(error)
        problems.append(Problem(table.file, table.locate(loc), message))
    broken = frozenset(str(error["loc"][0]) for error in errors if error["loc"])
    return Reading(_partial(cls, table.keys, broken), problems, broken)


def _partial(cls: type[T], keys: Mapping[str, Any], broken: frozenset[str]) -> T:
    """A `cls` of the sound keys alone, not validated as a whole."""
    sound = {
        name: TypeAdapter(Annotated[info.annotation, info]).validate_python(keys[name])
        for name, info in cls.model_fields.items()
        if name in keys and name not in broken
    }
    return cls.model_construct(**sound)
