"""Pydantic's errors in plain language: what was given, and what is allowed."""

import re
from collections.abc import Mapping
from datetime import date, time
from typing import Any

# By pydantic's error type; filled with the error's own context.
_ALLOWED: Mapping[str, str] = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a text in quotes",
    "string_too_short": "must not be empty",
    "path_type": "must be a path in quotes",
    "list_type": "must be an array, as in [1, 2]",
    "dict_type": "must be a table, as in { t5 = 0.1 }",
    "tuple_type": "must be an array, as in [1, 2]",
    "model_type": "must be a table",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "needs {min_length} or more entries",
    "too_long": "takes at most {max_length} entries",
    "value_error": "{error}",
}
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "true or false"),
    (int, "a whole number"),
    (float, "a number"),
    (str, "a text"),
    ((list, tuple), "an array"),
    (dict, "a table"),
    ((date, time), "a date or time"),
)


def explain(error: Mapping[str, Any]) -> str:
    """The message for one entry of `ValidationError.errors()`."""
    if error["type"] == "missing":
        return "is required and not given"
    template = _ALLOWED.get(error["type"])
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        # Python's words for what TOML writes in small letters.
        context = {"expected": context["expected"].replace("True", "true").replace("False", "false")}
    allowed = template.format(**context) if template else error["msg"]
    # A check of a whole table names the keys itself.
    whole = error["type"] == "value_error" and isinstance(error["input"], dict)
    return allowed if whole else f"{allowed}; given: {given(error['input'])}"


def counted(where: str) -> str:
    """A place in a `[[directory]]`, which pydantic counts from 0, as a person counts: `[[directory]] 2 min_ar`."""

    def told(found: re.Match[str]) -> str:
        return f"[[directory]] {int(found[1]) + 1} {found[2]}".rstrip()

    return re.sub(r"key `directory\[(\d+)\]\.?([^`]*)`", told, where)


def as_toml(value: Any) -> str:
    """A value as it is written in a file."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {as_toml(entry)}' for key, entry in value.items())} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, str) else str(value)


def given(value: Any) -> str:
    """A value as the user wrote it, with its kind."""
    kind = next((kind for cls, kind in _KINDS if isinstance(value, cls)), "something else")
    if isinstance(value, bool):
        return str(value).lower()
    shown = f'"{value}"' if isinstance(value, str) else str(value)
    return f"{shown} ({kind})" if len(shown) <= 60 else kind
