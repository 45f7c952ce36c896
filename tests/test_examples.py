"""Every file that is shipped for copying is accepted, and so is every key in it that is commented out."""

from __future__ import annotations

import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import models
from docs import generate, memory
from tests.json_schema import Validator
from tests.models.full_size import ALL, SD15
from utils.settings.dataset_rules import check_dataset
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings
from utils.settings.keys import is_dataset
from utils.settings.reader import read_dataset, read_settings

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").rglob("*.toml"))
EVERYTHING = ROOT / "examples" / "dataset_everything.toml"
COMMENTED_KEY = re.compile(r"^# ?([a-z_0-9]+ = .+|\[\[?[a-z]+\]\]?)$")


def parse(path: Path) -> None:
    """Reads a run's file or a dataset's, by what it holds."""
    if re.search(r"^\[\[(directory|datasets)\]\]", path.read_text(), re.MULTILINE):
        read_dataset(path)
    else:
        read_settings(path, models.choices())


def schema_of(content: dict[str, Any]) -> dict[str, Any]:
    name = "dataset" if is_dataset(content) else "settings"
    return json.loads((ROOT / "docs" / f"{name}.schema.json").read_text())


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_an_example_is_accepted(path: Path) -> None:
    parse(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_an_example_is_what_its_schema_describes(path: Path) -> None:
    content = tomllib.loads(path.read_text())
    assert Validator(schema_of(content)).faults(content) == []
    assert Validator(schema_of(content)).faults({**content, "zzz": 1}) == [": zzz is not known"]


@pytest.mark.parametrize("path", [path for path in EXAMPLES if "dataset" in path.name], ids=relative)
def test_the_keys_of_a_dataset_agree(path: Path) -> None:
    # The data are not there.
    assert [problem for problem in check_dataset(read_dataset(path)) if "there is no " not in problem.message] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_its_commented_keys_are_accepted(path: Path, tmp_path: Path) -> None:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        key = COMMENTED_KEY.match(line)
        if key is None or key[1].startswith("["):
            continue
        name = key[1].split(" = ")[0]
        # The commented form is an alternative to the line that sets the same key.
        others = [text for index, text in enumerate(lines) if index != number and not text.startswith(f"{name} = ")]
        place = sum(not text.startswith(f"{name} = ") for text in lines[:number])
        tried = tmp_path / path.name
        tried.write_text("\n".join([*others[:place], key[1], *others[place:]]))
        parse(tried)


def test_one_example_has_every_key_of_a_dataset_with_its_default(tmp_path: Path) -> None:
    everything = tmp_path / "everything.toml"
    everything.write_text(re.sub(r"^# ([a-z_]+ = )", r"\1", EVERYTHING.read_text(), flags=re.MULTILINE))
    dataset = read_dataset(everything)
    (directory,) = dataset.directory
    assert dataset.model_fields_set | directory.model_fields_set == {
        *DatasetSettings.model_fields,
        *DirectorySettings.model_fields,
    }
    # The two without which nothing is shown of sizes.
    example = {"resolutions", "enable_ar_bucket"}
    for table in (dataset, directory):
        for key in table.model_fields_set - example:
            info = type(table).model_fields[key]
            default = info.get_default()
            assert info.is_required() or default is None or getattr(table, key) == default, key


@pytest.mark.parametrize("path", [*EXAMPLES, ROOT / "my.toml", ROOT / "my_dataset.toml"], ids=relative)
def test_editors_find_the_schema_of_an_example_and_of_its_copy(path: Path) -> None:
    rules = tomllib.loads((ROOT / ".taplo.toml").read_text())["rule"]

    def is_among(globs: list[str]) -> bool:
        return any(fnmatch(f"/{relative(path)}", glob.removeprefix("**")) for glob in globs)

    (rule,) = [rule for rule in rules if is_among(rule["include"]) and not is_among(rule.get("exclude", []))]
    schema = json.loads((ROOT / rule["schema"]["path"]).read_text())
    is_data = is_dataset(tomllib.loads(path.read_text())) if path.exists() else "dataset" in path.name
    assert ("directory" in schema["properties"]) is is_data
    # A line that points to the schema from where the file is would point to nothing from where it is copied to.
    assert not path.exists() or "#:schema" not in path.read_text()


@pytest.mark.parametrize("name", generate.PAGES)
def test_the_generated_pages_are_those_of_the_code(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == generate.pages()[name], "run python docs/generate.py"


def test_the_page_of_memory_is_that_of_the_planner() -> None:
    """Of the smallest model; all would take minutes."""
    page = memory.PAGE.read_text()
    assert memory.TOP in page and memory.lora_row(SD15) in page and memory.full_row(SD15) in page
    assert all(f"| {model.name}" in page for model in ALL)
    assert {model.type for model in ALL} >= set(models.available()) - {"qwen_image_layered"}


def test_every_generated_page_is_compared() -> None:
    assert sorted(generate.pages()) == sorted(generate.PAGES)
