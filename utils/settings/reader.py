"""TOML files -> settings, with every problem of every file in one error."""

import logging
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import toml

from utils.errors import Problem, UserError
from utils.settings.choices import Choice, Choices, type_of
from utils.settings.dataset_rules import (
    check_dataset,
    check_evaluation_set,
    check_training_set,
    check_with_run,
    remarks_on_dataset,
)
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings
from utils.settings.differences import differences
from utils.settings.diffusion_pipe import TYPES
from utils.settings.keys import CHOSEN, SECTIONS, is_dataset, is_run, known_keys, run_keys, unknown_tables
from utils.settings.lycoris_config import KEY as LYCORIS_CONFIG
from utils.settings.lycoris_config import with_lycoris_config
from utils.settings.plain import counted, given
from utils.settings.rules import check_rules, remarks_on_run
from utils.settings.run_tables import SECRETS
from utils.settings.schema import Settings
from utils.settings.tables import Reading, Table, adopt, check, no_table, one_table, run_table, where
from utils.settings.values import SettingsTable

logger = logging.getLogger(__name__)


def read_settings(path: Path, choices: Choices) -> Settings:
    """The run that the file at `path` describes, before the rules of `check_rules`.

    `choices` are the classes that `type` chooses in [model], [adapter] and [optimizer].
    Raises UserError with all problems of the file.
    """
    return _read_run(Path(path), choices).sound()


def read_dataset(path: Path) -> DatasetSettings:
    """The dataset that the file at `path` describes, before the rules of `check_dataset`.

    Raises UserError with all problems of the file.
    """
    return _read_dataset(Path(path), {}).sound()


def read_all(
    path: Path, choices: Choices, world_size: int | None, from_diffusion_pipe: bool = False
) -> tuple[Settings, DatasetSettings, dict[str, DatasetSettings]]:
    """Settings, training set, and evaluation sets by name, checked by every rule; `choices` as in `read_settings`.

    Warns of what changes nothing, of what is read as something else, and, if the files are diffusion-pipe's, of what
    the same words do not mean here: they are its if a key says so, or `from_diffusion_pipe`.

    Raises one UserError with the problems of all these files.
    """
    run = _read_run(Path(path), choices)
    problems = [*run.problems, *check_rules(run.value, world_size, str(path), run.broken)]
    remarks, is_foreign = run.remarks, from_diffusion_pipe or run.from_diffusion_pipe
    training = [] if "dataset" in run.broken else [run.value.dataset]
    evaluation = [] if "eval_datasets" in run.broken else [one for one in run.value.eval_datasets if one.config]

    datasets: dict[Path, DatasetSettings] = {}
    for file in dict.fromkeys([*training, *(entry.config for entry in evaluation)]):
        # The rules of the file that names this one report that it is missing.
        if not file.exists():
            continue
        try:
            reading = _read_dataset(file, choices)
        except UserError as error:
            problems += error.problems
            continue
        problems += [*reading.problems, *check_dataset(reading.value, str(file), reading.broken)]
        datasets[file] = reading.value
        remarks, is_foreign = remarks + reading.remarks, is_foreign or reading.from_diffusion_pipe
        problems += check_evaluation_set(reading.value, datasets, training, file, reading.broken)
        if not reading.broken:
            problems += check_with_run(run.value, reading.value, str(file), run.broken)
    if problems:
        raise UserError(replace(problem, where=counted(problem.where)) for problem in problems)
    if problems := check_training_set(run.value, datasets[run.value.dataset], str(path)):
        raise UserError(problems)
    remarks = [*remarks, *remarks_on_run(run.value, str(path))]
    for file, dataset in datasets.items():
        remarks += remarks_on_dataset(dataset, str(file))
    for remark in remarks:
        logger.warning("%s: %s: %s", remark.file, counted(remark.where), remark.message)
    if is_foreign:
        for remark in differences(run.value, datasets, str(path)):
            logger.warning("%s: %s: other than in diffusion-pipe: %s", remark.file, remark.where, remark.message)
    by_name = {entry.name: datasets[entry.config] for entry in evaluation}
    return run.value, datasets[run.value.dataset], by_name


def resolved(settings: Settings) -> dict[str, Any]:
    """Every key that has a value, in types that TOML and JSON have; secrets are left out."""
    return settings.model_dump(mode="json", exclude_none=True, exclude={"monitoring": set(SECRETS)})


def settings_hash(settings: Settings) -> str:
    """A short name for all that `resolved` gives, by which an export says with which settings it was made."""
    return blake2b(toml.dumps(resolved(settings)).encode(), digest_size=8).hexdigest()


def write_resolved(settings: Settings, path: Path, note: str = "") -> None:
    """Writes every key that has a value as TOML, fit to be read again, under the `settings_hash` and a note of one
    line; secrets are left out."""
    noted = f"# {note}\n" if note else ""
    text = f"# settings_hash: {settings_hash(settings)}\n{noted}{toml.dumps(resolved(settings))}"
    Path(path).write_text(text, encoding="utf-8")


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError.of(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError.of(f"is not written in UTF-8: {error}", str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError.of(f"is not valid TOML: {error}", str(path)) from None


def _read_run(path: Path, choices: Choices) -> Reading[Settings]:
    raw = _load(path)
    if is_dataset(raw):
        raise UserError.of("is a dataset's file; give the run's file, whose key `dataset` names it", str(path))
    parts = {name: _read_section(str(path), name, raw[name], choices) for name in SECTIONS if name in raw}
    table = run_table(str(path), raw, choices)
    # Of a part with problems the sound keys go in, so that the rest is still checked.
    table.keys.update({name: part.value for name, part in parts.items()})
    table.locations.update({name: (f"[{name}]", "") for name in SECTIONS})
    adopt(table, [*run_keys(), *SECTIONS])
    run = check(Settings, table, run_keys(), choices)
    problems = [*run.problems, *(problem for part in parts.values() for problem in part.problems)]
    # A table with a misspelt name is not also reported as missing.
    misspelt = {f"[{name}]" for name in unknown_tables(raw, choices).values() if name and name not in raw}
    problems = [problem for problem in problems if problem.where not in misspelt]
    broken = {f"{name}.{key}" for name, part in parts.items() for key in part.broken}
    remarks = [*run.remarks, *(remark for part in parts.values() for remark in part.remarks)]
    is_foreign = run.from_diffusion_pipe or any(part.from_diffusion_pipe for part in parts.values())
    return Reading(run.value, problems, run.broken | broken, remarks, is_foreign)


def _read_section(file: str, name: str, written: Any, choices: Choices) -> Reading[SettingsTable]:
    """One table, read with its class, which for some tables `type` chooses."""
    if name == "adapter" and isinstance(written, dict) and LYCORIS_CONFIG in written:
        written, problems, remarks = with_lycoris_config(file, written)
        reading = _read_section(file, name, written, choices)
        # Of a file that cannot be read, what is lacking is not told too.
        told = problems if problems else reading.problems
        return replace(reading, problems=told, remarks=[*remarks, *reading.remarks])
    title, shared, is_chosen = f"[{name}]", SECTIONS[name], name in CHOSEN
    nothing = {"type": ""} if is_chosen else {}
    if not isinstance(written, dict):
        problem = Problem(file, title, no_table(title, written))
        return Reading(shared.model_construct(**nothing), [problem], frozenset(shared.model_fields))
    table = one_table(file, name, title, written)
    cls = _class_by_type(table, choices[name]) if is_chosen else shared
    adopt(table, known_keys(name, cls or shared))
    if cls is None:
        # Without the type, the keys of its own are unknown: check those that all types share.
        keys = {key: value for key, value in table.keys.items() if key in shared.model_fields}
        reading = check(shared, replace(table, keys=keys | nothing), known_keys(name, shared), choices)
        return replace(reading, broken=reading.broken | {"type"})
    return check(cls, table, known_keys(name, cls), choices)


def _class_by_type(table: Table, choice: Choice) -> type[SettingsTable] | None:
    """The class that the table's `type` chooses, with `type` then in that class's spelling; otherwise None, and a
    problem added to the table."""
    location = where(table.title, "type")
    name = table.keys.get("type")
    if name is None:
        table.complain(location, "is required and not given")
    elif not isinstance(name, str):
        table.complain(location, f"must be a text in quotes; given: {given(name)}")
    else:
        try:
            cls = choice.find(name)
        except ValueError as error:
            foreign = TYPES.get(table.place, {}).get(name.lower())
            if foreign and foreign.means:
                table.from_diffusion_pipe = True
                table.remark(location, f'is read as "{foreign.means}": {foreign.note}')
                table.keys["type"] = foreign.means
                return choice.find(foreign.means)
            table.complain(location, f"{error}; {foreign.note}" if foreign else str(error))
        else:
            table.keys["type"] = type_of(cls) or choice.spelling(name)
            return cls
    return None


def _read_dataset(path: Path, choices: Choices) -> Reading[DatasetSettings]:
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
    adopt(table, known_keys("dataset", DatasetSettings))
    return check(DatasetSettings, table, known_keys("dataset", DatasetSettings), choices)


def _one_directory(dataset: Table, number: int, written: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `directory` with second spellings replaced; a key given twice is a problem of `dataset`."""
    entry = one_table(dataset.file, "directory", dataset.locate(("directory", number)), written)
    adopt(entry, known_keys("directory", DirectorySettings))
    dataset.take_notes_of(entry)
    return entry.keys
