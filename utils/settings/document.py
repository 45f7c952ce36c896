"""The documents of the settings, made from the schema: a page of tables, and JSON schemas for editors."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from utils.settings.keys import GROUPS, NESTED, SECTIONS, SPELLINGS, run_keys, spellings
from utils.settings.schema import DatasetSettings, DirectorySettings, ModelSettings, Settings, optimizer_types

_TYPES: Mapping[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
}
_HEAD = """# Settings

Every key of a run's file and of a dataset file. This page is generated from the schema; a key that is not
listed here is refused.

## The run's own keys

They stand at the top of the file, above all tables, or in tables that only group them: {groups}.
"""


def settings_page(options: Mapping[str, type[ModelSettings]]) -> str:
    """`docs/settings.md`: one table of keys a section; `options` are the classes of options by model type."""
    parts = [_HEAD.format(groups=", ".join(f"`[{group}]`" for group in GROUPS))]
    parts.append(_table(Settings, "run", only=run_keys()))
    parts += [_section("### Entries of `eval_datasets`", NESTED["eval_datasets"])]
    parts += [_section("## `[model]`", ModelSettings, "model")]
    parts += [_section("### Entries of `text_encoders`", NESTED["text_encoders"])]
    parts += [_options(kind, cls) for kind, cls in options.items()]
    for name, cls in SECTIONS.items():
        if name == "optimizer":
            classes = optimizer_types().items()
            parts += [_section(f'## `[optimizer]` with `type = "{kind}"`', one) for kind, one in classes]
        elif cls is not None:
            parts.append(_section(f"## `[{name}]`", cls))
    parts.append(_section("## The dataset file", DatasetSettings, "dataset"))
    parts.append(_section("### `[[directory]]`, or `[[datasets]]`", DirectorySettings, "directory"))
    return "\n".join(parts)


def settings_json_schema(options: Mapping[str, type[ModelSettings]]) -> str:
    """`docs/settings.schema.json`: accepts what the reader accepts, as far as one file can tell."""
    whole = Settings.model_json_schema()
    definitions, properties = whole["$defs"], whole["properties"]
    models = []
    for kind, cls in options.items():
        schema = _respelled(cls.model_json_schema(ref_template="#/$defs/{model}"), "model")
        definitions |= schema.pop("$defs", {})
        schema["properties"]["type"] |= {"const": kind}
        models.append(schema)
    run = {key: properties[key] for key in run_keys()}
    sections = {name: properties[name] for name in SECTIONS} | {"model": {"anyOf": models}}
    definitions.pop("ModelSettings", None)
    definitions["Run"] = {"type": "object", "properties": run, "additionalProperties": False}
    groups = {group: {"$ref": "#/$defs/Run"} for group in GROUPS}
    return _json(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "penstock: settings of a run",
            "type": "object",
            "properties": run | sections | groups,
            # Keys of the run may stand in a group: that they are given at all is for the reader to tell.
            "required": ["model", "optimizer"],
            "additionalProperties": False,
            "$defs": definitions,
        }
    )


def dataset_json_schema() -> str:
    """`docs/dataset.schema.json`: accepts what the reader accepts, as far as one file can tell."""
    schema = _respelled(DatasetSettings.model_json_schema(), "dataset")
    definitions = schema["$defs"]
    definitions["DirectorySettings"] = _respelled(definitions["DirectorySettings"], "directory")
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return _json(dialect | schema | {"title": "penstock: a dataset"})


def _options(kind: str, cls: type[ModelSettings]) -> str:
    own = [key for key in cls.model_fields if key not in ModelSettings.model_fields]
    heading = f'### `[model]` with `type = "{kind}"`'
    if not own:
        return f"{heading}\n\nNo keys of its own.\n"
    return f"{heading}\n\n{_table(cls, 'model', only=own)}"


def _section(heading: str, cls: type[BaseModel], spelled_as: str = "") -> str:
    # What stands before a colon is the name, which the heading says already.
    said = (cls.__doc__ or "").split("\n")[0].split(": ", 1)[-1]
    return f"{heading}\n\n{said[:1].upper()}{said[1:]}\n\n{_table(cls, spelled_as)}"


def _table(cls: type[BaseModel], section: str, only: Iterable[str] | None = None) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name in only or cls.model_fields:
        info = cls.model_fields[name]
        names = " or ".join(f"`{spelling}`" for spelling in (name, *spellings(section, name)))
        cells = [names, _type_words(info.annotation), _default(info), info.description or ""]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type_words(annotation: Any) -> str:
    """A type in the words of the reader's messages."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_words(inner[0])
    if origin is Literal:
        return ", ".join(f'`"{choice}"`' for choice in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type_words(choice) for choice in inner if choice is not NoneType)
    if origin is list:
        return f"array of: {_type_words(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(_type_words(part) for part in inner)}]"
    return _TYPES.get(annotation, "table")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if value is None:
        return ""
    return f"`{json.dumps(value)}`"


def _respelled(schema: dict[str, Any], section: str) -> dict[str, Any]:
    """The schema of a table in which a key may be written in its second spelling, but not in both."""
    properties, required = dict(schema["properties"]), set(schema.get("required", ()))
    conditions = []
    for other, key in SPELLINGS[section].items():
        properties[other] = properties[key]
        both = {"required": [key, other]}
        conditions.append({"not": both})
        if key in required:
            conditions.append({"anyOf": [{"required": [key]}, {"required": [other]}]})
            required.remove(key)
    return schema | {"properties": properties, "required": sorted(required), "allOf": conditions}


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, indent=2) + "\n"
