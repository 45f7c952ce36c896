"""Tables of text: .csv, .json and .jsonl."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.dataset.sources.locators import Fault, Rejected, SourceProblem
from utils.dataset.sources.rows import TableRow

KEY = "name of the file"
"""The name of the column for the keys of a JSON object."""
_CAPTION = "caption"


@dataclass
class TextTable:
    """The rows of a table, the rows that cannot be read, and the column of the files if it is certain."""

    columns: list[str] = field(default_factory=list)
    rows: list[TableRow] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    media: str | None = None


def read_text_table(path: Path) -> TextTable:
    """A whole table.

    Rows are counted as an editor shows them: in a .csv the header is row 1, in a .jsonl each line is a row, and a list
    in a .json counts from 1.

    Raises:
        SourceProblem: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SourceProblem(f"{path} cannot be read ({error.strerror})") from None
    if b"\0" in content[:1024]:
        raise SourceProblem(f"{path} is not UTF-8 text; save it as UTF-8")
    # Bytes that are not UTF-8 become surrogates, which mark the affected rows.
    text = content.decode("utf-8-sig", errors="surrogateescape")
    table = TEXT_TABLES[path.suffix.lower()](path, text)
    if not table.rows and not table.rejected:
        raise SourceProblem(f"{path} has no rows")
    return table


def _csv(path: Path, text: str) -> TextTable:
    header, _, _ = text.partition("\n")
    delimiter = max(",;\t", key=header.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    table = TextTable()
    for number, line in enumerate(_lines(lines), start=1):
        location = f"{path} row {number}"
        if isinstance(line, csv.Error):
            fault = Fault("broken row", f"{line}; put cells with quotation marks in quotes, with each mark doubled")
            table.rejected.append(fault.at(location))
        elif not table.columns:
            table.columns = [name.strip() for name in line]
        elif len(line) > len(table.columns):
            counts = f"{len(line)} cells under a header of {len(table.columns)}"
            table.rejected.append(Fault("broken row", f"{counts}; put texts with {delimiter!r} in quotes").at(location))
        elif line:
            table.rows.append(TableRow(location, number, dict(zip(table.columns, line, strict=False))))
    return table


def _lines(reader: Iterator[list[str]]) -> Iterator[list[str] | csv.Error]:
    """The rows, and an error for each broken one; the reader continues behind it."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield error


def _jsonl(path: Path, text: str) -> TextTable:
    items: list[tuple[int, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                items.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                items.append((number, Fault("broken row", f"this line is not JSON ({error}); mend it")))
    return _objects(path, items)


def _json(path: Path, text: str) -> TextTable:
    try:
        content = json.loads(text, object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise SourceProblem(f"{path} is not JSON ({error}); mend it") from None
    if isinstance(content, list):
        return _objects(path, enumerate(content, start=1))
    if isinstance(content, _Object):
        return _by_file(path, content)
    raise SourceProblem(f"{path} must be a list of objects, or an object of captions by file")


class _Object(dict):
    """A JSON object that knows which of its keys appeared more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice: list[str] = []
        if len(self) < len(pairs):
            seen: set[str] = set()
            # `add` gives None.
            self.twice = [key for key, _ in pairs if key in seen or seen.add(key)]


def _objects(path: Path, items: Iterable[tuple[int, Any]]) -> TextTable:
    """Rows that are JSON objects."""
    table = TextTable()
    columns: dict[str, None] = {}
    for number, item in items:
        location = f"{path} row {number}"
        if isinstance(item, dict):
            columns.update(dict.fromkeys(item))
            table.rows.append(TableRow(location, number, item))
        else:
            fault = item if isinstance(item, Fault) else Fault("broken row", "is no object in { }; mend it")
            table.rejected.append(fault.at(location))
    table.columns = list(columns)
    return table


def _by_file(path: Path, content: _Object) -> TextTable:
    """Files as keys, and captions or whole objects as values."""
    table = TextTable(media=KEY)
    columns: dict[str, None] = {KEY: None}
    for number, (name, value) in enumerate(content.items(), start=1):
        cells = value if isinstance(value, dict) else {_CAPTION: value}
        columns.update(dict.fromkeys(cells))
        table.rows.append(TableRow(f"{path}: {name}", number, {**cells, KEY: name}))
    for name in content.twice:
        reason = "is there more than once; the last is used; a file may have several captions as a list"
        table.rejected.append(Fault("twice", reason).at(f"{path}: {name}"))
    table.columns = list(columns)
    return table


TEXT_TABLES: dict[str, Callable[[Path, str], TextTable]] = {".csv": _csv, ".json": _json, ".jsonl": _jsonl}
