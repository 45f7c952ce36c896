"""Lists what a `[[directory]]` of a dataset holds: every picture or clip with its captions, control images and mask.

Each kind of source has a file: `folders`, `text_tables` and `arrow_tables` (`tables` and `rows` turn these into
samples), and `tars`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from utils.dataset.sources.arrow_tables import ARROW_SUFFIXES
from utils.dataset.sources.folders import MEDIA_SUFFIXES, Tree, count_captioned, list_files, list_pictures, split_ending
from utils.dataset.sources.locators import (
    NOT_BROKEN,
    Container,
    Entry,
    Listing,
    Locator,
    Rejected,
    Remark,
    SourceProblem,
)
from utils.dataset.sources.tables import list_arrow_tables, list_text_table
from utils.dataset.sources.tars import list_tars
from utils.dataset.sources.text_tables import TEXT_TABLES
from utils.dataset.sources.texts import caption_ending, is_given
from utils.settings.dataset_schema import DirectorySettings

__all__ = ["NOT_BROKEN", "Container", "Entry", "Listing", "Locator", "Rejected", "Remark", "read_source"]

FOLDER_TABLES = ("captions.json", "metadata.jsonl", "metadata.csv", "metadata.json", "metadata.parquet")
"""The tables that a folder may have; the first one that exists is read."""

_TABLES = frozenset({*TEXT_TABLES, *ARROW_SUFFIXES})
_OF_TABLES = "is for tables"
_IDLE: dict[str, dict[str, str]] = {
    "a folder of pictures": {
        **dict.fromkeys(("filter", "file_column", "image_column"), _OF_TABLES),
        "data_file_keys": "is for tables and tars; of folders, set control_path",
        "caption_column": 'is for tables, and for captions in .json; for those, set caption_extension = ".json"',
    },
    "a tar": dict.fromkeys(("filter", "file_column", "image_column"), _OF_TABLES),
    "a table that names files": {
        "image_column": "is for tables that hold the pictures themselves; set file_column",
        "caption_extension": "is for captions in files of their own; set caption_column",
    },
    "a .parquet or .arrow table": {"caption_extension": "is for captions in files of their own; set caption_column"},
}
"""The keys that have no effect on each kind of source, and what they are for."""


def read_source(
    directory: DirectorySettings, *, raise_if_stopping: Callable[[], None] = lambda: None, remember: Path | None = None
) -> Listing:
    """Lists what there is to train on in a directory, without opening any picture.

    `path` may be a table or a tar. If it is a folder, what is read is the first of these that there is: one of
    `FOLDER_TABLES`; its .tar files; its .parquet and .arrow files; its pictures and clips. Where pictures have captions
    beside them, they are read instead of a table that is none or names no file, and of fewer .tar, .parquet and .arrow
    files than there are of them. Other files there are not read, but reported. Keys that have no effect on this kind of
    source are ignored and reported, since another directory may use them. Problems with the data raise no exception;
    they are in the listing.

    Args:
        directory: with the file's values for the keys that it does not set itself.
        raise_if_stopping: called now and then; an exception ends the listing.
        remember: the folder that stores the indices of tars, so that a tar is read through only once.
    """
    path = Path(os.path.abspath(directory.path))
    try:
        listing = (_list_folder if path.is_dir() else _list_file)(path, directory, raise_if_stopping, remember)
    except SourceProblem as problem:
        return Listing(problems=[str(problem)])
    if not listing.entries and not listing.problems:
        if directory.filter and "filter" not in listing.idle:
            listing.problems.append(f"filter = {directory.filter!r} holds for no row that can be used")
        elif not listing.rejected:
            listing.problems.append("there is nothing in it")
    return listing


def _list_file(
    path: Path, rules: DirectorySettings, raise_if_stopping: Callable[[], None], remember: Path | None
) -> Listing:
    suffix = path.suffix.lower()
    if not path.exists():
        raise SourceProblem("there is no such folder or file")
    if suffix in TEXT_TABLES:
        return _listed(
            "a table that names files",
            rules,
            lambda active_routers: list_text_table(path, active_routers, raise_if_stopping),
        )
    if suffix in ARROW_SUFFIXES:
        return _listed(
            "a .parquet or .arrow table",
            rules,
            lambda active_routers: list_arrow_tables([path], active_routers, raise_if_stopping),
        )
    if _is_tar(path.name):
        return _listed(
            "a tar", rules, lambda active_routers: list_tars([path], active_routers, raise_if_stopping, remember)
        )
    endings = ", ".join([*sorted(_TABLES), ".tar"])
    raise SourceProblem(f"a single file must be one of {endings}; pictures are read from the folder that they are in")


def _list_folder(
    path: Path, rules: DirectorySettings, raise_if_stopping: Callable[[], None], remember: Path | None
) -> Listing:
    tree = list_files(path, rules.recursive, raise_if_stopping)
    names = set(tree.names)
    tables = [name for name in FOLDER_TABLES if name in names]
    tars = [name for name in tree.names if _is_tar(name)]
    arrows = [name for name in tree.names if _ending(name) in ARROW_SUFFIXES and name not in tables]
    captioned = count_captioned(tree, rules)
    is_captioned = captioned > 0 or (is_given(rules) and bool(_media(tree)))
    foreign: list[Rejected] = []
    for table in tables:
        try:
            listing = _list_table(path / table, rules, raise_if_stopping, must_name=is_captioned)
        except SourceProblem as problem:
            if not is_captioned:
                raise
            # A file of another program's, which only has the name.
            reason = f"{problem}; the captioned pictures of this folder are used"
            foreign.append(Rejected(str(path / table), "not read", reason))
            continue
        others = [*tables[tables.index(table) + 1 :], *tars, *arrows]
        return _with_others(listing, path, table, others, foreign, captioned)
    if _are_pictures_meant(tree, rules, captioned, len(tars) + len(arrows)):
        left = replace(tree, names=[name for name in tree.names if name not in {*tars, *arrows}])
        reason = (
            "the captioned pictures of this folder are read instead; to use this, give it a [[directory]] of its own"
        )
        foreign += [Rejected(f"{path}/{name}", "not read", reason) for name in (*tars, *arrows)]
        listing = _listed(
            "a folder of pictures", rules, partial(list_pictures, left, raise_if_stopping=raise_if_stopping)
        )
        listing.rejected.extend(foreign)
        return listing
    if tars:
        kind, listed = "a tar", partial(list_tars, [path / name for name in tars], remember=remember)
        others = [*arrows, *_media(tree)]
    else:
        kind, listed = "a .parquet or .arrow table", partial(list_arrow_tables, [path / name for name in arrows])
        others = _media(tree)
    listing = _listed(kind, rules, partial(listed, raise_if_stopping=raise_if_stopping))
    return _with_others(listing, path, (tars or arrows)[0], others, foreign, captioned)


def _list_table(
    path: Path, rules: DirectorySettings, raise_if_stopping: Callable[[], None], must_name: bool
) -> Listing:
    how = {"raise_if_stopping": raise_if_stopping, "is_of_folder": True, "must_name": must_name}
    if path.suffix in TEXT_TABLES:
        return _listed("a table that names files", rules, partial(list_text_table, path, **how))
    return _listed("a .parquet or .arrow table", rules, partial(list_arrow_tables, [path], **how))


def _are_pictures_meant(tree: Tree, rules: DirectorySettings, captioned: int, containers: int) -> bool:
    """Whether a folder's pictures are used and not the tars and tables with pictures beside them. One stray container
    must not replace a folder of captioned pictures, nor a stray picture a folder of containers."""
    if not containers:
        return True
    return captioned >= containers or (is_given(rules) and len(_media(tree)) > containers)


def _with_others(
    listing: Listing, path: Path, read: str, others: list[str], foreign: list[Rejected], captioned: int
) -> Listing:
    """The listing, which names what is not read beside what is."""
    reason = f"{read} is read of this folder instead; to use this too, give it a [[directory]] of its own"
    listing.rejected.extend(foreign)
    listing.rejected.extend(Rejected(f"{path}/{name}", "not read", reason) for name in others)
    if captioned:
        text = f"{captioned} pictures have a caption file beside them, and {read} is read instead"
        listing.remarks.append(Remark("captions not read", str(path), text))
    return listing


def _is_tar(name: str) -> bool:
    """A compressed one counts too; it is refused when it is read."""
    name = name.lower()
    return name.endswith((".tar", ".tgz")) or ".tar." in name


def _media(tree: Tree) -> list[str]:
    return [name for name in tree.names if _ending(name) in MEDIA_SUFFIXES]


def _ending(name: str) -> str:
    return split_ending(name)[1].lower()


def _listed(kind: str, rules: DirectorySettings, of: Callable[[DirectorySettings], Listing]) -> Listing:
    """Lists a source by the rules that apply to its kind."""
    defaults = {key: DirectorySettings.model_fields[key].get_default(call_default_factory=True) for key in _IDLE[kind]}
    if caption_ending(rules) == ".json":
        defaults.pop("caption_column", None)
    set_ = {key: default for key, default in defaults.items() if getattr(rules, key) != default}
    listing = of(rules.model_copy(update=set_))
    listing.idle.update({key: f"{_IDLE[kind][key]}; this is {kind}" for key in set_})
    return listing
