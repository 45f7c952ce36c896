"""Are the files that the `[model]` table names there? Told before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.settings.errors import Problem, SettingsError
from utils.settings.schema import ModelSettings


def check_diffusers_folder(
    options: ModelSettings, parts: Sequence[str], overrides: Mapping[str, str], denoiser: str = "transformer"
) -> None:
    """Whether `diffusers_path` is a diffusers folder with all parts.

    A part whose weights come from elsewhere still needs its configuration here, since single files have none.

    Args:
        parts: subfolders that the model needs.
        overrides: part -> the option that names a file with its weights.
        denoiser: the part that needs no weights with `from_scratch`.

    Raises:
        SettingsError: listing everything that is missing.
    """
    folder = options.diffusers_path
    if folder is None:
        raise SettingsError.of(
            "is needed: single files hold neither configurations nor tokenizers. Give the model's folder in diffusers' "
            "layout (its weights may be left out of it where another path gives them)",
            where="[model] diffusers_path",
        )
    problems = [
        Problem(str(folder), part, "this part is missing; download the whole diffusers folder")
        for part in parts
        if not (folder / part).is_dir()
    ]
    problems += [
        Problem(str(folder / part), "config.json", "is missing; download the whole diffusers folder")
        for part in parts
        if not part.startswith(("tokenizer", "scheduler"))
        if (folder / part).is_dir() and not (folder / part / "config.json").is_file()
    ]
    for part, option in overrides.items():
        needs_weights = getattr(options, option) is None and not (part == denoiser and options.from_scratch)
        if (folder / part).is_dir() and needs_weights and not any((folder / part).glob("*.safetensors")):
            problems.append(
                Problem(
                    str(folder / part),
                    "weights",
                    f"no .safetensors here; download them, or name a file with [model] {option}",
                )
            )
    if problems:
        raise SettingsError(problems)


def check_text_encoder_types(options: ModelSettings, types: Sequence[str]) -> None:
    """Whether every entry of `text_encoders` names one of the model's encoders, and no two the same."""
    seen = [entry.type for entry in options.text_encoders]
    wrong = [name for name in seen if name not in types]
    twice = {name for name in seen if seen.count(name) > 1}
    if wrong:
        raise SettingsError.of(
            f"'{wrong[0]}' is none of this model's text encoders; it has {', '.join(types)}",
            where="[model] text_encoders",
        )
    if twice:
        raise SettingsError.of(f"'{twice.pop()}' is given twice", where="[model] text_encoders")


def part_override(options: ModelSettings, text_encoder: str) -> Path | None:
    """The file that replaces a text encoder's weights, if one is given."""
    return next((entry.path for entry in options.text_encoders if entry.type == text_encoder), None)


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a part of a diffusers folder.

    Raises:
        SettingsError: it is missing or damaged.
    """
    file = folder / part / "config.json"
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError.of(f"this configuration cannot be read ({error}); download it again", str(file)) from error
