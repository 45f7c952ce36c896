"""The documents of the settings, made from the schema: a page of tables, and JSON schemas for editors."""

import json
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from utils.settings.choices import Classes, own_keys
from utils.settings.dataset_schema import DataKeys, DatasetSettings, DirectorySettings
from utils.settings.deepspeed_keys import DeepSpeedSettings
from utils.settings.keys import CHOSEN, GROUPS, NESTED, SECTIONS, SPELLINGS, run_keys, spellings
from utils.settings.schema import Settings
from utils.settings.values import SettingsTable

# Names of types, in the singular and in the plural.
_TYPES: Mapping[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    str: ("text", "texts"),
    Path: ("path", "paths"),
}
_TABLE = ("table", "tables")
DIALECT = "https://json-schema.org/draft/2020-12/schema"
# The first key of each group of a dataset's keys, in the schema's order.
DATA_GROUPS: Mapping[str, str] = {
    "Sizes": "resolutions",
    "Variants": "augment_variants",
    "Clips": "framerate",
    "Captions": "caption_source",
    "Masks, controls, weights": "alpha_mask",
    "How often, and when": "num_repeats",
    "What is read": "recursive",
}
_HEAD = """# Settings

Every key of a run's file and of a dataset file. This page is generated from the schema; a key that is not
listed here is refused, unless it is one of another trainer's that says the same or nothing
([diffusion-pipe's](coming_from_diffusion_pipe.md)).

## The run's own keys

Write them at the top of the file, above all tables, or in tables that only group them: {groups}.
"""
# Table -> its keys that are arrays of tables.
ENTRIES: Mapping[str, tuple[str, ...]] = {
    "model": ("text_encoders", "preset_adapters"),
    "adapter": ("adapter.rules",),
    "optimizer": ("rules",),
    "sampling": ("samples",),
}
# Tables whose `type` may have any capitals -> what may stand between its letters.
ANY_CAPITALS: Mapping[str, str] = {"optimizer": "[-_]*", "model": "[-_]*"}
# Tables whose `type` may be the path of somebody's class, whose keys are its arguments.
BY_PATH: Mapping[str, list[dict[str, Any]]] = {
    "optimizer": [
        {
            "title": "A class by its path",
            "type": "object",
            "properties": {
                "type": {"type": "string", "pattern": r"\.", "examples": ["pytorch_optimizer.Adan"]},
                "lr": {"type": "number", "exclusiveMinimum": 0},
            },
            "required": ["type", "lr"],
        }
    ]
}
NO_KEYS = "No keys of its own.\n"
_SHARED = """### Keys of the file or of a `[[directory]]`

At the top of the file, above all tables, a key applies to every directory; in a `[[directory]]` it applies to that one
and overrides the top of the file.
"""


def settings_page(classes: Mapping[str, Classes]) -> str:
    """`docs/settings.md`: one table of keys a section.

    Args:
        classes: section whose `type` chooses a class -> its classes by type.
    """
    parts = [_HEAD.format(groups=", ".join(f"`[{group}]`" for group in GROUPS))]
    parts.append(_table(Settings, "run", only=run_keys()))
    parts.append(_section("### Entries of `eval_datasets`", NESTED["eval_datasets"]))
    parts.append(_section("### `[deepspeed_config]`", DeepSpeedSettings))
    for name, cls in SECTIONS.items():
        parts.append(_section(f"## `[{name}]`", cls, name))
        for key in ENTRIES.get(name, ()):
            parts.append(_section(f"### Entries of `{key.rpartition('.')[2]}`", NESTED[key]))
        parts += [_of_type(name, kind, one) for kind, one in (classes[name] if name in CHOSEN else {}).items()]
    parts.append(_section("## The dataset file", DatasetSettings, "dataset", only=_own_keys(DatasetSettings)))
    directory = _own_keys(DirectorySettings)
    parts.append(_section("### `[[directory]]`, or `[[datasets]]`", DirectorySettings, "directory", only=directory))
    parts.append(_SHARED)
    parts += [f"#### {title}\n\n{_table(DataKeys, 'directory', only=keys)}" for title, keys in data_groups().items()]
    return "\n".join(parts)


def data_groups() -> dict[str, list[str]]:
    """The keys that a dataset file and its directories share, by the title of their group."""
    keys = list(DataKeys.model_fields)
    bounds = [*map(keys.index, DATA_GROUPS.values()), len(keys)]
    return {title: keys[bounds[n] : bounds[n + 1]] for n, title in enumerate(DATA_GROUPS)}


def _own_keys(cls: type[DataKeys]) -> list[str]:
    """The keys that a dataset file and its directories do not share."""
    return [key for key in cls.model_fields if key not in DataKeys.model_fields]


def settings_json_schema(classes: Mapping[str, Classes]) -> str:
    """`docs/settings.schema.json`: accepts what the reader accepts, as far as one file can tell, except for other
    trainers' keys, which an editor should mark.

    Args:
        classes: as in `settings_page`.
    """
    whole = Settings.model_json_schema()
    definitions, properties = whole["$defs"], whole["properties"]
    sections = {name: properties[name] for name in SECTIONS}
    for name in CHOSEN:
        shared, kinds, further = _by_type(name, classes[name])
        definitions |= further | {SECTIONS[name].__name__: shared}
        nothing = [{"type": "null"}] if properties[name].get("default", ...) is None else []
        sections[name] = {"anyOf": [*kinds, *BY_PATH.get(name, ()), *nothing]}
    run = {key: properties[key] for key in run_keys()}
    definitions["Run"] = {"type": "object", "properties": run, "additionalProperties": False}
    groups = {group: {"$ref": "#/$defs/Run"} for group in GROUPS}
    return _json(
        {
            "$schema": DIALECT,
            "title": "penstock: settings of a run",
            "type": "object",
            "properties": run | sections | groups,
            # Keys of the run may be written in a group; whether they are given at all is checked by the reader.
            "required": ["model", "optimizer"],
            "additionalProperties": False,
            "$defs": definitions,
        }
    )


def _by_type(section: str, classes: Classes) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The keys of a section that all types share, those of each type beside them, and what these refer to.

    A class may narrow what a shared key takes: both must hold. What every class requires is required of all.
    """
    shared_class, definitions = SECTIONS[section], {}
    schemas = {}
    for kind, cls in {"": shared_class, **classes}.items():
        schemas[kind] = _respelled(cls.model_json_schema(ref_template="#/$defs/{model}"), section)
        definitions |= schemas[kind].pop("$defs", {})
    shared = schemas.pop("")
    required = set(shared["required"]).intersection(*(schema["required"] for schema in schemas.values()))
    kinds = []
    for kind, schema in schemas.items():
        own = {key: value for key, value in schema["properties"].items() if shared["properties"].get(key) != value}
        further = sorted(set(schema["required"]) - required)
        kinds.append(
            {
                "title": schema["title"],
                **({"description": schema["description"]} if "description" in schema else {}),
                "$ref": f"#/$defs/{shared_class.__name__}",
                "properties": own | {"type": _type_schema(section, kind)},
                **({"required": further} if further else {}),
                "unevaluatedProperties": False,
            }
        )
    del shared["additionalProperties"]
    return shared | {"required": sorted(required)}, kinds, definitions


def _type_schema(section: str, kind: str) -> dict[str, Any]:
    """The spellings of a type: models and optimizers in any capitals, with or without hyphens; one alone otherwise."""
    if section not in ANY_CAPITALS:
        return {"const": kind}
    between, letters = ANY_CAPITALS[section], [letter for letter in kind if letter not in "-_"]
    spelled = [f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in letters]
    return {"type": "string", "pattern": f"^{between.join(spelled)}$", "examples": [kind]}


def dataset_json_schema() -> str:
    """`docs/dataset.schema.json`: accepts what the reader accepts, as far as one file can tell."""
    schema = _respelled(DatasetSettings.model_json_schema(), "dataset")
    definitions = schema["$defs"]
    definitions["DirectorySettings"] = _respelled(definitions["DirectorySettings"], "directory")
    return _json({"$schema": DIALECT} | schema | {"title": "penstock: a dataset"})


def _of_type(section: str, kind: str, cls: type[SettingsTable]) -> str:
    """The keys of one type that are not as all types have them."""
    heading = f'### `[{section}]` with `type = "{kind}"`'
    own = own_keys(cls, SECTIONS[section])
    # What a model is, supported_models.md says.
    said = "" if section == "model" else f"{_said(cls)}\n\n"
    return f"{heading}\n\n{said}{_table(cls, section, only=own) if own else NO_KEYS}"


def _section(heading: str, cls: type[BaseModel], spelled_as: str = "", only: Iterable[str] | None = None) -> str:
    return f"{heading}\n\n{_said(cls)}\n\n{_table(cls, spelled_as, only)}"


def _said(cls: type[BaseModel]) -> str:
    """What the first line of a class says, without the name before a colon, which a heading says already."""
    said = (cls.__doc__ or "").split("\n")[0].split(": ", 1)[-1]
    return said[:1].upper() + said[1:]


def _table(cls: type[BaseModel], section: str, only: Iterable[str] | None = None) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name in only or cls.model_fields:
        info = cls.model_fields[name]
        cells = [_names(cls, section, name), _type_words(info.annotation), _default(info), info.description or ""]
        # A row is one line.
        rows.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _names(cls: type[BaseModel], section: str, key: str) -> str:
    """A key and its second spellings, of which a directory has some that the top of a file has not."""
    names = [f"`{key}`"]
    for other in spellings(section, key):
        only_there = cls is DataKeys and other not in SPELLINGS["dataset"]
        names.append(f"`{other}`" + (" (in a `[[directory]]`)" if only_there else ""))
    return " or ".join(names)


def _type_words(annotation: Any, several: bool = False) -> str:
    """A type in the words of the reader's messages; of `several` of them."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_words(inner[0], several)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type_words(choice, several) for choice in inner if choice is not NoneType)
    if origin is list:
        return f"array{'s' if several else ''} of {_type_words(inner[0], several=True)}"
    if origin is tuple:
        return f"[{', '.join(map(_type_words, inner))}]"
    if origin is dict and inner[1] is not Any:
        return f"{_TABLE[several]} of {_type_words(inner[1], several=True)}"
    return _TYPES.get(annotation, _TABLE)[several]


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if value is None:
        return ""
    return f"`{json.dumps(value)}`"


def _respelled(schema: dict[str, Any], section: str) -> dict[str, Any]:
    """The schema of a table in which a key may be written in any of its spellings, but in one alone."""
    properties, required = dict(schema["properties"]), set(schema.get("required", ()))
    conditions: list[dict[str, Any]] = []
    for key in dict.fromkeys(SPELLINGS.get(section, {}).values()):
        names = [key, *spellings(section, key)]
        properties |= dict.fromkeys(names, properties[key])
        conditions += [{"not": {"required": list(pair)}} for pair in combinations(names, 2)]
        if key in required:
            conditions.append({"anyOf": [{"required": [name]} for name in names]})
            required.remove(key)
    spelled = {"properties": properties, "required": sorted(required)}
    return schema | spelled | ({"allOf": conditions} if conditions else {})


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, indent=2) + "\n"
