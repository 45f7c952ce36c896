"""The generated documents name every key, in all its spellings, with what it means."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.utils.settings.conftest import TinyOptions
from utils.settings.document import dataset_json_schema, settings_json_schema, settings_page
from utils.settings.keys import GROUPS, NESTED, SECTIONS, SPELLINGS, run_keys
from utils.settings.schema import DatasetSettings, ModelSettings, Settings, optimizer_types

OPTIONS = {"tiny": TinyOptions}
TABLES = [Settings, TinyOptions, DatasetSettings, *NESTED.values(), *optimizer_types().values()]
TABLES += [cls for cls in SECTIONS.values() if cls is not None]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(settings_json_schema(OPTIONS))


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from [value] if key == "$ref" else references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


@pytest.mark.parametrize("cls", TABLES)
def test_every_key_is_documented(cls: type[ModelSettings]) -> None:
    page = settings_page(OPTIONS)
    for name, info in cls.model_fields.items():
        assert info.description, f"{cls.__name__}.{name} has no docstring"
        if name not in SECTIONS:
            assert f"| `{name}`" in page
            assert info.description in page


def test_the_page_shows_types_defaults_and_spellings() -> None:
    page = settings_page(OPTIONS)
    assert "| `seed` | whole number | `0` |" in page
    assert "| `vae_path` or `vae` | path |  |" in page
    assert "| `betas` | [number, number] | `[0.9, 0.999]` |" in page
    assert '### `[model]` with `type = "tiny"`' in page
    assert "| `max_sequence_length` | whole number | `16` | Tokens of a caption. |" in page


def test_the_runs_keys_are_accepted_at_the_top_and_in_groups(schema: dict[str, Any]) -> None:
    assert schema["properties"].keys() == {*run_keys(), *SECTIONS, *GROUPS}
    for group in GROUPS:
        assert schema["properties"][group] == {"$ref": "#/$defs/Run"}
    assert schema["$defs"]["Run"]["properties"].keys() == set(run_keys())


def test_both_spellings_are_accepted_but_not_together(schema: dict[str, Any]) -> None:
    (model,) = schema["properties"]["model"]["anyOf"]
    assert model["properties"]["type"]["const"] == "tiny"
    assert {*TinyOptions.model_fields, *SPELLINGS["model"]} == model["properties"].keys()
    assert {"not": {"required": ["vae_path", "vae"]}} in model["allOf"]
    dataset = json.loads(dataset_json_schema())
    directory = dataset["$defs"]["DirectorySettings"]
    assert directory["required"] == []
    assert {"anyOf": [{"required": ["path"]}, {"required": ["root"]}]} in directory["allOf"]
    assert dataset["properties"]["datasets"] == dataset["properties"]["directory"]


@pytest.mark.parametrize("text", [settings_json_schema(OPTIONS), dataset_json_schema()])
def test_every_reference_resolves_and_unknown_keys_are_refused(text: str) -> None:
    schema = json.loads(text)
    assert schema["additionalProperties"] is False
    targets = {reference.removeprefix("#/$defs/") for reference in references(schema)}
    assert targets <= schema["$defs"].keys()
    for definition in schema["$defs"].values():
        assert definition["additionalProperties"] is False
