"""One table of a file -> a settings value, or what is wrong with it, in the spelling that the user wrote."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from utils.errors import Problem, UserError
from utils.settings import diffusion_pipe
from utils.settings.choices import Choices
from utils.settings.keys import (
    GROUPS,
    NESTED,
    SECTIONS,
    SPELLINGS,
    foreign_key,
    known_keys,
    unknown_key,
    unknown_table,
    unknown_tables,
)
from utils.settings.plain import as_toml, explain, given

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Reading(Generic[T]):
    """The result of reading a table. `value` lacks the keys in `broken`; if there are any, only rules may read it.

    Attributes:
        remarks: what to warn of, where nothing is wrong.
        from_diffusion_pipe: whether it has keys or types that only diffusion-pipe has.
    """

    value: T
    problems: list[Problem] = field(default_factory=list)
    broken: frozenset[str] = frozenset()
    remarks: list[Problem] = field(default_factory=list)
    from_diffusion_pipe: bool = False

    def sound(self) -> T:
        """The value, or a UserError with the problems."""
        if self.problems:
            raise UserError(self.problems)
        return self.value


@dataclass
class Table:
    """The keys of a table, and where each was written (table title and spelling), for messages; see `Reading`.

    Attributes:
        place: which table it is: "run", "model", "dataset", ...
    """

    file: str
    place: str
    keys: dict[str, Any] = field(default_factory=dict)
    locations: dict[str, tuple[str, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    title: str = ""
    remarks: list[Problem] = field(default_factory=list)
    from_diffusion_pipe: bool = False

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

    def remark(self, location: str, message: str) -> None:
        """Notes what to warn of at `location`."""
        self.remarks.append(Problem(self.file, location, message))

    def take_notes_of(self, entry: "Table") -> None:
        """Notes what was found in a table within this one."""
        self.problems += entry.problems
        self.remarks += entry.remarks
        self.from_diffusion_pipe |= entry.from_diffusion_pipe


def where(title: str, key: str) -> str:
    """Words for a key: `[optimizer] lr`, or key `epochs` at the top of a file."""
    return f"{title} {key}".rstrip() if title else f"key `{key}`"


def one_table(file: str, section: str, title: str, written: Mapping[str, Any]) -> Table:
    """A table as written, with second spellings replaced by the keys that they stand for."""
    table = Table(file, section, title=title)
    for key, value in written.items():
        table.add(SPELLINGS.get(section, {}).get(key, key), value, title, key)
    return table


def run_table(file: str, raw: Mapping[str, Any], choices: Choices) -> Table:
    """The run's own keys, from the top of the file and from the tables that only group them."""
    table = Table(file, "run")
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


def adopt(table: Table, known: Collection[str]) -> None:
    """Replaces other trainers' keys by those `known` ones that say the same, and leaves out those that say nothing,
    with a remark on each; `check` refuses the others."""
    for key, value in [(key, value) for key, value in table.keys.items() if key not in known]:
        foreign = foreign_key(table.place, key)
        if foreign is None:
            continue
        table.from_diffusion_pipe |= key in diffusion_pipe.FOREIGN.get(table.place, {})
        location = table.locations[key]
        if foreign.harmless(value):
            del table.keys[key]
            table.remark(where(*location), foreign.warning)
        # A key that only some classes have is refused in the others, with the advice.
        elif foreign.keys is not None and (meant := foreign.keys(value)).keys() <= {*known}:
            del table.keys[key]
            for own, own_value in meant.items():
                table.add(own, own_value, *location)
            said = ", ".join(f"`{own} = {as_toml(own_value)}`" for own, own_value in meant.items())
            table.remark(where(*location), f"is read as {said}")


def no_table(title: str, value: Any) -> str:
    """What to tell of a value that is to be a table."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return f"is one table; write {title}, in single brackets"
    return f"must be a table; given: {given(value)}"


def check(cls: type[T], table: Table, known: Iterable[str], choices: Choices) -> Reading[T]:
    """`table` as a `cls`, which has the `known` keys in all their spellings; in the classes of `choices` too an unknown
    one is looked for."""
    try:
        value = cls.model_validate(table.keys)
        return Reading(value, table.problems, frozenset(), table.remarks, table.from_diffusion_pipe)
    except ValidationError as error:
        errors = error.errors()
    problems = [*table.problems]
    for error in errors:
        loc = error["loc"]
        if error["type"] == "extra_forbidden":
            nested = f"{table.place}.{loc[0]}" if f"{table.place}.{loc[0]}" in NESTED else str(loc[0])
            place, here = (nested, known_keys(nested, NESTED[nested])) if len(loc) > 1 else (table.place, known)
            message = unknown_key(str(loc[-1]), place, here, choices)
        elif error["type"] == "list_type" and isinstance(error["input"], dict):
            message = f"may have several entries; write {table.entry_title(str(loc[0]))}, in double brackets"
        else:
            message = explain(error)
        problems.append(Problem(table.file, table.locate(loc), message))
    broken = frozenset(str(error["loc"][0]) for error in errors if error["loc"])
    value = _partial(cls, table.keys, broken)
    return Reading(value, problems, broken, table.remarks, table.from_diffusion_pipe)


def _partial(cls: type[T], keys: Mapping[str, Any], broken: frozenset[str]) -> T:
    """A `cls` of the sound keys alone, not validated as a whole."""
    sound = {
        name: TypeAdapter(Annotated[info.annotation, info]).validate_python(keys[name])
        for name, info in cls.model_fields.items()
        if name in keys and name not in broken
    }
    return cls.model_construct(**sound)
