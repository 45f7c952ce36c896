"""Turns the rows of a table into samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from utils.dataset.sources.columns import Columns
from utils.dataset.sources.filters import Filter
from utils.dataset.sources.folders import MEDIA_SUFFIXES, Beside, Tree, list_files
from utils.dataset.sources.locators import Entry, Fault, Kind, Listing, Locator, Rejected, SourceProblem
from utils.dataset.sources.names import ByName
from utils.dataset.sources.texts import captions_of, given_caption, is_given
from utils.settings.dataset_schema import DirectorySettings

_ROWS_BETWEEN_HEEDS = 1024


class TableRow(NamedTuple):
    """A row of a table: its location for messages, its number from 1 on, and its cells by column."""

    location: str
    number: int
    cells: Mapping[str, Any]


class FilesOf:
    """The files that a table names, relative to its folder. Each folder is listed once, however many files it has."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._folders: dict[str, _Folder] = {}
        self._named: set[str] = set()

    def find(self, name: Any) -> Locator:
        """The file of this name; the ending may be missing if only one picture or clip has the name.

        Raises:
            Fault: there is no such file.
        """
        if not isinstance(name, str) or not name.strip():
            raise Fault("no such file", "the row names no file; write its name")
        name = name.strip()
        for spelling in (name, name.replace("\\", "/")):
            folder, base = os.path.split(os.path.normpath(os.path.join(self._base, spelling)))
            if found := self._folder(folder).find(base):
                self._named.add(f"{folder}/{found}")
                return Locator(str(self._folders[folder].path / found))
        raise Fault("no such file", f"there is no file {name} in {self._base}; mend the row or bring the file")

    @property
    def names_any(self) -> bool:
        """Whether some row named a file that is there."""
        return bool(self._named)

    def has(self, name: Any) -> Locator | None:
        """The file of this name, if there is one; it does not count as named by a row."""
        before = set(self._named)
        try:
            return self.find(name)
        except Fault:
            return None
        finally:
            self._named = before

    def not_named(self, table: Path) -> Iterator[Rejected]:
        """The pictures and clips that no row names, in the table's folder and in other folders from which it names
        files."""
        self._folder(str(self._base))
        for path, folder in sorted(self._folders.items()):
            for name in folder.tree.names:
                if os.path.splitext(name)[1].lower() in MEDIA_SUFFIXES and f"{path}/{name}" not in self._named:
                    yield Rejected(f"{path}/{name}", "not listed", f"{table.name} does not name this file")

    def _folder(self, path: str) -> _Folder:
        if path not in self._folders:
            try:
                tree = list_files(Path(path), False, lambda: None)
            except SourceProblem:
                tree = Tree(Path(path), [])
            self._folders[path] = _Folder(Path(path), tree)
        return self._folders[path]


@dataclass
class _Folder:
    path: Path
    tree: Tree
    names: ByName = field(init=False)

    def __post_init__(self) -> None:
        self.names = ByName({name: name for name in self.tree.names})

    def find(self, name: str) -> str | None:
        return self.names.get(name) or self._by_stem.get(name)

    @cached_property
    def _by_stem(self) -> ByName:
        return self.tree.by_stem()


@dataclass(frozen=True)
class Table:
    """What is known about a table before its rows are read.

    `locate` takes the row's number, the column and the cell, and finds the media, control image or mask that the cell
    names or holds.
    """

    path: Path
    columns: Columns
    rules: DirectorySettings
    filter: Filter | None
    beside: Beside
    locate: Callable[[int, str, Any], Locator]


@dataclass(frozen=True)
class Duplicates:
    """Where files with their controls, and digests, appeared for the first time."""

    files: dict[Any, str] = field(default_factory=dict)
    digests: dict[Any, str] = field(default_factory=dict)


def list_rows(
    rows: Iterable[TableRow], table: Table, listing: Listing, seen: Duplicates, raise_if_stopping: Callable[[], None]
) -> None:
    """Adds to `listing` the samples of the rows that pass the filter, and the rows that cannot be used."""
    for count, row in enumerate(rows):
        if count % _ROWS_BETWEEN_HEEDS == 0:
            raise_if_stopping()
        try:
            # Before the filter, since the table also names the files of rows that are not used.
            files = _files(row, table)
            if table.filter and not table.filter.holds(row.cells):
                continue
            entry = _entry(row, files, table)
            once = "several captions of a file go into one row, as a list"
            _once(seen.files, (entry.media, entry.controls), row, f"names the same file; {once}")
            digest = row.cells.get(table.columns.digest) if table.columns.digest else None
            if digest:
                _once(seen.digests, digest, row, f"has the same {table.columns.digest} (deduplicate = true)")
            listing.entries.append(entry)
        except Fault as fault:
            listing.rejected.append(fault.at(row.location))


def _once(seen: dict[Any, str], key: Any, row: TableRow, what: str) -> None:
    first = seen.setdefault(key, row.location)
    if first is not row.location:
        raise Fault("twice", f"{first} is used, which {what}")


class _Files(NamedTuple):
    """The files that a row names; for a missing one, the reason."""

    media: Locator | Fault
    controls: list[Locator | Fault]
    mask: Locator | Fault | None


def _files(row: TableRow, table: Table) -> _Files:
    columns, cells = table.columns, row.cells

    def located(column: str, cell: Any) -> Locator | Fault:
        try:
            return table.locate(row.number, column, cell)
        except Fault as fault:
            return fault

    controls: list[Locator | Fault] = []
    for column in columns.controls:
        cell = cells.get(column)
        controls += [located(column, part) for part in (cell if isinstance(cell, list) else [cell])]
    mask = cells.get(columns.mask) if columns.mask else None
    return _Files(
        located(columns.media, cells.get(columns.media)),
        controls,
        None if mask is None or mask == "" else located(columns.mask, mask),
    )


def _entry(row: TableRow, files: _Files, table: Table) -> Entry:
    media = files.media
    if isinstance(media, Fault):
        raise media
    if is_given(table.rules):
        captions = (given_caption(table.rules, str(media.path)),)
    else:
        captions = captions_of(row.cells.get(table.columns.caption))
    controls = tuple(_found(control, "control missing") for control in files.controls)
    mask = files.mask and _found(files.mask, "mask missing")
    if table.beside.is_needed:
        stem = os.path.splitext(os.path.relpath(media.path, table.path.parent))[0]
        controls = table.beside.controls(stem) + controls
        mask = mask or table.beside.mask(stem)
    return Entry(media, captions, controls, mask, _repeats(row.cells, table.columns))


def _found(location: Locator | Fault, kind: Kind) -> Locator:
    if isinstance(location, Fault):
        raise Fault(kind, str(location))
    return location


def _repeats(cells: Mapping[str, Any], columns: Columns) -> float:
    cell = cells.get(columns.repeats) if columns.repeats else None
    if cell is None or cell == "":
        return 1.0
    try:
        repeats = float(cell)
    except (TypeError, ValueError):
        repeats = 0.0
    if not 0 < repeats < float("inf"):
        raise Fault("broken row", f"{columns.repeats} is {cell!r:.40}; it must be a number above 0")
    return repeats
