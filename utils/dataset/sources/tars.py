"""Tar files of samples: members with the same stem belong together, as in WebDataset.

The stem is the name up to the first dot behind the last slash; the rest behind that dot is called the ending here.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from utils.dataset.sources.columns import MASK_NAMES
from utils.dataset.sources.folders import MEDIA_SUFFIXES, Beside
from utils.dataset.sources.locators import Entry, Fault, Listing, Locator
from utils.dataset.sources.names import normal
from utils.dataset.sources.tar_index import TarIndex, index_tar
from utils.dataset.sources.texts import caption_ending, captions_in, given_caption, is_given
from utils.settings.dataset_schema import DirectorySettings

_CAPTION_ENDINGS = ("txt", "caption", "json")
_SAMPLES_BETWEEN_HEEDS = 1024


def list_tars(
    tars: list[Path], rules: DirectorySettings, raise_if_stopping: Callable[[], None], remember: Path | None
) -> Listing:
    """Every sample in the tars.

    Raises:
        SourceProblem: one of them cannot be read at all.
    """
    beside = Beside(rules, raise_if_stopping)
    listing = Listing()
    for path in tars:
        index = index_tar(path, raise_if_stopping, remember)
        listing.rejected.extend(Fault(kind, reason).at(f"{path}: {name}") for name, kind, reason in index.faults)
        _list_one(index, rules, beside, listing, raise_if_stopping)
    return listing


def _list_one(
    index: TarIndex, rules: DirectorySettings, beside: Beside, listing: Listing, raise_if_stopping: Callable[[], None]
) -> None:
    with index.path.open("rb", buffering=0) as file:

        def read(name: str) -> bytes:
            offset, length = index.members[name]
            return os.pread(file.fileno(), length, offset)

        for count, (stem, members) in enumerate(_samples(index.members)):
            if count % _SAMPLES_BETWEEN_HEEDS == 0:
                raise_if_stopping()
            roles = _roles(members, rules)
            try:
                listing.entries.append(_entry(stem, roles, index, rules, beside, read))
            except Fault as fault:
                listing.rejected.append(fault.at(f"{index.path}: {roles.media or stem}"))
            for name in roles.unused:
                reason = f"{roles.media} is used of this sample; if this is a control image, name it in data_file_keys"
                listing.rejected.append(Fault("not read", reason).at(f"{index.path}: {name}"))


def _samples(members: Iterable[str]) -> Iterable[tuple[str, dict[str, str]]]:
    """The names of the members by stem and by ending, in lower case."""
    samples: dict[str, dict[str, str]] = defaultdict(dict)
    for name in sorted(members):
        folder, base = os.path.split(name)
        stem, _, ending = base.partition(".")
        samples[normal(os.path.join(folder, stem))][ending.lower()] = name
    return samples.items()


class _Roles(NamedTuple):
    """The roles of a sample's members; a missing control has its key and None in `controls`."""

    media: str | None
    controls: list[tuple[str, str | None]]
    mask: str | None
    caption: str | None
    unused: list[str]


def _roles(members: Mapping[str, str], rules: DirectorySettings) -> _Roles:
    controls = [(key, _by_key(members, key)) for key in rules.data_file_keys]
    mask = next((members[ending] for ending in members if ending.partition(".")[0] in MASK_NAMES), None)
    taken = {mask, *(name for _, name in controls)}
    # Sorted: among "jpg" and "depth.jpg", the first is the one to which the others belong.
    pictures = [
        members[ending]
        for ending in sorted(members, key=lambda ending: (ending.count("."), ending))
        if f".{ending.rpartition('.')[2]}" in MEDIA_SUFFIXES and members[ending] not in taken
    ]
    endings = (caption_ending(rules).removeprefix("."), *_CAPTION_ENDINGS)
    caption = next((members[ending] for ending in endings if ending in members), None)
    return _Roles(pictures[0] if pictures else None, controls, mask, caption, pictures[1:])


def _by_key(members: Mapping[str, str], key: str) -> str | None:
    """The member with the ending `key`, which may lack its last part, such as "depth" for "depth.png"."""
    key = key.lower().removeprefix(".")
    return next((members[ending] for ending in members if key in (ending, os.path.splitext(ending)[0])), None)


def _entry(
    stem: str,
    roles: _Roles,
    index: TarIndex,
    rules: DirectorySettings,
    beside: Beside,
    read: Callable[[str], bytes],
) -> Entry:
    if roles.media is None:
        raise Fault("no picture", "no member of this stem is a picture or clip")
    if is_given(rules):
        captions = (given_caption(rules, f"{index.path.with_suffix('')}/{roles.media}"),)
    elif roles.caption is None:
        ending = caption_ending(rules)
        raise Fault("caption missing", f"there is no caption; pack it as {stem}{ending} (an empty one trains without)")
    else:
        captions = captions_in(read(roles.caption), roles.caption, rules.caption_column)
    controls = beside.controls(stem)
    for key, name in roles.controls:
        if name is None:
            raise Fault("control missing", f"no member of this stem has the ending {key} of data_file_keys; pack one")
        controls += (Locator(str(index.path), name, index),)
    mask = Locator(str(index.path), roles.mask, index) if roles.mask else beside.mask(stem)
    return Entry(Locator(str(index.path), roles.media, index), captions, controls, mask)
