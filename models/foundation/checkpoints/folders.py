"""Are the files that the `[model]` table names there? Told before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from models.foundation.checkpoints.headers import read_header
from models.foundation.checkpoints.recognition import FOLDERS
from utils.errors import Problem, UserError
from utils.json_files import read_json
from utils.settings.model_schema import ModelSettings


def check_diffusers_folder(
    options: ModelSettings,
    parts: Sequence[str],
    overrides: Mapping[str, str],
    text_encoders: Mapping[str, str],
    denoiser: str = "transformer",
) -> None:
    """Whether `diffusers_path` is a diffusers folder with all parts, and whether their configurations and the headers
    of their weights can be read.

    A part whose weights come from elsewhere still needs its configuration here, since single files have none.

    Args:
        parts: subfolders that the model needs.
        overrides: part -> the option that names a file with its weights.
        text_encoders: part -> its `type` in the option `text_encoders`.
        denoiser: the part that needs no weights with `from_scratch`.

    Raises:
        UserError: listing everything that is missing or damaged.
    """
    folder = options.diffusers_path
    assert folder is not None, "the settings' rules ask for it"
    check_folder_type(options)
    check_text_encoder_types(options, list(text_encoders.values()))
    present = [part for part in parts if (folder / part).is_dir()]
    problems = [
        Problem(str(folder), part, "this part is missing; download the whole diffusers folder")
        for part in parts
        if part not in present
    ]
    weights = {
        **{part: (getattr(options, option), f"[model] {option}") for part, option in overrides.items()},
        **{part: (part_override(options, name), "[model] text_encoders") for part, name in text_encoders.items()},
    }
    if options.from_scratch:
        weights.pop(denoiser, None)
    checks: list[Callable[[], object]] = [partial(read_json, folder / part / _config_name(part)) for part in present]
    for part, (override, option) in weights.items():
        if override is not None:
            checks.append(partial(read_header, override))
        elif part in present and any((folder / part).glob("*.safetensors*")):
            checks.append(partial(read_header, folder / part))
        elif part in present:
            hint = f"no .safetensors here; download them, or name a file with {option}"
            problems.append(Problem(str(folder / part), "weights", hint))
    problems += problems_of(checks)
    if problems:
        raise UserError(problems)


def check_folder_type(options: ModelSettings) -> None:
    """Whether `diffusers_path` is, by what it says itself, of this type of model.

    Raises:
        UserError: it is of another one; with that.
    """
    index = options.diffusers_path / "model_index.json"
    named = read_json(index).get("_class_name") if index.is_file() else None
    fitting = FOLDERS.get(named, options.type) if isinstance(named, str) else options.type
    if fitting != options.type:
        raise UserError.of(
            f'is of {named}: set [model] type = "{fitting}", or give the folder of a model of type "{options.type}"',
            str(index),
        )


def _config_name(part: str) -> str:
    kinds = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
    return kinds.get(part.split("_")[0], "config.json")


def problems_of(checks: Iterable[Callable[[], object]]) -> list[Problem]:
    """What all of some checks tell, each of which raises a UserError or does nothing."""
    problems: list[Problem] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += error.problems
    return problems


def check_text_encoder_types(options: ModelSettings, types: Sequence[str]) -> None:
    """Whether every entry of `text_encoders` names one of the model's encoders, and no two the same."""
    seen = [entry.type for entry in options.text_encoders]
    wrong = [name for name in seen if name not in types]
    twice = {name for name in seen if seen.count(name) > 1}
    if wrong:
        raise UserError.of(
            f"'{wrong[0]}' is none of this model's text encoders; it has {', '.join(types)}",
            where="[model] text_encoders",
        )
    if twice:
        raise UserError.of(f"'{twice.pop()}' is given twice", where="[model] text_encoders")


def part_override(options: ModelSettings, text_encoder: str) -> Path | None:
    """The file that replaces a text encoder's weights, if one is given."""
    return next((entry.path for entry in options.text_encoders if entry.type == text_encoder), None)


def read_config(
    folder: Path, part: str = "", *, model: str | tuple[str, ...], keys: Sequence[str] = ()
) -> dict[str, Any]:
    """The configuration of a part of a diffusers folder.

    Args:
        model: the class of diffusers, or the `model_type` of transformers, that it must be of; or those it may be of.
        keys: what it must have.

    Raises:
        UserError: it is missing or damaged, or another model's.
    """
    file = folder / part / "config.json"
    config = read_json(file)
    known = (model,) if isinstance(model, str) else model
    named = config.get("_class_name", config.get("model_type", known[0]))
    if named not in known:
        raise UserError.of(f"is a configuration of {named}; one of {' or '.join(known)} belongs here", str(file))
    if missing := [key for key in keys if key not in config]:
        raise UserError.of(f"lacks `{missing[0]}`; download it again", str(file))
    return config
