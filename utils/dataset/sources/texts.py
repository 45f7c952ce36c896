"""Reads captions from files and cells."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from utils.dataset.sources.locators import Fault
from utils.json_files import parsed_json
from utils.settings.dataset_schema import DirectorySettings

CAPTION_NAMES = (
    "caption",
    "captions",
    "text",
    "texts",
    "prompt",
    "prompts",
    "description",
    "descriptions",
    "tags",
    "tag_string",
    "text_en",
    "text_zh",
    "image_description",
    "video_description",
)
"""Usual names of columns and keys with captions, in lower case."""

# What programs write where a value is missing. A caption may be "none", as a tag.
_MISSING = frozenset({"nan", "NaN", "NAN", "None", "null", "NULL", "<NA>"})
_REPEATS_PREFIX = re.compile(r"^\d+_")


def given_caption(rules: DirectorySettings, file: str) -> str | None:
    """The caption if it follows from the settings and the name of a file; None if it must be read.

    Underscores in names become spaces. A number and an underscore at the beginning of a folder's name, which some
    trainers read as repeats, are removed: they are not part of the caption, and they do not set repeats here.
    """
    if rules.instance_prompt is not None:
        return rules.instance_prompt
    if rules.caption_source == "filename":
        return PurePath(file).stem.replace("_", " ").strip()
    if rules.caption_source == "foldername":
        return _REPEATS_PREFIX.sub("", PurePath(file).parent.name).replace("_", " ").strip()
    return None


def is_given(rules: DirectorySettings) -> bool:
    """Whether captions follow from the settings and names alone."""
    return given_caption(rules, "") is not None


def caption_ending(rules: DirectorySettings) -> str:
    """`caption_extension` in lower case, with its dot."""
    ending = rules.caption_extension.lower()
    return ending if ending.startswith(".") else f".{ending}"


def captions_in(content: bytes, name: str, key: str | None = None) -> tuple[str, ...]:
    """The captions in a file of this name: its text, or the value of `key` in a .json, by default one of the usual
    keys.

    Raises:
        Fault: there is no caption, or it is not UTF-8, or it stands for a missing one.
    """
    try:
        # Some editors write a byte order mark, which is not part of the text.
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Fault(
            "caption unreadable", f"the caption {name} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    return _captions_in_json(text, name, key) if name.lower().endswith(".json") else (_present(text),)


def captions_of(cell: Any) -> tuple[str, ...]:
    """The captions in a cell of a table: a text, or a list of texts, which may be a text in JSON.

    Raises:
        Fault: there is no caption, or it is not a text.
    """
    if cell is None or (isinstance(cell, float) and cell != cell):
        raise Fault("caption missing", 'the row has no caption; write one ("" trains without)')
    if isinstance(cell, bytes):
        cell = cell.decode(errors="surrogateescape")
    if isinstance(cell, str) and cell.startswith("[") and cell.endswith("]"):
        try:
            cell = parsed_json(cell)
        except ValueError:
            pass
    captions = tuple(cell) if isinstance(cell, list) else (cell,)
    if not captions:
        raise Fault("caption missing", 'the list of captions is empty; write one ("" trains without)')
    for caption in captions:
        if not isinstance(caption, str):
            raise Fault("caption unreadable", f"the caption is {caption!r:.40}, which is no text; put it in quotes")
        if not is_utf8(caption):
            raise Fault("caption unreadable", f"the caption {caption!a:.60} is not UTF-8 text; save the table as UTF-8")
    return tuple(_present(caption.strip()) for caption in captions)


def _present(caption: str) -> str:
    """The caption, unless it is what a program wrote for a missing one."""
    if caption in _MISSING:
        what = f'the caption is {caption!r}, as programs write a missing one; write a caption ("" trains without)'
        raise Fault("caption missing", what)
    return caption


def is_utf8(text: str) -> bool:
    """Whether a text read with `surrogateescape` was UTF-8."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _captions_in_json(text: str, name: str, key: str | None) -> tuple[str, ...]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Fault("caption unreadable", f"the caption {name} is not JSON ({error}); mend it") from None
    if not isinstance(content, Mapping):
        return captions_of(content)
    keys = [key] if key is not None else [one for one in content if one.lower() in CAPTION_NAMES]
    if len(keys) > 1:
        raise Fault("caption unreadable", f"the caption {name} has {', '.join(keys)}; choose one with caption_column")
    if not keys or keys[0] not in content:
        has = ", ".join(content) or "nothing"
        raise Fault("caption missing", f"the caption {name} has {has}; name the right key with caption_column")
    return captions_of(content[keys[0]])
