"""Folders with a caption beside each picture or clip."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from utils.dataset.sources.locators import Entry, Fault, Kind, Listing, Locator, Rejected, SourceProblem
from utils.dataset.sources.names import ByName, normal
from utils.dataset.sources.texts import caption_ending, captions_in, given_caption, is_given, is_utf8
from utils.media.decode import CLIP_SUFFIXES, IMAGE_SUFFIXES
from utils.settings.dataset_schema import DirectorySettings

MEDIA_SUFFIXES = IMAGE_SUFFIXES | CLIP_SUFFIXES
# Files beside pictures that are not meant for training. All other endings are reported.
_COMPANIONS = frozenset(
    ".bak .caption .csv .db .html .ini .json .jsonl .log .md .npy .npz .parquet .pdf .pt .py .safetensors .sh .sqlite"
    " .toml .tsv .txt .xml .yaml .yml".split()
)
_READERS = 8
_CHUNK = 512
_READ_BYTES = 2**16


@dataclass(frozen=True)
class Tree:
    """The files under `root` by relative names, sorted, without hidden ones; and the problems of others.

    `subfolders` are those directly in it, searched or not.
    """

    root: Path
    names: list[str]
    rejected: list[Rejected] = field(default_factory=list)
    subfolders: list[str] = field(default_factory=list)

    def by_stem(self) -> ByName:
        """Pictures and clips by their names without suffix; the first one if several have the same name."""
        split = (split_ending(name) for name in reversed(self.names))
        return ByName({stem: stem + suffix for stem, suffix in split if suffix.lower() in MEDIA_SUFFIXES})


def split_ending(name: str) -> tuple[str, str]:
    """`os.path.splitext` for the name of a file that is not hidden, in less than half of the time."""
    stem, dot, ending = name.rpartition(".")
    return (stem, dot + ending) if dot and "/" not in ending else (name, "")


def list_files(root: Path, recursive: bool, raise_if_stopping: Callable[[], None]) -> Tree:
    """The files in `root`, and with `recursive` in the folders below. Links are followed, but not in circles.

    Raises:
        SourceProblem: the folder cannot be read.
    """
    names: list[str] = []
    rejected: list[Rejected] = []
    subfolders: list[str] = []
    folders = [("", frozenset({os.path.realpath(root)}))]
    while folders:
        prefix, above = folders.pop()
        raise_if_stopping()
        try:
            found = _list_one(root, prefix)
        except OSError as error:
            if not prefix:
                raise SourceProblem(f"this folder cannot be read ({error.strerror})") from None
            rejected.append(Rejected(f"{root}/{prefix}", "unreadable", f"cannot be read ({error.strerror})"))
            continue
        names += found.files
        rejected += found.rejected
        subfolders += [] if prefix else found.folders
        for folder in found.folders if recursive else ():
            real = os.path.realpath(f"{root}/{folder}")
            if real not in above:
                folders.append((f"{folder}/", above | {real}))
    return Tree(root, sorted(names), rejected, sorted(subfolders))


@dataclass(frozen=True)
class _Found:
    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def _list_one(root: Path, prefix: str) -> _Found:
    found = _Found()
    with os.scandir(f"{root}/{prefix}") as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.name[0] == ".":
                continue
            if not is_utf8(entry.name):
                # It can neither be stored nor printed.
                reason = "the name is not UTF-8, as names from old archives are; rename it"
                found.rejected.append(Fault("name not UTF-8", reason).at(f"{root}/{name}"))
            elif entry.is_file():
                found.files.append(name)
            elif entry.is_dir():
                found.folders.append(name)
            elif entry.is_symlink():
                reason = f"this link leads to {os.readlink(entry.path)}, which is not there; mend or remove it"
                found.rejected.append(Fault("no such file", reason).at(f"{root}/{name}"))
    return found


class Beside:
    """Control images and masks, which lie in folders of their own under the names of the pictures."""

    def __init__(self, rules: DirectorySettings, raise_if_stopping: Callable[[], None]) -> None:
        """
        Raises:
            SourceProblem: one of the folders cannot be read.
        """
        self._controls = [_named("control_path", path, rules, raise_if_stopping) for path in rules.control_paths]
        self._masks = _named("mask_path", rules.mask_path, rules, raise_if_stopping) if rules.mask_path else None
        self._recursive = rules.recursive
        self._masks_elsewhere = rules.alpha_mask or rules.default_mask_file is not None

    @property
    def is_needed(self) -> bool:
        return bool(self._controls) or self._masks is not None

    def controls(self, stem: str) -> tuple[Locator, ...]:
        """One control image from each control folder for the picture of this name without suffix.

        Raises:
            Fault: a folder has none.
        """
        return tuple(self._find(folder, stem, "control missing", "control image") for folder in self._controls)

    def mask(self, stem: str) -> Locator | None:
        """The mask of the picture of this name without suffix; None if no mask is needed.

        Raises:
            Fault: the mask is missing.
        """
        if self._masks is None:
            return None
        try:
            return self._find(self._masks, stem, "mask missing", "mask")
        except Fault as fault:
            if self._masks_elsewhere:
                return None
            raise Fault("mask missing", f"{fault}, or set default_mask_file for all that have none") from None

    def _find(self, folder: tuple[Path, ByName], stem: str, kind: Kind, what: str) -> Locator:
        root, names = folder
        name = names.get(stem if self._recursive else os.path.basename(stem))
        if name is None:
            raise Fault(kind, f"there is no {what} called {stem} in {root}; put one there")
        return Locator(f"{root}/{name}")


def _named(
    key: str, folder: Path, rules: DirectorySettings, raise_if_stopping: Callable[[], None]
) -> tuple[Path, ByName]:
    root = Path(os.path.abspath(folder))
    try:
        return root, list_files(root, rules.recursive, raise_if_stopping).by_stem()
    except SourceProblem as problem:
        raise SourceProblem(f"{key} = {root}: {problem}") from None


def count_captioned(tree: Tree, rules: DirectorySettings) -> int:
    """How many pictures and clips of a folder have a caption file beside them, whatever captions are to be read."""
    ending = caption_ending(rules)
    captions = {normal(name[: -len(ending)]) for name in tree.names if name.lower().endswith(ending)}
    split = (split_ending(name) for name in tree.names)
    return sum(normal(stem) in captions for stem, suffix in split if suffix.lower() in MEDIA_SUFFIXES)


def list_pictures(tree: Tree, rules: DirectorySettings, raise_if_stopping: Callable[[], None]) -> Listing:
    """Every picture and clip of a folder, with the caption from the file beside it or from its name."""
    beside = Beside(rules, raise_if_stopping)
    listing = Listing(rejected=list(tree.rejected))
    ending = caption_ending(rules)
    media: list[tuple[str, str]] = []
    captions: dict[str, str] = {}
    for name in tree.names:
        stem, suffix = split_ending(name)
        suffix = suffix.lower()
        if suffix in MEDIA_SUFFIXES:
            media.append((stem, name))
        elif name.lower().endswith(ending):
            captions[name[: -len(ending)]] = name
        elif suffix not in _COMPANIONS:
            listing.rejected.append(_unknown(f"{tree.root}/{name}", suffix))
    if not media:
        hint = "; set recursive = true to search its subfolders too" if tree.subfolders and not rules.recursive else ""
        listing.problems.append(f"there is no picture or clip in this folder{hint}")
    listing.rejected.extend(_not_searched(tree, rules))
    texts: Iterator[tuple[str, ...] | Fault | None]
    if is_given(rules):
        texts = ((given_caption(rules, f"{tree.root}/{name}"),) for _, name in media)
    else:
        stems = {normal(stem) for stem, _ in media}
        lone = [stem for stem in captions if normal(stem) not in stems]
        by_name = ByName(captions)
        fault = Fault("no picture", "no picture or clip beside it has this name")
        listing.rejected.extend(fault.at(f"{tree.root}/{captions[stem]}") for stem in sorted(lone))
        texts = iter(
            _read_all(tree.root, [by_name.get(stem) for stem, _ in media], rules.caption_column, raise_if_stopping)
        )
    for (stem, name), text in zip(media, texts, strict=True):
        try:
            listing.entries.append(_entry(tree.root, stem, name, _caption(text, stem, ending), beside))
        except Fault as fault:
            listing.rejected.append(fault.at(f"{tree.root}/{name}"))
    return listing


def _not_searched(tree: Tree, rules: DirectorySettings) -> Iterator[Rejected]:
    """The folders below that have pictures or clips and are not searched, except for those of masks and controls."""
    named = {os.path.abspath(path) for path in (*rules.control_paths, rules.mask_path) if path}
    for folder in () if rules.recursive else tree.subfolders:
        if f"{tree.root}/{folder}" not in named and _has_media(f"{tree.root}/{folder}"):
            reason = "this folder is not searched; set recursive = true to use the pictures in it too"
            yield Rejected(f"{tree.root}/{folder}", "not read", reason)


def _has_media(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(os.path.splitext(entry.name)[1].lower() in MEDIA_SUFFIXES for entry in entries)
    except OSError:
        return False


def _unknown(location: str, suffix: str) -> Rejected:
    ending = f"files ending in {suffix} are" if suffix else "a file without an ending is"
    reason = f"{ending} not read; if it is a picture or clip, save it as .png, .jpg or .mp4"
    return Rejected(location, "unknown kind of file", reason)


def _caption(text: tuple[str, ...] | Fault | None, stem: str, ending: str) -> tuple[str, ...]:
    if text is None:
        raise Fault(
            "caption missing",
            f"there is no caption; write it to {stem}{ending} (an empty file trains without a caption)",
        )
    if isinstance(text, Fault):
        raise text
    return text


def _entry(root: Path, stem: str, name: str, captions: tuple[str, ...], beside: Beside) -> Entry:
    media = Locator(f"{root}/{name}")
    if beside.is_needed:
        return Entry(media, captions, beside.controls(stem), beside.mask(stem))
    return Entry(media, captions)


def _read_all(
    root: Path, names: Sequence[str | None], key: str | None, raise_if_stopping: Callable[[], None]
) -> list[tuple[str, ...] | Fault | None]:
    """The captions in the files; None where there is no file name."""

    def read(chunk: Sequence[str | None]) -> list[tuple[str, ...] | Fault | None]:
        return [None if name is None else _read(f"{root}/{name}", name, key) for name in chunk]

    # In chunks: passing a single file to a thread takes longer than reading it.
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    texts = []
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for chunk in pool.map(read, chunks):
                texts += chunk
                raise_if_stopping()
        finally:
            pool.shutdown(cancel_futures=True)
    return texts


def _read(path: str, name: str, key: str | None) -> tuple[str, ...] | Fault:
    # Takes half the time of `open`, and there may be a million files.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = piece = os.read(descriptor, _READ_BYTES)
            while len(piece) == _READ_BYTES:
                piece = os.read(descriptor, _READ_BYTES)
                content += piece
        finally:
            os.close(descriptor)
        return captions_in(content, name, key)
    except OSError as error:
        return Fault("caption unreadable", f"the caption {name} cannot be read ({error.strerror})")
    except Fault as fault:
        return fault
