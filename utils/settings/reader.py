"""TOML files -> settings, with every problem of every file in one error."""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import toml

from utils.errors import Problem, UserError
from utils.settings.dataset_rules import (
    check_dataset,
    check_evaluation_set,
    check_training_set,
    check_with_run,
)
from utils.settings.dataset_schema import DatasetSettings
from utils.settings.keys import SECTIONS, is_dataset, is_run, known_keys, run_keys, unknown_tables
from utils.settings.model_schema import ModelSettings
from utils.settings.plain import given
from utils.settings.rules import check_rules
from utils.settings.schema import (
    AdamWSettings,
    AdapterSettings,
    OptimizerSettings,
    Settings,
    adapter_types,
    lower_type,
    optimizer_types,
)
from utils.settings.tables import Reading, Table, check, no_table, one_table, run_table, where
from utils.settings.values import SettingsTable

OptionsFor = Callable[[str], type[ModelSettings]]


def read_settings(path: Path, options_for: OptionsFor) -> Settings:
    """The run that the file at `path` describes, before the rules of `check_rules`.

    `options_for(type)` gives the class of a model's options, or a ValueError that names the known types.
    Raises UserError with all problems of the file.
    """
    return _read_run(Path(path), options_for).sound()


def read_dataset(path: Path) -> DatasetSettings:
    """The dataset that the file at `path` describes, before the rules of `check_dataset`.

    Raises UserError with all problems of the file.
    """
    return _read_dataset(Path(path)).sound()


def read_all(
    path: Path, options_for: OptionsFor, world_size: int | None
) -> tuple[Settings, DatasetSettings, dict[str, DatasetSettings]]:
    """Settings, training set, and evaluation sets by name, checked by every rule.

    Raises one UserError with the problems of all these files.
    """
    run = _read_run(Path(path), options_for)
    problems = [*run.problems, *check_rules(run.value, world_size, str(path), run.broken)]
    training = [] if "dataset" in run.broken else [run.value.dataset]
    evaluation = [] if "eval_datasets" in run.broken else run.value.eval_datasets

    datasets: dict[Path, DatasetSettings] = {}
    for file in dict.fromkeys([*training, *(entry.config for entry in evaluation)]):
        # That a file is missing is told by the rules of the file that names it.
        if not file.exists():
            continue
        try:
            reading = _read_dataset(file)
        except UserError as error:
            problems += error.problems
            continue
        problems += [*reading.problems, *check_dataset(reading.value, str(file), reading.broken)]
        datasets[file] = reading.value
        problems += check_evaluation_set(reading.value, datasets, training, file, reading.broken)
        if not reading.broken:
            problems += check_with_run(run.value, reading.value, str(file), run.broken)
    if problems:
        raise UserError(problems)
    if problems := check_training_set(run.value, datasets[run.value.dataset], str(path)):
        raise UserError(problems)
    by_name = {entry.name: datasets[entry.config] for entry in evaluation}
    return run.value, datasets[run.value.dataset], by_name


def resolved(settings: Settings) -> dict[str, Any]:
    """Every key that has a value, in types that TOML and JSON have; the account's key is left out."""
    return settings.model_dump(mode="json", exclude_none=True, exclude={"monitoring": {"wandb_api_key"}})


def write_resolved(settings: Settings, path: Path) -> None:
    """Writes every key that has a value as TOML, fit to be read again; the account's key is left out."""
    Path(path).write_text(toml.dumps(resolved(settings)), encoding="utf-8")


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError.of(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError.of(f"is not written in UTF-8: {error}", str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError.of(f"is not valid TOML: {error}", str(path)) from None


def _read_run(path: Path, options_for: OptionsFor) -> Reading[Settings]:
    raw = _load(path)
    if is_dataset(raw):
        raise UserError.of("is a dataset's file; give the run's file, whose key `dataset` names it", str(path))
    parts = {name: _read_section(str(path), name, raw[name], options_for) for name in SECTIONS if name in raw}
    table = run_table(str(path), raw)
    # A part with problems goes in as far as it is sound, so that the whole is checked all the same.
    table.keys.update({name: part.value for name, part in parts.items()})
    table.locations.update({name: (f"[{name}]", "") for name in SECTIONS})
    run = check(Settings, table, run_keys())
    problems = [*run.problems, *(problem for part in parts.values() for problem in part.problems)]
    # A table under a wrong name is not missing too.
    misspelt = {f"[{name}]" for name in unknown_tables(raw).values() if name and name not in raw}
    problems = [problem for problem in problems if problem.where not in misspelt]
    broken = {f"{name}.{key}" for name, part in parts.items() for key in part.broken}
    return Reading(run.value, problems, run.broken | broken)


def _read_section(file: str, name: str, written: Any, options_for: OptionsFor) -> Reading[SettingsTable]:
    """A table with keys of its own; for those whose `type` chooses the class, that one."""
    title = f"[{name}]"
    fallback, type_of_fallback, by_type = {
        "model": (ModelSettings, "", options_for),
        "optimizer": (AdamWSettings, "adamw", _optimizer_class),
        "adapter": (AdapterSettings, "lora", _adapter_class),
    }.get(name, (SECTIONS[name], None, None))
    if not isinstance(written, dict):
        problem = Problem(file, title, no_table(title, written))
        value = fallback.model_construct(type=type_of_fallback) if by_type else fallback.model_construct()
        return Reading(value, [problem], frozenset(fallback.model_fields))
    table = one_table(file, name, title, lower_type(written) if name == "optimizer" else written)
    cls = _class_by_type(table, by_type) if by_type else fallback
    if cls is None:
        # Whether a key belongs to a type can be told once the type is known: check what all types share.
        cls = fallback
        shared = {key: value for key, value in table.keys.items() if key in fallback.model_fields}
        table = replace(table, keys=shared | {"type": type_of_fallback})
    return check(cls, table, known_keys(name, cls))


def _class_by_type(table: Table, by_type: Callable[[str], type[SettingsTable]]) -> type[SettingsTable] | None:
    """The class that the table's `type` chooses; if it chooses none, None, and a problem in the table."""
    location = where(table.title, "type")
    name = table.keys.get("type")
    if name is None:
        table.complain(location, "is required and not given")
    elif not isinstance(name, str):
        table.complain(location, f"must be a text in quotes; given: {given(name)}")
    else:
        try:
            return by_type(name)
        except ValueError as error:
            table.complain(location, str(error))
    return None


def _optimizer_class(name: str) -> type[OptimizerSettings]:
    types = optimizer_types()
    if name not in types:
        raise ValueError(f'no optimizer is called "{name}"; known: {", ".join(types)}')
    return types[name]


def _adapter_class(name: str) -> type[AdapterSettings]:
    types = adapter_types()
    if name not in types:
        raise ValueError(f"no adapter is called '{name}'; known: {', '.join(map(repr, types))}")
    return types[name]


def _read_dataset(path: Path) -> Reading[DatasetSettings]:
    raw = _load(path)
    if is_run(raw):
        raise UserError.of("is a run's file; a dataset's has [[directory]] tables and keys for them", str(path))
    table = one_table(str(path), "dataset", "", raw)
    entries = table.keys.get("directory")
    if isinstance(entries, list):
        table.keys["directory"] = [
            _one_directory(table, number, entry) if isinstance(entry, dict) else entry
            for number, entry in enumerate(entries)
        ]
    return check(DatasetSettings, table, known_keys("dataset", DatasetSettings))


def _one_directory(dataset: Table, number: int, written: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `directory` with second spellings replaced; a key given twice is a problem of `dataset`."""
    entry = one_table(dataset.file, "directory", dataset.locate(("directory", number)), written)
    dataset.problems.extend(entry.problems)
    return entry.keys
