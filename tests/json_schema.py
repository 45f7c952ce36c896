"""What a JSON schema says against a value, for the words of it that our schemas use; any other word is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: TYPES["number"](value) and value == int(value),
}
BOUNDS: Mapping[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}
SIZES: Mapping[str, Callable[[int, int], bool]] = {
    "minItems": lambda size, bound: size >= bound,
    "maxItems": lambda size, bound: size <= bound,
    "minLength": lambda size, bound: size >= bound,
}
SAY_NOTHING = {"$schema", "$defs", "title", "description", "default", "format", "examples"}


class Validator:
    """Finds what a schema has against a value."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = root

    def faults(self, value: Any) -> list[str]:
        """All faults, as "place: what"; none if the value is valid."""
        return list(self._faults(self.root, value, ""))

    def _faults(self, schema: Mapping[str, Any], value: Any, at: str) -> Iterator[str]:
        for word, said in schema.items():
            if word in SAY_NOTHING:
                continue
            check = getattr(self, f"_{word.removeprefix('$')}", None)
            if check is not None:
                yield from check(said, value, at, schema)
            elif word in BOUNDS:
                if TYPES["number"](value) and not BOUNDS[word](value, said):
                    yield f"{at}: {value} and {word} {said}"
            elif word in SIZES:
                if isinstance(value, list | str) and not SIZES[word](len(value), said):
                    yield f"{at}: {len(value)} and {word} {said}"
            else:
                raise NotImplementedError(word)

    def _type(self, said: str, value: Any, at: str, _: Any) -> Iterator[str]:
        if not TYPES[said](value):
            yield f"{at}: {value!r} is no {said}"

    def _const(self, said: Any, value: Any, at: str, _: Any) -> Iterator[str]:
        if value != said:
            yield f"{at}: {value!r} is not {said!r}"

    def _enum(self, said: list[Any], value: Any, at: str, _: Any) -> Iterator[str]:
        if value not in said:
            yield f"{at}: {value!r} is none of {said}"

    def _pattern(self, said: str, value: Any, at: str, _: Any) -> Iterator[str]:
        if isinstance(value, str) and not re.search(said, value):
            yield f"{at}: {value!r} does not match {said}"

    def _ref(self, said: str, value: Any, at: str, _: Any) -> Iterator[str]:
        yield from self._faults(self._target(said), value, at)

    def _anyOf(self, said: list[Any], value: Any, at: str, _: Any) -> Iterator[str]:  # noqa: N802
        found = [list(self._faults(option, value, at)) for option in said]
        if all(found):
            yield min(found, key=len)[0]

    def _allOf(self, said: list[Any], value: Any, at: str, _: Any) -> Iterator[str]:  # noqa: N802
        for part in said:
            yield from self._faults(part, value, at)

    def _not(self, said: Any, value: Any, at: str, _: Any) -> Iterator[str]:
        if not list(self._faults(said, value, at)):
            yield f"{at}: is {said}"

    def _required(self, said: list[str], value: Any, at: str, _: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (f"{at}: lacks {key}" for key in said if key not in value)

    def _properties(self, said: Mapping[str, Any], value: Any, at: str, _: Any) -> Iterator[str]:
        for key in said.keys() & value.keys() if isinstance(value, dict) else ():
            yield from self._faults(said[key], value[key], f"{at}/{key}")

    def _additionalProperties(self, said: Any, value: Any, at: str, schema: Any) -> Iterator[str]:  # noqa: N802
        others = value.keys() - schema.get("properties", {}).keys() if isinstance(value, dict) else ()
        for key in others:
            yield from [f"{at}: {key} is not known"] if said is False else self._faults(said, value[key], f"{at}/{key}")

    def _unevaluatedProperties(self, said: Any, value: Any, at: str, schema: Any) -> Iterator[str]:  # noqa: N802
        assert said is False
        known = {*schema.get("properties", {}), *self._target(schema["$ref"]).get("properties", {})}
        yield from (f"{at}: {key} is not known" for key in (value.keys() if isinstance(value, dict) else set()) - known)

    def _items(self, said: Any, value: Any, at: str, schema: Any) -> Iterator[str]:
        for number, entry in enumerate(value if isinstance(value, list) else ()):
            if number >= len(schema.get("prefixItems", ())):
                yield from self._faults(said, entry, f"{at}/{number}")

    def _prefixItems(self, said: list[Any], value: Any, at: str, _: Any) -> Iterator[str]:  # noqa: N802
        for number, entry in enumerate(value[: len(said)] if isinstance(value, list) else ()):
            yield from self._faults(said[number], entry, f"{at}/{number}")

    def _target(self, reference: str) -> Mapping[str, Any]:
        return self.root["$defs"][reference.removeprefix("#/$defs/")]
