"""Types of the values in JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from utils.errors import UserError
from utils.json_files import described, is_of, parsed_json, read_json

OF = [
    (int, [0, -3], [True, 1.0, "1", None, [1]]),
    (float, [0, 1.5], [False, "1.5", None]),
    (str, ["", "a"], [1, None]),
    (bool, [True], [1, "true", None]),
    (int | None, [1, None], [1.5, "x"]),
    (Annotated[int, 1], [1, 9], [0, True, "2"]),
    (tuple[int, int], [[1, 2]], [[1], [1, 2, 3], [1, "2"], 1]),
    (tuple[int, ...], [[], [1], [1, 2]], [["1"], {}]),
    (tuple[int], [[1, 2]], [[None]]),
    (list, [[], ["a", 1]], ["a", None]),
    (dict[str, float], [{}, {"a": 1}], [{"a": "1"}, []]),
    (Literal["a", 2], ["a", 2], ["b", []]),
    (Any, [None, 1, []], []),
]


@pytest.mark.parametrize("kind, fitting, others", OF, ids=[described(kind) for kind, _, _ in OF])
def test_types(kind: Any, fitting: list[Any], others: list[Any]) -> None:
    assert [value for value in fitting if not is_of(value, kind)] == []
    assert [value for value in others if is_of(value, kind)] == []


def test_all_wrong_values_are_told_with_what_is_meant(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"layers": "19", "axes": [1, 2], "name": "x", "further": []}')
    kinds = {"layers": Annotated[int, 1], "axes": tuple[int, int, int], "name": str, "missing": int}
    with pytest.raises(UserError) as raised:
        read_json(file, "make it anew", kinds)
    assert str(raised.value).splitlines() == [
        "2 problems",
        "",
        str(file),
        '  `layers` is "19", and a whole number of at least 1 is meant; make it anew',
        "  `axes` is [1, 2], and a list (3 of them: a whole number) is meant; make it anew",
    ]


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"", b"{]"])
def test_what_is_no_json_is_one_kind_of_error(content: bytes) -> None:
    with pytest.raises(ValueError):
        parsed_json(content)
