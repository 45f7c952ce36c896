"""Files of prompts: a line of text each, with flags as kohya's scripts have them, or tables in JSON or TOML."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import Problem, UserError, printable
from utils.settings.keys import closest
from utils.settings.run_tables import SampleSettings
from utils.settings.tables import adopt, check, one_table

CFG = "cfg_scale"
"""Guidance by a second prediction, which other trainers tell from the guidance that is an input of a model."""
_OTHER_FLAGS = {
    "ss": "a sampler; samples are drawn with the model's own scheduler",
    "fs": "a shift of times; samples are drawn with that of the model's own scheduler",
    "cn": "a ControlNet's picture; control images are --ci",
    "ctr": "ratios for a ControlNet",
    "of": "a folding of frames",
    "nf": "a number of frames to skip",
    "t": "a tiling",
    "i2v": "a kind of clip, which the model's files decide here",
}
"""Flags of other trainers that have no counterpart -> what they are."""
_SPELLINGS = {
    "sample_steps": "steps",
    "num_inference_steps": "steps",
    "frame_count": "frames",
    "num_frames": "frames",
    "guidance_scale": "guidance",
    "scale": CFG,
    "control_image": "control_images",
    "control_image_path": "control_images",
    "image_path": "control_images",
    "control_image_mask_path": "mask_image",
    "additional_multiplier": "adapter_scale",
}
"""In JSON and TOML, other trainers' keys -> ours."""


@dataclass(frozen=True)
class Entry:
    """A sample that a file asks for.

    Attributes:
        where: its place in the file.
        cfg: its guidance by a second prediction, if that is told apart.
    """

    where: str
    settings: SampleSettings
    cfg: float | None = None


@dataclass(frozen=True)
class PromptFile:
    """What a file of prompts says.

    Attributes:
        text: the whole of it.
        remarks: what of it is not used.
    """

    path: Path
    text: str
    entries: Sequence[Entry]
    remarks: Sequence[Problem] = ()


def text_of(path: Path) -> str:
    """A file of prompts as it is written.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError.of(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError.of(f"is not written in UTF-8: {error}", str(path)) from None


def read_prompts(path: Path) -> PromptFile:
    """The samples that the file asks for; see `parse`.

    Raises:
        UserError: it cannot be read, or something in it is wrong.
    """
    return parse(path, text_of(path))


def parse(path: Path, text: str) -> PromptFile:
    """What a file of prompts says whose content is `text`: `.json` and `.toml` are tables, anything else lines.

    Raises:
        UserError: lists all that is wrong in it.
    """
    problems, remarks, entries = [], [], []
    tables = {".json": _of_json, ".toml": _of_toml}.get(path.suffix.lower(), _of_lines)
    for where, keys, found, unused in tables(path, text):
        remarks += unused
        problems += found
        try:
            entries.append(_entry(path, where, keys))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    if not entries:
        raise UserError.of("has no prompts; write some, or leave [sampling] prompt_file out", str(path))
    return PromptFile(path, text, entries, remarks)


_Told = tuple[str, dict[str, Any], list[Problem], list[Problem]]
"""Where, keys with their values, what is wrong, what is not used."""


def _entry(path: Path, where: str, keys: Mapping[str, Any]) -> Entry:
    table = one_table(str(path), "samples", where, {_SPELLINGS.get(key, key): value for key, value in keys.items()})
    cfg = table.keys.pop(CFG, None)
    if cfg is not None and (isinstance(cfg, bool) or not isinstance(cfg, int | float) or cfg < 0):
        table.complain(f"{where} {CFG}", f"must be a number, at least 0; given: {printable(cfg)}")
    if isinstance(prompt := table.keys.get("prompt"), str) and not prompt.strip():
        table.complain(where, "has no prompt; write one before the first flag")
    known = list(SampleSettings.model_fields)
    adopt(table, known)
    settings = check(SampleSettings, table, known, {}).sound()
    return Entry(where, settings, None if cfg is None else float(cfg))


def _of_lines(path: Path, text: str) -> Iterator[_Told]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"line {number}"
        prompt, *flags = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line.strip())
        keys, problems, remarks = {"prompt": prompt.strip()}, [], []
        for flag in flags:
            name, _, value = (part.strip() for part in flag.partition(" "))
            if name in _OTHER_FLAGS:
                remarks.append(Problem(str(path), f"{where} --{name}", f"is not used: it is {_OTHER_FLAGS[name]}"))
                continue
            try:
                key, told = _told_by(name, value)
            except ValueError as error:
                problems.append(Problem(str(path), f"{where} --{printable(name)}", str(error)))
                continue
            if key in keys:
                problems.append(Problem(str(path), f"{where} --{name}", "is given twice; keep one of them"))
            keys[key] = told
        yield where, keys, problems, remarks


def _told_by(name: str, value: str) -> tuple[str, Any]:
    """The key of a flag, and its value.

    Raises:
        ValueError: there is no such flag, or its value is of another kind.
    """
    if name not in _FLAGS:
        near = closest(name, _FLAGS)
        known = f"did you mean --{near}?" if near and len(name) > 1 else f"known are {', '.join(_FLAGS)}"
        raise ValueError(f"no such flag; {known}")
    key, convert = _FLAGS[name]
    if not value:
        raise ValueError("has no value; write one, or leave it out")
    return key, convert(value)


def _whole(value: str) -> int:
    if not re.fullmatch(r"-?\d+", value):
        raise ValueError(f"must be a whole number; given: {printable(value)}")
    return int(value)


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"must be a number; given: {printable(value)}") from None


def _files(value: str) -> list[str]:
    """One file a flag: spaces and commas are part of names."""
    return [value]


_FLAGS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "w": ("width", _whole),
    "h": ("height", _whole),
    "f": ("frames", _whole),
    "d": ("seed", _whole),
    "s": ("steps", _whole),
    "l": (CFG, _number),
    "g": ("guidance", _number),
    "n": ("negative_prompt", str),
    "ci": ("control_images", _files),
    "i": ("control_images", _files),
    "cim": ("mask_image", str),
    "am": ("adapter_scale", _number),
}
"""Flags of a line -> their keys, and what makes values of texts."""


def _of_json(path: Path, text: str) -> Iterator[_Told]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError.of(f"is not JSON: {error}", str(path)) from None
    except RecursionError:
        raise UserError.of("is not JSON: too many brackets in one another", str(path)) from None
    if isinstance(content, dict) and content and all(isinstance(value, str) for value in content.values()):
        if "prompt" not in content:
            # A library of prompts by name.
            content = list(content.values())
    yield from _of_tables(path, content)


def _of_toml(path: Path, text: str) -> Iterator[_Told]:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError.of(f"is not valid TOML: {error}", str(path)) from None
    yield from _of_tables(path, content)


def _of_tables(path: Path, content: Any) -> Iterator[_Told]:
    """A list of prompts or of tables, alone or under `samples`; or kohya's, where a table `prompt` has what all share
    and a list `subset`."""
    shared: dict[str, Any] = {}
    if isinstance(content, dict) and isinstance(content.get("prompt"), dict):
        shared = {key: value for key, value in content["prompt"].items() if key != "subset"}
        others, content = content.keys() - {"prompt"}, content["prompt"].get("subset")
    elif isinstance(content, dict) and "samples" in content:
        others, content = content.keys() - {"samples"}, content["samples"]
    else:
        others, content = set(), [content] if isinstance(content, dict) and "prompt" in content else content
    for key in sorted(others):
        message = "no such key; samples are entries of `samples`, with all their keys"
        raise UserError.of(message, str(path), f"key `{printable(key)}`")
    if not isinstance(content, list):
        raise UserError.of("is no list of samples; write one, each with `prompt` and its other keys", str(path))
    for number, written in enumerate(content, start=1):
        where = f"sample {number}"
        if not isinstance(written, str | dict):
            shown = json.dumps(written, default=str)[:60]
            raise UserError.of(f"must be a prompt, or a table with `prompt`; given: {shown}", str(path), where)
        yield where, {**shared, **({"prompt": written} if isinstance(written, str) else written)}, [], []
