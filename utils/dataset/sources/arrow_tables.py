"""Parquet and Arrow tables, with the bytes of pictures in their cells or with the names of files.

An Arrow file is mapped into memory, and cells are copied from there. Parquet packs the cells of a row group together,
so a row group is unpacked as a whole, and the last few are kept because neighbouring rows are read in succession.
"""

from __future__ import annotations

import io
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from utils.dataset.sources.locators import SourceProblem

if TYPE_CHECKING:
    import pyarrow

_KEPT_BYTES = 2**28
_ROWS_AT_ONCE = 1024
_PART = re.compile(r"row (\d+), column (.*)", re.DOTALL)
_BYTES_FIELD = "bytes"


class Recent:
    """The pieces of tables that were read last, up to 256 MiB but at least one. Threads may share it."""

    def __init__(self) -> None:
        self._pieces: OrderedDict[Any, pyarrow.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process has none yet.
        return Recent, ()

    def get(self, key: Any, load: Callable[[], pyarrow.Table]) -> pyarrow.Table:
        # Loaded under the lock, since several threads want the same piece at once.
        with self._lock:
            if key in self._pieces:
                self._pieces.move_to_end(key)
            else:
                self._pieces[key] = load()
                while len(self._pieces) > 1 and sum(piece.nbytes for piece in self._pieces.values()) > _KEPT_BYTES:
                    self._pieces.popitem(last=False)
            return self._pieces[key]


class _Format(Protocol):
    """How a kind of table is read in pieces: row groups or record batches."""

    schema: pyarrow.Schema

    def pieces(self, columns: Sequence[str], first: int = 0) -> Iterator[pyarrow.Table]:
        """The pieces from number `first` on, with these columns only."""


class ArrowTable:
    """A table whose cells are read one by one.

    Attributes:
        held: the columns whose cells contain the bytes of files: binary, or a struct with a field `bytes`.
    """

    def __init__(self, path: Path, recent: Recent) -> None:
        """
        Raises:
            SourceProblem: it cannot be read, or pyarrow is not installed.
        """
        self.path = path
        self._recent = recent
        self._starts: list[int] = []
        try:
            self._format: _Format = _FORMATS[path.suffix.lower()](path)
        except ImportError:
            raise SourceProblem(f"{path} is read with pyarrow, which is not installed: pip install pyarrow") from None
        except (OSError, ValueError) as error:
            raise SourceProblem(f"{path} cannot be read ({error}); bring it anew") from None
        self.columns: list[str] = self._format.schema.names
        self.held = frozenset(field.name for field in self._format.schema if _holds_bytes(field.type))

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrowTable, (self.path, self._recent), {"_starts": self._starts}

    def rows(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """The cells of each row in these columns.

        Raises:
            SourceProblem: the table is damaged.
        """
        self._starts, start = [], 0
        try:
            for piece in self._format.pieces(columns):
                self._starts.append(start)
                start += piece.num_rows
                if not columns:
                    yield from ({} for _ in range(piece.num_rows))
                    continue
                for offset in range(0, piece.num_rows, _ROWS_AT_ONCE):
                    yield from _cells(piece.slice(offset, _ROWS_AT_ONCE), columns)
        except (OSError, ValueError) as error:
            raise SourceProblem(f"{self.path} cannot be read behind row {start} ({error}); bring it anew") from None

    @staticmethod
    def part(number: int, column: str) -> str:
        """The name of a cell, with rows counted from 1, as `open` takes it after `rows` has passed the row."""
        return f"row {number}, column {column}"

    def open(self, part: str) -> BinaryIO:
        number, column = _PART.fullmatch(part).groups()
        row = int(number) - 1
        index = bisect_right(self._starts, row) - 1
        piece = self._recent.get((self.path, index, column), lambda: next(self._format.pieces([column], index)))
        cell = piece.column(column)[row - self._starts[index]].as_py()
        content = cell[_BYTES_FIELD] if isinstance(cell, dict) else cell
        if content is None:
            raise ValueError("the cell is empty")
        return io.BytesIO(content)


class _Parquet:
    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        self._open = lambda: pyarrow.parquet.ParquetFile(path)
        with self._open() as file:
            self.schema = file.schema_arrow

    def pieces(self, columns: Sequence[str], first: int = 0) -> Iterator[pyarrow.Table]:
        with self._open() as file:
            for index in range(first, file.num_row_groups):
                yield file.read_row_group(index, columns=list(columns))


class _Arrow:
    """Both kinds of Arrow files: with an index of their batches, and as a plain stream."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._pyarrow, self._path = pyarrow, path
        with path.open("rb") as file:
            self._has_index = file.read(6) == b"ARROW1"
        self.schema = self._reader(None).schema

    def _reader(self, fields: list[int] | None) -> Any:
        ipc = self._pyarrow.ipc
        # Other columns are neither read nor unpacked.
        options = ipc.IpcReadOptions(included_fields=fields)
        return (ipc.open_file if self._has_index else ipc.open_stream)(
            self._pyarrow.memory_map(str(self._path)), options=options
        )

    def pieces(self, columns: Sequence[str], first: int = 0) -> Iterator[pyarrow.Table]:
        # An empty list of fields would mean all of them.
        reader = self._reader([self.schema.get_field_index(name) for name in columns] or [0])
        if self._has_index:
            batches = (reader.get_batch(index) for index in range(first, reader.num_record_batches))
        else:
            batches = islice(reader, first, None)
        for batch in batches:
            for column in batch.columns:
                _validate(column)
            yield self._pyarrow.Table.from_batches([batch])


def _validate(column: pyarrow.Array) -> None:
    """Whether all places in a column that was mapped from a file are within it; to read others would end the process.
    Texts that are no UTF-8 are told where they are read.

    Raises:
        ValueError: they are not.
    """
    try:
        column.validate(full=True)
    except ValueError as error:
        if "UTF8" not in str(error):
            raise


_FORMATS: dict[str, Callable[[Path], _Format]] = {".parquet": _Parquet, ".arrow": _Arrow}
ARROW_SUFFIXES = frozenset(_FORMATS)


def _holds_bytes(type_: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(type_):
        index = type_.get_field_index(_BYTES_FIELD)
        return index >= 0 and _holds_bytes(type_.field(index).type)
    return types.is_binary(type_) or types.is_large_binary(type_) or types.is_binary_view(type_)


def _cells(piece: pyarrow.Table, columns: Sequence[str]) -> list[dict[str, Any]]:
    try:
        return piece.select(columns).to_pylist()
    except UnicodeDecodeError:
        values = [[_value(cell) for cell in piece.column(name)] for name in columns]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _value(cell: pyarrow.Scalar) -> Any:
    """A cell whose bytes may not be UTF-8, although the table says so."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        # A list of texts has no bytes of its own.
        return bytes(cell.as_buffer()) if hasattr(cell, "as_buffer") else [_value(one) for one in cell]
