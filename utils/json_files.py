"""JSON files written by programs, which a broken download or a full disk may have damaged, and the types of their
values."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from utils.errors import Problem, UserError

ANEW = "download it again"
SHOWN = 60
"""So many characters of a wrong value are shown."""


def read_json(path: Path, hint: str = ANEW, kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        hint: what the user should do if the file is damaged.
        kinds: types of values; see `check_types`.

    Raises:
        UserError: the file cannot be read, is not JSON, contains something other than an object, or a value is of
            another type.
    """
    try:
        content = parsed_json(path.read_bytes())
    except OSError as error:
        raise UserError.of(f"cannot be read ({error.strerror}); {hint}", str(path)) from error
    except ValueError as error:
        raise UserError.of(f"is not JSON ({error}); {hint}", str(path)) from error
    if not isinstance(content, dict):
        raise UserError.of(f"holds no JSON object; {hint}", str(path))
    check_types(content, kinds or {}, str(path), hint)
    return content


def parsed_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, no UTF-8, or has brackets in brackets without an end.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("too many brackets in one another") from None


def check_types(content: Mapping[str, Any], kinds: Mapping[str, Any], file: str, hint: str, where: str = "") -> None:
    """Whether those values of a JSON object that are there have these types.

    Args:
        kinds: key -> its type: `int`, `float` (which a whole number is, too), `str`, `bool`, `None`, a Literal, `list`,
            `tuple` or `dict` with what they hold, a union of these, or `Annotated[int, least]`; anything else is not
            looked at. Other keys are not looked at either.
        where: the place of the object in the file.

    Raises:
        UserError: names all that have another one, what they are, and what is meant.
    """
    wrong = [
        Problem(file, where, f"`{key}` is {shown(content[key])}, and {described(kind)} is meant; {hint}")
        for key, kind in kinds.items()
        if key in content and not is_of(content[key], kind)
    ]
    if wrong:
        raise UserError(wrong)


def require(content: Mapping[str, Any], keys: Iterable[str], file: str, hint: str = ANEW, where: str = "") -> None:
    """Whether a JSON object has these keys.

    Raises:
        UserError: names the first that it lacks.
    """
    if missing := [key for key in keys if key not in content]:
        raise UserError.of(f"lacks `{missing[0]}`; {hint}", file, where)


def shown(value: Any) -> str:
    """A value as a file has it, cut if it is long."""
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(is_of(value, one) for one in inner)
    if origin is Annotated:
        return is_of(value, inner[0]) and value >= inner[1]
    if origin is Literal:
        return value in inner
    if kind in (None, type(None)):
        return value is None
    if kind in (list, tuple) or origin in (list, tuple):
        return isinstance(value, list | tuple) and _are_of(value, inner)
    if kind is dict or origin is dict:
        return isinstance(value, dict) and all(is_of(one, inner[1]) for one in value.values() if inner)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return not (kind in (str, bool) and not isinstance(value, kind))


def _are_of(values: Sequence[Any], kinds: Sequence[Any]) -> bool:
    kinds = [kind for kind in kinds if kind is not Ellipsis]
    # One type is that of any number of values: many write `tuple[int]` for `tuple[int, ...]`.
    if len(kinds) > 1 and len(values) != len(kinds):
        return False
    return all(is_of(value, kinds[min(number, len(kinds) - 1)]) for number, value in enumerate(values) if kinds)


def described(kind: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(kind), [one for one in get_args(kind) if one is not Ellipsis]
    words = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        dict: "an object",
        list: "a list",
        tuple: "a list",
        type(None): "null",
        None: "null",
    }
    if origin in (Union, types.UnionType):
        return " or ".join(map(described, inner))
    if origin is Annotated:
        return f"{described(inner[0])} of at least {inner[1]}"
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(one) for one in inner)
    if origin in (list, tuple) and inner:
        of = described(inner[0])
        return f"a list ({len(inner)} of them: {of})" if len(inner) > 1 else f"a list (of them each: {of})"
    if origin is dict and inner:
        return f"an object (of them each: {described(inner[1])})"
    return words.get(origin or kind, "another value")
