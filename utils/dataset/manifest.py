"""The manifest of a dataset: every usable file, with its captions and its identity.

A file is identified by the hash of its content, so that moving or touching it does not invalidate anything. Hashes,
sizes and frame counts are stored between runs; a file is read again only if its size or modification time differs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from utils.collector import without_collector
from utils.dataset.file_index import Scan, opened_index
from utils.dataset.mask_means import mask_means
from utils.dataset.samples import Mask, MediaFile
from utils.dataset.sources import Entry, Listing, Locator, Rejected, Remark, read_source
from utils.errors import Problem
from utils.media.decode import probe
from utils.media.geometry import same_shape
from utils.media.source import MediaError
from utils.progress_bar import progress_bar
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings

READERS = 8
CHUNK = 512
_SCALE_IT = "bring it to the picture's proportions"
_CONTROL_FIT = f'{_SCALE_IT}, or, if it is a view of its own, set control_fit = "crop", "stretch" or "pad"'
COPY_BYTES = 2**20
COLUMNS = "path, part, size, mtime_ns, digest, width, height, frames, rate, fault"
SOUND = (
    "typeof(path) = 'text' AND typeof(part) = 'text' AND typeof(size) = 'integer' AND typeof(mtime_ns) = 'integer'"
    " AND typeof(digest) = 'text' AND typeof(width) = 'integer' AND typeof(height) = 'integer'"
    " AND typeof(frames) = 'integer' AND typeof(rate) = 'real' AND typeof(fault) = 'text'"
    " AND (fault != '' OR (width > 0 AND height > 0 AND frames > 0 AND rate >= 0))"
)
"""Rows of the index that something else has damaged are not known: their files are looked at again."""
PLACES = ", ".join("?" for _ in COLUMNS.split(","))


@dataclass(frozen=True, slots=True)
class Row:
    """A file to train on. `directory` is the position of its `[[directory]]` in the dataset's settings."""

    media: MediaFile
    captions: tuple[str, ...]
    controls: tuple[MediaFile, ...]
    mask: Mask | None
    directory: int
    repeats: float = 1.0


@dataclass(frozen=True)
class Manifest:
    """The usable files, in order of directory and name; the files and rows that cannot be used; the problems of whole
    directories; and what their sources remark."""

    rows: list[Row]
    rejected: list[Rejected]
    problems: list[Problem]
    remarks: list[Remark] = field(default_factory=list)


class _Record(NamedTuple):
    """A row of the index: what is stored about a file."""

    path: str
    part: str
    size: int
    mtime_ns: int
    digest: str
    width: int
    height: int
    frames: int
    fps: float
    fault: str


@without_collector()
def scan(dataset: DatasetSettings, file: str, how: Scan) -> Manifest:
    """Every picture and clip of the dataset's directories.

    Problems with the data raise no exception; they are listed in the manifest. Several processes may scan with one
    index; if they do so one after another, only the first has to hash files.

    Args:
        file: the dataset's settings file, which problems name.
    """
    directories = [dataset.resolved(entry) for entry in dataset.directory]
    listings = [
        read_source(rules, raise_if_stopping=how.raise_if_stopping, remember=how.index.parent) for rules in directories
    ]
    defaults = [_default_mask(rules) for rules in directories]
    wanted = [locator for listing in listings for entry in listing.entries for locator in _places(entry)]
    media = _identify_all([*wanted, *filter(None, defaults)], how)
    rows: list[Row] = []
    rejected = [fault for listing in listings for fault in listing.rejected]
    for number, (rules, listing, default) in enumerate(zip(directories, listings, defaults, strict=True)):
        seen: set[str] = set()
        for entry in listing.entries:
            row = _row(entry, number, rules, default, media)
            if isinstance(row, Rejected):
                rejected.append(row)
            elif rules.deduplicate and row.media.digest in seen:
                rejected.append(
                    Rejected(str(entry.media), "twice", "this picture was there before (deduplicate = true)")
                )
            else:
                seen.add(row.media.digest)
                rows.append(row)
    rows = _with_means(rows, how, rejected)
    problems = [
        Problem(file, f"[[directory]] {rules.path}", text)
        for rules, listing in zip(directories, listings, strict=True)
        for text in listing.problems
    ]
    problems += _idle_keys(dataset, file, listings)
    return Manifest(rows, rejected, problems, [remark for listing in listings for remark in listing.remarks])


def _with_means(rows: list[Row], how: Scan, rejected: list[Rejected]) -> list[Row]:
    """The rows, whose masks know what they are on average. Those whose mask cannot be decoded are `rejected`."""
    means = mask_means([row.mask for row in rows if row.mask], how)
    known: list[Row] = []
    for row in rows:
        mean = means[row.mask.media.digest, row.mask.is_alpha] if row.mask else 1.0
        if isinstance(mean, MediaError):
            rejected.append(Rejected(str(row.media.locator), "unreadable", str(mean)))
        else:
            known.append(replace(row, mask=replace(row.mask, mean=mean)) if row.mask else row)
    return known


def _idle_keys(dataset: DatasetSettings, file: str, listings: Sequence[Listing]) -> Iterator[Problem]:
    """The keys that have no effect where they are written. A key at the top of the file needs an effect on at least one
    of its directories."""
    shared: dict[str, list[str | None]] = {}
    for entry, listing in zip(dataset.directory, listings, strict=True):
        for key in listing.idle.keys() & entry.model_fields_set:
            yield Problem(file, f"[[directory]] {entry.path}", f"{key} {listing.idle[key]}")
        for key in dataset.model_fields_set - entry.model_fields_set:
            shared.setdefault(key, []).append(listing.idle.get(key))
    for key in sorted(shared):
        if all(shared[key]):
            yield Problem(file, f"key `{key}`", f"{shared[key][0]}, as are all that it holds for")


def _places(entry: Entry) -> Iterator[Locator]:
    yield entry.media
    yield from entry.controls
    if entry.mask:
        yield entry.mask


def _default_mask(rules: DirectorySettings) -> Locator | None:
    return Locator(str(rules.default_mask_file.absolute())) if rules.default_mask_file else None


def _row(
    entry: Entry,
    number: int,
    rules: DirectorySettings,
    default: Locator | None,
    media: dict[Locator, MediaFile | MediaError],
) -> Row | Rejected:
    """The row of an entry if all of its files can be used, otherwise the first problem with them."""
    mask_place = entry.mask or (None if rules.alpha_mask else default)
    for locator in (entry.media, *entry.controls, *filter(None, [mask_place])):
        found = media[locator]
        if isinstance(found, MediaError):
            return Rejected(str(entry.media), "unreadable", str(found))
    lying = [("mask", entry.mask, _SCALE_IT)] if entry.mask else []
    lying += [("control image", place, _CONTROL_FIT) for place in entry.controls if rules.control_fit is None]
    for what, place, advice in lying:
        own, picture = ((media[one].width, media[one].height) for one in (place, entry.media))
        if not same_shape(own, picture):
            sizes = f"is {own[0]}x{own[1]} and the picture {picture[0]}x{picture[1]}"
            reason = f"the {what} {place} {sizes}, so that it does not lie on it; {advice}"
            return Rejected(str(entry.media), "other shape", reason)
    mask = None
    if mask_place:
        mask = Mask(media[mask_place], is_alpha=False)
    elif rules.alpha_mask:
        mask = Mask(media[entry.media], is_alpha=True)
    controls = tuple(media[locator] for locator in entry.controls)
    return Row(media[entry.media], entry.captions, controls, mask, number, entry.repeats)


def _identify_all(locators: Sequence[Locator], how: Scan) -> dict[Locator, MediaFile | MediaError]:
    locators = list(dict.fromkeys(locators))
    with opened_index(how.index) as index, ThreadPoolExecutor(READERS) as pool:
        rows = index.execute(f"SELECT {COLUMNS} FROM media WHERE {SOUND}")
        known = {(record[0], record[1]): _Record(*record) for record in rows}
        stamps = {} if how.trust else _stamps(list({locator.file for locator in locators}), pool)
        found: dict[Locator, _Record | MediaError] = {}
        changed = []
        for locator in locators:
            record = known.get((locator.file, locator.part))
            stamp = stamps.get(locator.file)
            if record and not how.verify and (how.trust or stamp == (record.size, record.mtime_ns)):
                found[locator] = record
            else:
                changed.append(locator)
        new: list[_Record] = []
        try:
            with progress_bar(len(changed), "files", active=how.progress and bool(changed)) as bar:
                futures = {pool.submit(_identify, locator): locator for locator in changed}
                for future in as_completed(futures):
                    record = found[futures[future]] = future.result()
                    if isinstance(record, _Record):
                        new.append(record)
                    bar.update()
                    how.raise_if_stopping()
        finally:
            pool.shutdown(cancel_futures=True)
            # After an interrupted scan too, so that hours of hashing are kept.
            index.executemany(f"INSERT OR REPLACE INTO media ({COLUMNS}) VALUES ({PLACES})", new)
            index.commit()
    return {
        locator: MediaFile(locator, *record[4:]) if isinstance(record, _Record) else record
        for locator, record in found.items()
    }


def _stamps(files: list[str], pool: ThreadPoolExecutor) -> dict[str, tuple[int, int]]:
    """Size and modification time of the files that exist."""

    def look(chunk: list[str]) -> list[tuple[str, tuple[int, int]]]:
        stamped = []
        for file in chunk:
            try:
                status = os.stat(file)
            except OSError:
                continue
            stamped.append((file, (status.st_size, status.st_mtime_ns)))
        return stamped

    # In chunks: passing a single file to a thread takes longer than examining it.
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    return dict(chain.from_iterable(pool.map(look, chunks)))


def media_file(path: Path) -> MediaFile:
    """A picture or clip that belongs to no dataset.

    Raises:
        MediaError: it cannot be read.
    """
    locator = Locator(str(path.absolute()))
    record = _identify(locator)
    if isinstance(record, MediaError):
        raise record
    return MediaFile(locator, *record[4:])


def _identify(locator: Locator) -> _Record | MediaError:
    """Reads a file to identify it."""
    try:
        status = os.stat(locator.file)
        probed = probe(locator.source)
        digest = hashlib.blake2b(digest_size=16)
        with locator.open() as content:
            while piece := content.read(COPY_BYTES):
                digest.update(piece)
    except MediaError as error:
        return error
    except OSError as error:
        return MediaError(f"{locator}: cannot be read ({error.strerror})")
    return _Record(
        locator.file,
        locator.part,
        status.st_size,
        status.st_mtime_ns,
        digest.hexdigest(),
        probed.width,
        probed.height,
        probed.frames,
        probed.fps,
        probed.fault,
    )
