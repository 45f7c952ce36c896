"""What there is to train on: every usable file of a dataset, with its caption and its identity.

A file is known by the hash of its content, so that neither moving nor touching it makes anything anew. Hashes
are remembered between runs; a file is read again only when its size or time of change differs.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from utils.media.decode import CLIP_SUFFIXES, IMAGE_SUFFIXES, MediaError, probe
from utils.progress_bar import progress_bar
from utils.settings.errors import Problem
from utils.settings.schema import DatasetSettings, ResolvedDirectory

LISTED_PER_KIND = 10
READERS = 8
BUSY_SECONDS = 60


@dataclass(frozen=True)
class MediaFile:
    """A picture or clip: where it is, the hash of its content, its upright size in pixels, its frames."""

    path: Path
    digest: str
    width: int
    height: int
    frames: int


@dataclass(frozen=True)
class Row:
    """A file to train on. `directory` is the position of its `[[directory]]` in the dataset's settings."""

    media: MediaFile
    caption: str
    control: MediaFile | None
    directory: int
    repeats: int


@dataclass(frozen=True)
class Manifest:
    """The usable files, in order of directory and name; what is wrong with others; what is worth saying."""

    rows: list[Row]
    problems: list[Problem]
    warnings: list[str]


class _Record(NamedTuple):
    """What is remembered of a file: a line of the index."""

    path: str
    size: int
    mtime_ns: int
    digest: str
    width: int
    height: int
    frames: int


@dataclass
class _Findings:
    """Problems by kind, so that a thousand of one kind do not bury the one of another."""

    file: str
    kinds: dict[str, list[Problem]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, folder: Path, message: str) -> None:
        self.kinds[kind].append(Problem(self.file, f"[[directory]] {folder}", message))

    def capped(self) -> list[Problem]:
        listed: list[Problem] = []
        for kind, problems in self.kinds.items():
            listed += problems[:LISTED_PER_KIND]
            if len(problems) > LISTED_PER_KIND:
                listed.append(Problem(self.file, "", f"and {len(problems) - LISTED_PER_KIND} more: {kind}"))
        return listed


@dataclass(frozen=True)
class _Folder:
    """What a directory contributes, before any file is opened; captions and controls by the image's stem."""

    settings: ResolvedDirectory
    images: list[Path]
    captions: dict[str, Path]
    controls: dict[str, Path]


def scan(
    dataset: DatasetSettings,
    index_path: Path,
    file: str,
    *,
    trust: bool = False,
    progress: bool = False,
    heed: Callable[[], None] = lambda: None,
) -> Manifest:
    """Every image of the dataset's directories (their subfolders are not searched).

    Nothing is raised for what is wrong with the data: all of it is in the manifest's problems, ten of a kind.
    Several processes may scan into one index; done one after another, only the first has files to hash.

    Args:
        index_path: the SQLite file in which hashes are remembered; made if missing.
        file: the dataset's settings file, to be named in problems.
        trust: take remembered files as unchanged without looking.
        progress: show a progress bar.
        heed: called between two files; what it raises ends the scan, with what was found remembered.
    """
    findings, warnings = _Findings(file), []
    folders = [_list_folder(dataset.resolved(entry), findings, warnings) for entry in dataset.directory]
    paths = list(dict.fromkeys(path for folder in folders for path in [*folder.images, *folder.controls.values()]))
    captions = list(dict.fromkeys(path for folder in folders for path in folder.captions.values()))
    with ThreadPoolExecutor(READERS) as pool:
        media = _identify_all(paths, index_path, trust, pool, progress, heed)
        texts = dict(zip(captions, pool.map(_read_caption, captions), strict=True))
    rows = [row for index, folder in enumerate(folders) for row in _rows(index, folder, media, texts, findings)]
    return Manifest(rows, findings.capped(), warnings)


def _list_folder(settings: ResolvedDirectory, findings: _Findings, warnings: list[str]) -> _Folder:
    files = _files(settings.path, findings)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    clips = [path.name for path in files if path.suffix.lower() in CLIP_SUFFIXES]
    if clips:
        warnings.append(f"{settings.path}: {len(clips)} clip(s) left out, only images are used: {clips[0]}")
    if not images and settings.path.is_dir():
        message = "there is no image in this folder (subfolders are not searched)"
        findings.add("folders without images", settings.path, message)
    stems = {path.stem for path in images}
    captions = {path.stem: path for path in files if path.suffix.lower() == ".txt" and path.stem in stems}
    candidates = [] if settings.control_path is None else _files(settings.control_path, findings)
    # Reversed: of several control images of one stem, the first is meant.
    others = [path for path in reversed(candidates) if path.suffix.lower() in IMAGE_SUFFIXES]
    controls = {path.stem: path for path in others if path.stem in stems}
    return _Folder(settings, images, captions, controls)


def _files(folder: Path, findings: _Findings) -> list[Path]:
    """The files of `folder`, sorted, without hidden ones; none if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_file())
    except OSError as error:
        findings.add("folders that cannot be read", folder, f"this folder cannot be read ({error.strerror})")
        return []
    # A name in another encoding, as old archives unpack to, can neither be remembered nor printed.
    foreign = [name for name in names if name != name.encode(errors="replace").decode()]
    for name in foreign:
        findings.add("names that are not UTF-8", folder, f"rename the file {name!a}: its name is not UTF-8")
    return [Path(os.path.abspath(folder)) / name for name in names if name not in foreign]


def _rows(
    index: int,
    folder: _Folder,
    media: dict[Path, MediaFile | MediaError],
    texts: dict[Path, str | MediaError],
    findings: _Findings,
) -> Iterator[Row]:
    """The rows of the images that nothing is wrong with; of the others, all that is."""
    for path in folder.images:
        parts = {
            "images that cannot be read": media[path],
            "captions that are missing or cannot be read": _caption_of(path, folder, texts),
            "control images that are missing or cannot be read": _control_of(path, folder, media),
        }
        faults = {kind: part for kind, part in parts.items() if isinstance(part, MediaError)}
        for kind, fault in faults.items():
            findings.add(kind, folder.settings.path, str(fault))
        if not faults:
            yield Row(*parts.values(), index, folder.settings.num_repeats)


def _caption_of(path: Path, folder: _Folder, texts: dict[Path, str | MediaError]) -> str | MediaError:
    if path.stem in folder.captions:
        return texts[folder.captions[path.stem]]
    return MediaError(
        f"{path}: no caption; write it to {path.stem}.txt beside it (an empty file trains without a caption)"
    )


def _control_of(
    path: Path, folder: _Folder, media: dict[Path, MediaFile | MediaError]
) -> MediaFile | MediaError | None:
    if folder.settings.control_path is None:
        return None
    if path.stem in folder.controls:
        return media[folder.controls[path.stem]]
    return MediaError(f"{path}: no control image called {path.stem} in {folder.settings.control_path}")


def _read_caption(path: Path) -> str | MediaError:
    try:
        # Some editors open a UTF-8 file with a mark that is no part of the text.
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return MediaError(f"{path}: this caption is not UTF-8 text (byte {error.start}); save it as UTF-8")
    except OSError as error:
        return MediaError(f"{path}: this caption cannot be read ({error.strerror})")


def _identify_all(
    paths: list[Path],
    index_path: Path,
    trust: bool,
    pool: ThreadPoolExecutor,
    progress: bool,
    heed: Callable[[], None],
) -> dict[Path, MediaFile | MediaError]:
    with _index(index_path) as index:
        known = {record[0]: _Record(*record) for record in index.execute("SELECT * FROM media")}
        found = pool.map(lambda path: _identify(path, known.get(str(path)), trust), paths)
        records: list[_Record | MediaError] = []
        try:
            with progress_bar(len(paths), "files", active=progress) as bar:
                for record in found:
                    records.append(record)
                    bar.update()
                    heed()
        finally:
            # Also of a scan that is interrupted: hours of hashing are kept.
            identified = [record for record in records if isinstance(record, _Record)]
            new = [record for record in identified if known.get(record.path) is not record]
            index.executemany("INSERT OR REPLACE INTO media VALUES (?, ?, ?, ?, ?, ?, ?)", new)
            index.commit()
    return {
        path: MediaFile(path, *record[3:]) if isinstance(record, _Record) else record
        for path, record in zip(paths, records, strict=True)
    }


@contextmanager
def _index(path: Path) -> Iterator[sqlite3.Connection]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as index:
        index.execute(
            "CREATE TABLE IF NOT EXISTS media (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER,"
            " digest TEXT, width INTEGER, height INTEGER, frames INTEGER)"
        )
        yield index


def _identify(path: Path, known: _Record | None, trust: bool) -> _Record | MediaError:
    """What the file is: as remembered if it has not changed, else by reading it."""
    if known and trust:
        return known
    try:
        status = path.stat()
        if known and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return known
        probed = probe(path)
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        return MediaError(f"{path}: cannot be read ({error.strerror})")
    except MediaError as error:
        return error
    stamp = status.st_size, status.st_mtime_ns
    return _Record(str(path), *stamp, digest, probed.width, probed.height, probed.frames)
