"""Samples that are listed in tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from utils.dataset.sources.arrow_tables import ArrowTable, Recent
from utils.dataset.sources.columns import DIGEST_NAMES, Columns, find_columns
from utils.dataset.sources.filters import Filter
from utils.dataset.sources.folders import Beside
from utils.dataset.sources.locators import Listing, Locator, Remark, SourceProblem
from utils.dataset.sources.rows import Duplicates, FilesOf, Table, TableRow, list_rows
from utils.dataset.sources.text_tables import read_text_table
from utils.dataset.sources.texts import CAPTION_NAMES
from utils.settings.dataset_schema import DirectorySettings

# Texts and digests may be stored as bytes too.
_NEVER_FILES = frozenset({*CAPTION_NAMES, *DIGEST_NAMES})
_ROWS_LOOKED_AT = 100


def list_text_table(
    path: Path,
    rules: DirectorySettings,
    raise_if_stopping: Callable[[], None],
    is_of_folder: bool = False,
    must_name: bool = False,
) -> Listing:
    """The files that a table of text names.

    Args:
        is_of_folder: report the pictures and clips in its folder that it does not name.
        must_name: whether a table that names no file at all is refused.

    Raises:
        SourceProblem: it cannot be read, or lacks a column, or names no file although it must.
    """
    content = read_text_table(path)
    listing = Listing(rejected=content.rejected)
    columns = find_columns(content.columns, rules, media=content.media)
    files = FilesOf(path.parent)
    chosen = Filter(rules.filter, content.columns) if rules.filter else None
    table = Table(
        path, columns, rules, chosen, Beside(rules, raise_if_stopping), lambda number, column, cell: files.find(cell)
    )
    unread = _unread(content.columns, columns, chosen)
    naming = _naming_files(unread, columns.media, (row.cells for row in content.rows), files)
    listing.remarks.extend(_remarks(path, unread, naming))
    list_rows(content.rows, table, listing, Duplicates(), raise_if_stopping)
    _check_named(path, files, must_name)
    if is_of_folder:
        listing.rejected.extend(files.not_named(path))
    return listing


def _check_named(path: Path, files: FilesOf, must_name: bool) -> None:
    if must_name and not files.names_any:
        raise SourceProblem(f"{path} names no file that is there")


def list_arrow_tables(
    paths: list[Path],
    rules: DirectorySettings,
    raise_if_stopping: Callable[[], None],
    is_of_folder: bool = False,
    must_name: bool = False,
) -> Listing:
    """The pictures and clips in the cells of Parquet and Arrow tables, or the files that they name; see
    `list_text_table`."""
    listing, recent, seen, beside = Listing(), Recent(), Duplicates(), Beside(rules, raise_if_stopping)
    for path in paths:
        arrow = ArrowTable(path, recent)
        never = {rules.caption_column, *(name for name in arrow.columns if name.lower() in _NEVER_FILES)}
        held = arrow.held - never
        columns = find_columns(arrow.columns, rules, cells=held)
        if columns.media in held:
            _check_cells(rules)
        chosen = Filter(rules.filter, [name for name in arrow.columns if name not in held]) if rules.filter else None
        files = FilesOf(path.parent)
        table = Table(path, columns, rules, chosen, beside, _finder(arrow, held, files))
        unread = _unread(arrow.columns, columns, chosen)
        texts = [name for name in unread if name not in held]
        cells = arrow.rows([*texts, *({columns.media} - held)]) if texts else ()
        naming = [*(name for name in unread if name in held), *_naming_files(texts, columns.media, cells, files)]
        # The shards of a dataset have the same columns, which are told once.
        known = {remark.text for remark in listing.remarks}
        listing.remarks.extend(remark for remark in _remarks(path, unread, naming) if remark.text not in known)
        list_rows(_rows(arrow, held, columns, chosen), table, listing, seen, raise_if_stopping)
        _check_named(path, files, must_name)
        if is_of_folder and columns.media not in held:
            listing.rejected.extend(files.not_named(path))
    return listing


def _unread(present: Iterable[str], columns: Columns, chosen: Filter | None) -> list[str]:
    """The columns that nothing reads."""
    return [name for name in present if name not in columns.used and not (chosen and name in chosen.columns)]


def _naming_files(unread: list[str], media: str, rows: Iterable[Mapping[str, Any]], files: FilesOf) -> list[str]:
    """Those of the unread columns in whose first rows there are names of files, other than the row's own."""

    def names_one(cells: Mapping[str, Any], column: str) -> bool:
        found = [files.has(name) for name in _listed(cells.get(column))]
        own = files.has(cells.get(media)) if any(found) else None
        return any(file and file != own for file in found)

    looked_at = list(islice(rows, _ROWS_LOOKED_AT))
    return [column for column in unread if any(names_one(cells, column) for cells in looked_at)]


def _listed(cell: Any) -> list[Any]:
    return cell if isinstance(cell, list) else [cell]


def _remarks(path: Path, unread: list[str], naming: list[str]) -> Iterator[Remark]:
    """What is to be told about columns that nothing reads."""
    if naming:
        keys = ", ".join(f'"{name}"' for name in naming)
        what = f"{', '.join(naming)} hold files; if these are control images, set data_file_keys = [{keys}]"
        yield Remark("columns not read", str(path), what)
    others = [name for name in unread if name not in naming]
    if others:
        yield Remark("columns not read", str(path), ", ".join(others))


def _finder(arrow: ArrowTable, held: frozenset[str], files: FilesOf) -> Callable[[int, str, Any], Locator]:
    def locate(number: int, column: str, cell: Any) -> Locator:
        return Locator(str(arrow.path), arrow.part(number, column), arrow) if column in held else files.find(cell)

    return locate


def _check_cells(rules: DirectorySettings) -> None:
    """Whether the settings can be honoured for pictures in cells."""
    if rules.control_path or rules.mask_path:
        raise SourceProblem("control_path and mask_path go with files; name the columns of controls in data_file_keys")
    if rules.instance_prompt is None and rules.caption_source in ("filename", "foldername"):
        raise SourceProblem(f"caption_source = {rules.caption_source!r} goes with files, and this table holds pictures")


def _rows(arrow: ArrowTable, held: frozenset[str], columns: Columns, chosen: Filter | None) -> Iterator[TableRow]:
    used = columns.used
    # Only whether these cells are empty matters here, not what they contain.
    pictures = dict.fromkeys(used & held, True)
    wanted = (used | (chosen.columns if chosen else set())) - held
    names = [name for name in arrow.columns if name in wanted]
    for number, cells in enumerate(arrow.rows(names), start=1):
        yield TableRow(f"{arrow.path} row {number}", number, cells | pictures)
