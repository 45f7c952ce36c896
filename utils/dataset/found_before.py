"""Remembers what the folders of a run's datasets came to, so that a start with very many files that have not changed
need not open and sort them again.

Only folders of files are remembered, of which nothing was broken: what is asked of them is whether anything in them has
another name, size or time than it had. What is written is JSON and no pickle, as a cache may be shared.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from utils.collector import without_collector
from utils.dataset.buckets import LeftOut, MediaFacts
from utils.dataset.collection import Collection, Source
from utils.dataset.folder_stamps import Root, Stamp, stamped
from utils.dataset.manifest import Scan
from utils.dataset.samples import Bucket, Control, Mask, MediaFile, Sample, Take, files_of
from utils.dataset.sources import NOT_BROKEN, Locator, Rejected, Remark
from utils.media.colour import Jitter
from utils.settings.dataset_schema import DirectorySettings

logger = logging.getLogger(__name__)

MANY = 10_000
"""The samples of a run from which on they are remembered: fewer are looked at in a moment."""
FOLDER = "found"
KEPT = 4
"""How many runs' samples a cache remembers: the latest."""
SETTLED_SECONDS = 2.0
"""A file that was changed this short before it was looked at may change again without another time."""
_DIGEST = 16


@dataclass(frozen=True)
class FoundBefore:
    """Where it is remembered what the datasets of a run came to, and the state of their folders.

    Attributes:
        identity: a hash of all that decides what the samples are: settings, this program's code, and the folders.
        is_settled: whether no file was changed just now.
    """

    file: Path
    identity: str
    is_settled: bool
    sources: Sequence[Source]

    @classmethod
    def look(
        cls, sources: Sequence[Source], facts: MediaFacts, how: Scan, choices: dict[str, Any]
    ) -> FoundBefore | None:
        """Looks at the folders as they are now. None if there is something else than folders among them, or one
        cannot be read."""
        roots = list(dict.fromkeys(root for source in sources for root in _roots(source)))
        if not all(root.path.exists() for root in roots):
            return None
        before = time.time()
        stamp: Stamp | None = stamped(roots, how.raise_if_stopping)
        if stamp is None:
            return None
        described = [[one.name, str(one.file), one.fraction, one.settings.model_dump(mode="json")] for one in sources]
        asked = json.dumps([_code(), os.getcwd(), described, repr(facts), sorted(choices.items())])
        name = hashlib.blake2b(asked.encode(), digest_size=_DIGEST).hexdigest()
        identity = hashlib.blake2b(f"{name} {stamp.digest}".encode(), digest_size=_DIGEST).hexdigest()
        file = how.index.parent / FOLDER / f"{name}.json"
        return cls(file, identity, stamp.newest < before - SETTLED_SECONDS, sources)

    @without_collector()
    def recalled(self) -> list[Collection] | None:
        """The collections of a run with the same settings and the same folders; None if there was none."""
        try:
            with self.file.open("rb") as file:
                identity, digest = file.readline().decode().split()
                if identity != self.identity:
                    return None
                content = file.read()
            if hashlib.blake2b(content, digest_size=_DIGEST).hexdigest() != digest:
                raise ValueError("it is damaged")
            # It may be another user's, of a group that shares the cache.
            with suppress(OSError):
                self.file.touch()
            rules = {one.file: _resolved(one) for one in self.sources}
            sources = {one.name: one for one in self.sources}
            return [
                _collection(sources[one["name"]], one, rules[sources[one["name"]].file], identity)
                for one in json.loads(content)
            ]
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.info("%s is not used, and all files are looked at (%s)", self.file, error)
            return None

    @without_collector()
    def remember(self, collections: Sequence[Collection]) -> list[Collection]:
        """Writes down the collections, if there are many samples, and all that they depend on is in the folders.
        Returns them with their identity if so."""
        samples = sum(len(collection.samples) for collection in collections)
        if samples < MANY or not self.is_settled or not _is_all_in_folders(collections):
            return list(collections)
        content = json.dumps([_columns(one) for one in collections], separators=(",", ":")).encode()
        digest = hashlib.blake2b(content, digest_size=_DIGEST).hexdigest()
        new = self.file.with_suffix(f".{os.getpid()}")
        try:
            self.file.parent.mkdir(exist_ok=True)
            with new.open("wb") as file:
                file.write(f"{self.identity} {digest}\n".encode())
                file.write(content)
            new.replace(self.file)
            for old in sorted(self.file.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
                old.unlink()
        except OSError as error:
            logger.info("the next start looks at all files again: %s cannot be written (%s)", self.file, error.strerror)
            with suppress(OSError):
                new.unlink(missing_ok=True)
        return [replace(one, identity=self.identity) for one in collections]


def _roots(source: Source) -> Iterator[Root]:
    """The folders and files that the samples of a dataset depend on."""
    for rules in _resolved(source):
        for path in (rules.path, *rules.control_paths, *filter(None, [rules.mask_path])):
            yield Root(Path(os.path.abspath(path)), rules.recursive)
        if rules.default_mask_file:
            yield Root(Path(os.path.abspath(rules.default_mask_file)))


def _resolved(source: Source) -> list[DirectorySettings]:
    return [source.settings.resolved(directory) for directory in source.settings.directory]


@cache
def _code() -> str:
    """A hash of the code by which files become samples."""
    own = Path(__file__).parent
    files = sorted([*own.rglob("*.py"), *(own.parent / "media").glob("*.py"), *(own.parent / "settings").glob("*.py")])
    files.append(own.parent / "diffusion" / "seeds.py")
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=_DIGEST).hexdigest()


def _is_all_in_folders(collections: Sequence[Collection]) -> bool:
    """Whether all files of the samples are in the folders that are looked at, and none was broken: what is broken may
    be mended where nobody looks, by another version of a library."""
    if any(fault.kind not in NOT_BROKEN for collection in collections for fault in collection.rejected):
        return False
    roots = list(dict.fromkeys(root for collection in collections for root in _roots(collection.source)))
    files = {id(file): file for one in collections for sample in one.samples for file in files_of(sample)}.values()
    return all(not file.locator.part and any(root.holds(file.locator.file) for root in roots) for file in files)


class _Table:
    """Values that are written once each, however many samples have them."""

    def __init__(self, written: Callable[[Any], Any]) -> None:
        self.rows: list[Any] = []
        self._written, self._numbers, self._alive = written, dict[int, int](), []

    def number(self, value: Any) -> int:
        """The row of a value, by its identity: to compare a million takes as long as to look at their files."""
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.rows)
            self.rows.append(self._written(value))
            self._alive.append(value)
        return number


def _columns(collection: Collection) -> dict[str, Any]:
    """A collection in the types of JSON, its samples by columns."""
    resolved = _resolved(collection.source)
    media = _Table(lambda one: [one.locator.file, *(getattr(one, name) for name in _MEDIA)])
    buckets, takes = _Table(astuple), _Table(lambda some: [_plain(one) for one in some])
    rules = _Table(resolved.index)
    samples = collection.samples

    def mask(one: Mask | None) -> list[Any] | int:
        return [media.number(one.media), one.is_alpha, one.mean] if one else 0

    columns = {
        "id": [one.id for one in samples],
        "media": [media.number(one.media) for one in samples],
        "bucket": [buckets.number(one.bucket) for one in samples],
        "takes": [takes.number(one.takes) for one in samples],
        "captions": [one.captions for one in samples],
        "controls": [[(media.number(of.media), buckets.number(of.bucket)) for of in one.controls] for one in samples],
        "mask": [mask(one.mask) for one in samples],
        "fps": [one.fps for one in samples],
        "repeats": [one.repeats for one in samples],
        "rules": [rules.number(one.rules) for one in samples],
        "turn": [one.turn for one in samples],
    }
    tables = {"media": media.rows, "bucket": buckets.rows, "takes": takes.rows, "rules": rules.rows}
    lists = {name: [astuple(one) for one in getattr(collection, name)] for name in _LISTS}
    return {"name": collection.source.name, "files": collection.files, "tables": tables, "samples": columns, **lists}


def _collection(
    source: Source, columns: dict[str, Any], directories: Sequence[DirectorySettings], identity: str
) -> Collection:
    """The collection that has these columns."""
    tables = columns["tables"]
    media = [MediaFile(Locator(file), *facts) for file, *facts in tables["media"]]
    buckets = [Bucket(*one) for one in tables["bucket"]]
    takes = [tuple(_take(*one) for one in some) for some in tables["takes"]]
    rules = [directories[number] for number in tables["rules"]]

    of_numbers: dict[str, Callable[[Any], Any]] = {
        "media": media.__getitem__,
        "bucket": buckets.__getitem__,
        "takes": takes.__getitem__,
        "captions": tuple,
        "controls": lambda some: tuple(Control(media[file], buckets[size]) for file, size in some) if some else (),
        "mask": lambda one: Mask(media[one[0]], *one[1:]) if one else None,
        "rules": rules.__getitem__,
    }
    values = {field.name: columns["samples"][field.name] for field in fields(Sample)}
    # In Python's own loops, a million of them takes a second more.
    made = (map(of_numbers[name], column) if name in of_numbers else column for name, column in values.items())
    samples = list(map(Sample, *made))
    lists = {name: [kind(*one) for one in columns[name]] for name, kind in _LISTS.items()}
    return Collection(source, samples, files=columns["files"], identity=identity, **lists)


def _plain(take: Take) -> list[Any]:
    jitter = take.jitter
    return [take.crop, take.flip, [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue], take.start]


def _take(crop: str | list[float], flip: bool, jitter: list[float], start: float) -> Take:
    return Take(crop if isinstance(crop, str) else tuple(crop), flip, Jitter(*jitter), start)


_MEDIA = [field.name for field in fields(MediaFile)][1:]
_LISTS = {"left_out": LeftOut, "rejected": Rejected, "remarks": Remark}
