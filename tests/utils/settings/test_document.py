"""The generated documents name every key, in all its spellings, with what it means."""

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.json_schema import Validator
from tests.utils.settings.conftest import CLASSES, TinyOptions
from utils.settings.choices import own_keys
from utils.settings.dataset_schema import DataKeys, DatasetSettings
from utils.settings.deepspeed_keys import DeepSpeedSettings
from utils.settings.document import data_groups, dataset_json_schema, settings_json_schema, settings_page
from utils.settings.keys import CHOSEN, GROUPS, NESTED, SECTIONS, known_keys, run_keys
from utils.settings.model_schema import ModelSettings
from utils.settings.run_tables import SamplingSettings
from utils.settings.schema import Settings

TABLES = [Settings, DatasetSettings, DeepSpeedSettings, *NESTED.values(), *SECTIONS.values()]
TABLES += [cls for section in CHOSEN for cls in CLASSES[section].values()]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(settings_json_schema(CLASSES))


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from [value] if key == "$ref" else references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


@pytest.mark.parametrize("cls", TABLES)
def test_every_key_is_documented(cls: type[ModelSettings]) -> None:
    page = settings_page(CLASSES)
    for name, info in cls.model_fields.items():
        assert info.description, f"{cls.__name__}.{name} has no docstring"
        if name not in SECTIONS:
            assert f"| `{name}`" in page
            assert " ".join(info.description.split()).replace("|", "\\|") in page


def test_the_page_shows_types_defaults_and_spellings() -> None:
    page = settings_page(CLASSES)
    assert "| `seed` | whole number | `0` |" in page
    assert "| `vae_path` or `vae` | path |  |" in page
    assert "| `betas` | [number, number] | `[0.9, 0.999]` |" in page
    assert '### `[model]` with `type = "tiny"`' in page
    assert "| `max_sequence_length` | whole number | `16` | Tokens of a caption. |" in page
    assert "| `control_path` or `control_dir` or `conditioning_data_dir` | path or array of paths |  |" in page
    assert "| `loss_weight` or `prior_loss_weight` (in a `[[directory]]`) | number | `1.0` |" in page
    assert "| `uncond_fraction_per_encoder` | table of numbers | `{}` |" in page
    assert "| `micro_batch_size_per_gpu` | whole number or array of [whole number, whole number] | `1` |" in page
    assert "| `eval_datasets` | array of tables | `[]` |" in page


def test_every_row_of_the_page_is_one_line() -> None:
    for line in settings_page(CLASSES).splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line


def test_a_key_that_file_and_directory_share_is_listed_once_under_the_schemas_headings() -> None:
    page = settings_page(CLASSES)
    for key in DataKeys.model_fields:
        assert len(re.findall(rf"^\| `{key}`", page, re.MULTILINE)) == 1, key
    groups = data_groups()
    assert [key for keys in groups.values() for key in keys] == list(DataKeys.model_fields)
    said = re.findall(r"^    # (.+)\.\n    (\w+):", inspect.getsource(DataKeys), re.MULTILINE)
    assert [(title, keys[0]) for title, keys in groups.items()] == said
    assert all(f"#### {title}\n" in page for title in groups)


def test_the_runs_keys_are_accepted_at_the_top_and_in_groups(schema: dict[str, Any]) -> None:
    assert schema["properties"].keys() == {*run_keys(), *SECTIONS, *GROUPS}
    for group in GROUPS:
        assert schema["properties"][group] == {"$ref": "#/$defs/Run"}
    assert schema["$defs"]["Run"]["properties"].keys() == set(run_keys())


def test_both_spellings_are_accepted_but_not_together(schema: dict[str, Any]) -> None:
    (model,), shared = schema["properties"]["model"]["anyOf"], schema["$defs"]["ModelSettings"]
    assert model["properties"]["type"]["examples"] == ["tiny"]
    assert known_keys("model", TinyOptions) == model["properties"].keys() | shared["properties"].keys()
    assert shared["properties"]["vae"] == shared["properties"]["vae_path"]
    assert {"not": {"required": ["vae_path", "vae"]}} in shared["allOf"]
    dataset = json.loads(dataset_json_schema())
    assert dataset["properties"]["datasets"] == dataset["properties"]["directory"]
    directory = dataset["$defs"]["DirectorySettings"]
    assert directory["required"] == []
    assert {"anyOf": [{"required": [name]} for name in ("path", "root", "image_dir")]} in directory["allOf"]
    for table in (dataset, directory):
        assert {"not": {"required": ["caption_dropout", "caption_dropout_rate"]}} in table["allOf"]
        assert table["properties"]["repeats"] == table["properties"]["num_repeats"]
    assert "prior_loss_weight" not in dataset["properties"]


SPELLED = [
    ("optimizer", "AdamW", True),
    ("optimizer", "ADAMW8bit", True),
    ("optimizer", "adamx", False),
    ("optimizer", "adam_w", True),
    ("optimizer", "torch.optim.Adamax", True),
    ("model", "Tiny", True),
    ("model", "ti-ny", True),
    ("adapter", "LoRA", False),
]


@pytest.mark.parametrize(("section", "name", "is_known"), SPELLED)
def test_a_type_is_accepted_as_the_reader_accepts_it(
    schema: dict[str, Any], section: str, name: str, is_known: bool
) -> None:
    tables = {
        "model": {"type": "tiny"},
        "optimizer": {"type": "adamw", "lr": 1},
        "adapter": {"type": "lora", "rank": 1},
    }
    tables[section] = {**tables[section], "type": name}
    assert (Validator(schema).faults(tables) == []) is is_known


@pytest.mark.parametrize("value", ["a.png", ["a.png"], [["a.png", "b.png"]], [[]], [3], 3])
def test_control_images_are_accepted_as_the_reader_accepts_them(schema: dict[str, Any], value: Any) -> None:
    sampling = {"control_images": value}
    try:
        SamplingSettings.model_validate(sampling)
        is_sound = True
    except ValueError:
        is_sound = False
    tables = {"model": {"type": "tiny"}, "optimizer": {"type": "adamw", "lr": 1}, "sampling": sampling}
    assert (Validator(schema).faults(tables) == []) is is_sound


@pytest.mark.parametrize("text", [settings_json_schema(CLASSES), dataset_json_schema()])
def test_every_reference_resolves_and_unknown_keys_are_refused(text: str) -> None:
    schema = json.loads(text)
    assert schema["additionalProperties"] is False
    targets = {reference.removeprefix("#/$defs/") for reference in references(schema)}
    assert targets == schema["$defs"].keys()
    shared = {SECTIONS[section].__name__ for section in CHOSEN}
    for name, definition in schema["$defs"].items():
        # Keys of a type stand beside those that all types share: which of them are unknown is for the type to say.
        assert "additionalProperties" not in definition if name in shared else not definition["additionalProperties"]


@pytest.mark.parametrize("section", CHOSEN)
def test_a_type_has_its_own_keys_and_the_shared_ones_and_no_other(schema: dict[str, Any], section: str) -> None:
    shared_class = SECTIONS[section]
    shared = schema["$defs"][shared_class.__name__]
    tables = [table for table in schema["properties"][section]["anyOf"] if "$ref" in table]
    for table, kind in zip(tables, CLASSES[section], strict=True):
        said = table["properties"]["type"]
        assert Validator({"properties": {"type": said}}).faults({"type": kind}) == []
        assert Validator({"properties": {"type": said}}).faults({"type": f"{kind}x"})
    for table, (kind, cls) in zip(tables, CLASSES[section].items(), strict=True):
        assert table["$ref"] == f"#/$defs/{shared_class.__name__}"
        assert table["unevaluatedProperties"] is False, kind
        # A shared key stands once, unless this type has it otherwise.
        assert table["properties"].keys() == {"type", *own_keys(cls, shared_class)}, kind
        assert known_keys(section, cls) == table["properties"].keys() | shared["properties"].keys(), kind
        required = {key for key, info in cls.model_fields.items() if info.is_required()}
        assert {*shared["required"], *table.get("required", ())} == required, kind
