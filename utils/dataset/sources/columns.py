"""Finds out what the columns of a table contain."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from utils.dataset.sources.locators import SourceProblem
from utils.dataset.sources.texts import CAPTION_NAMES, is_given
from utils.settings.dataset_schema import DirectorySettings

# Usual names, in lower case.
FILE_NAMES = (
    "file",
    "file_name",
    "filename",
    "file_path",
    "filepath",
    "path",
    "image",
    "image_file",
    "image_path",
    "img_path",
    "video",
    "video_file",
    "video_path",
    "media",
    "media_path",
)
MASK_NAMES = ("mask", "mask_file", "mask_image", "mask_path")
REPEATS_NAMES = ("repeats", "num_repeats")
DIGEST_NAMES = ("md5", "hash", "sha1", "sha256", "image_md5", "md5sum")


@dataclass(frozen=True)
class Columns:
    """Names of columns; None or empty if the table has no such column. `media` holds files or their bytes."""

    media: str
    caption: str | None
    controls: tuple[str, ...]
    mask: str | None
    repeats: str | None
    digest: str | None

    @property
    def used(self) -> set[str]:
        """All of them."""
        own = {self.media, self.caption, *self.controls, self.mask, self.repeats, self.digest}
        return {name for name in own if name is not None}


def find_columns(
    present: Sequence[str], rules: DirectorySettings, *, cells: Collection[str] = (), media: str | None = None
) -> Columns:
    """The contents of a table's columns, by the settings and by usual names.

    Args:
        cells: the columns that hold the bytes of files; one of them is then the media.
        media: the column of the media, if it is known.

    Raises:
        SourceProblem: a column is missing, or several could be meant.
    """
    twice = sorted({name for name in present if present.count(name) > 1})
    if twice:
        raise SourceProblem(f"the table has several columns called {twice[0]}; rename all but one")
    controls = tuple(_there("data_file_keys", name, present) for name in rules.data_file_keys)
    free = [name for name in present if name not in controls]
    mask = _usual("mask", free, MASK_NAMES)
    media = media or _media([name for name in free if name != mask], rules, cells)
    return Columns(
        media,
        _caption([name for name in free if name not in (media, mask)], present, rules),
        controls,
        mask,
        _usual("number of repeats", free, REPEATS_NAMES),
        _usual("digest", free, DIGEST_NAMES) if rules.deduplicate else None,
    )


def _media(free: Sequence[str], rules: DirectorySettings, cells: Collection[str]) -> str:
    """The column of the media. If cells hold bytes, a column of files only says where these came from."""
    held = [name for name in free if name in cells]
    if rules.image_column is not None:
        if _there("image_column", rules.image_column, free) not in held:
            raise SourceProblem(f"image_column = {rules.image_column!r}: this column holds no bytes of pictures")
        return rules.image_column
    if rules.file_column is not None:
        return _there("file_column", rules.file_column, free)
    if held:
        return held[0] if len(held) == 1 else _one_of("picture", held, FILE_NAMES, "image_column")
    return _one_of("file", free, FILE_NAMES, "file_column")


def _caption(free: Sequence[str], present: Sequence[str], rules: DirectorySettings) -> str | None:
    if is_given(rules):
        return None
    if rules.caption_column is not None:
        return _there("caption_column", rules.caption_column, present)
    return _one_of("caption", free, CAPTION_NAMES, "caption_column")


def _there(key: str, name: str, present: Sequence[str]) -> str:
    if name in present:
        return name
    near = get_close_matches(name, present, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(present)}"
    raise SourceProblem(f"{key}: the table has no column {name}; {hint}")


def _matches(free: Sequence[str], names: Collection[str]) -> list[str]:
    return [name for name in free if name.strip().lower() in names]


def _usual(what: str, free: Sequence[str], names: Collection[str]) -> str | None:
    found = _matches(free, names)
    if len(found) > 1:
        raise SourceProblem(f"the columns {', '.join(found)} could all be the {what}; rename all but one")
    return found[0] if found else None


def _one_of(what: str, free: Sequence[str], names: Collection[str], key: str) -> str:
    found = _matches(free, names)
    if len(found) == 1:
        return found[0]
    if found:
        raise SourceProblem(f'the columns {", ".join(found)} could all be the {what}; choose with {key} = "{found[0]}"')
    raise SourceProblem(f"no column looks like the {what}; there are {', '.join(free)}; name it with {key}")
