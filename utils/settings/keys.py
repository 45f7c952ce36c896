"""Where each key is allowed and how else it may be spelled: what the reader accepts and the documents list."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from utils.settings import diffusion_pipe, kohya_and_others
from utils.settings.adapter_schema import AdapterRule, AdapterSettings
from utils.settings.choices import Choices, Classes
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings
from utils.settings.foreign import Foreign
from utils.settings.model_schema import ModelSettings, PresetAdapter, TextEncoderFile
from utils.settings.run_tables import EMASettings, EvalDataset, MonitoringSettings, SampleSettings, SamplingSettings
from utils.settings.schema import OptimizerSettings, ParameterRule, Settings
from utils.settings.values import SettingsTable

# Tables that only group: the run's own keys are accepted at the top of the file and in each of these.
GROUPS = ("output", "training", "eval", "save", "optimization")
# Tables with keys of their own. Of those in CHOSEN this is the class of what all types share.
SECTIONS: Mapping[str, type[SettingsTable]] = {
    "model": ModelSettings,
    "adapter": AdapterSettings,
    "optimizer": OptimizerSettings,
    "ema": EMASettings,
    "monitoring": MonitoringSettings,
    "sampling": SamplingSettings,
}
# Tables whose `type` chooses a subclass, which is handed in.
CHOSEN = ("model", "adapter", "optimizer")
_DATA_SPELLINGS = {
    "shuffle_count": "cache_shuffle_num",
    "shuffle_delimiter": "cache_shuffle_delimiter",
    "caption_dropout": "uncond_fraction",
    "caption_dropout_rate": "uncond_fraction",
    "frame_rate": "framerate",
    "repeats": "num_repeats",
    "is_reg": "is_regularisation_data",
    "is_regularization_data": "is_regularisation_data",
}
# By table: a second spelling, and the key that it stands for.
SPELLINGS: Mapping[str, Mapping[str, str]] = {
    "model": {
        "diffusion_model": "transformer_path",
        "diffusion_model_dtype": "transformer_dtype",
        "vae": "vae_path",
    },
    "dataset": {"datasets": "directory", **_DATA_SPELLINGS},
    "directory": {
        "root": "path",
        "image_dir": "path",
        "control_dir": "control_path",
        "conditioning_data_dir": "control_path",
        # Elsewhere this is the weight of the regularisation data alone: at the top of a file it would weigh all data.
        "prior_loss_weight": "loss_weight",
        **_DATA_SPELLINGS,
    },
}

# Arrays of tables, whose entries have keys of their own.
NESTED: Mapping[str, type[BaseModel]] = {
    "eval_datasets": EvalDataset,
    "text_encoders": TextEncoderFile,
    "preset_adapters": PresetAdapter,
    "directory": DirectorySettings,
    "rules": ParameterRule,
    "adapter.rules": AdapterRule,
    "samples": SampleSettings,
}


def known_keys(section: str, cls: type[BaseModel]) -> set[str]:
    """The keys of `cls` as a table called `section`, in all their spellings."""
    return {*cls.model_fields, *SPELLINGS.get(section, {})}


def run_keys() -> list[str]:
    """The keys of the run itself, which are written at the top of the file or in a group."""
    return [key for key in Settings.model_fields if key not in SECTIONS]


def spellings(section: str, key: str) -> list[str]:
    """The second spellings of `key` in `section`."""
    return [other for other, meant in SPELLINGS.get(section, {}).items() if meant == key]


def is_run(raw: Mapping[str, Any]) -> bool:
    """Whether a file given as a dataset is a run's config."""
    return bool(raw.keys() & {"dataset", "output_dir", *SECTIONS, *GROUPS}) and not is_dataset(raw)


def is_dataset(raw: Mapping[str, Any]) -> bool:
    """Whether a file given as a run's config is a dataset."""
    return bool(raw.keys() & {"directory", "datasets"}) and not raw.keys() & {"dataset", "model", "optimizer"}


def unknown_tables(raw: Mapping[str, Any], choices: Choices) -> dict[str, str | None]:
    """Unknown tables of a run's file -> the name that was probably meant."""
    known, elsewhere = [*SECTIONS, *GROUPS], set().union(*_locations(choices).values())
    unknown = [key for key, value in raw.items() if isinstance(value, dict) and key not in {*known, *run_keys()}]
    meant: dict[str, str | None] = {}
    for key in unknown:
        shorter = [name for name in known if key.startswith(name) or name.startswith(key)]
        near = next(iter([*shorter, *get_close_matches(key, known, n=1, cutoff=0.65)]), None)
        # A name near that of a table means it, also where it is a key elsewhere: `sample` is one in [ema].
        if near or key not in elsewhere:
            meant[key] = near
    return meant


def unknown_table(meant: str | None) -> str:
    """The message for an unknown table."""
    return "no such table; " + (
        f"did you mean [{meant}]?" if meant else f"known are {', '.join(f'[{name}]' for name in (*SECTIONS, *GROUPS))}"
    )


def foreign_key(place: str, key: str) -> Foreign | None:
    """A key that other trainers have in the table `place`, or anywhere."""
    return diffusion_pipe.FOREIGN.get(place, {}).get(key) or kohya_and_others.ANYWHERE.get(key)


def unknown_key(key: str, place: str, here: Iterable[str], choices: Choices) -> str:
    """The message for a key that is unknown in the table `place`, which knows the keys `here`: what another trainer's
    key is here, or the table where it belongs, or a spelling that is close to it."""
    here = sorted(here)
    elsewhere = (keys[key] for keys in diffusion_pipe.FOREIGN.values() if key in keys)
    if foreign := foreign_key(place, key) or (None if _location_of(key, choices) else next(elsewhere, None)):
        is_of_others = kohya_and_others.ANYWHERE.get(key) is foreign
        return f"no such key; {kohya_and_others.advice_in(place, key) if is_of_others else foreign.advice}"
    if location := _location_of(key, choices):
        return f"no such key here; it belongs {location}"
    if near := closest(key, here, place):
        return f"no such key; did you mean `{near}`?"
    # All of the run's keys would bury the other problems.
    return f"no such key; known here: {', '.join(here)}" if len(here) <= 12 else "no such key"


def closest(key: str, known: Iterable[str], place: str = "") -> str | None:
    """The known key of which `key` is probably a slip: with one letter in four wrong, at most three; cut off by one or
    two; or with the name of its table before it. A guess that is only somewhat like it would mislead."""
    known = list(known)
    if key.removeprefix(f"{place}_") in known:
        return key.removeprefix(f"{place}_")
    distances = {
        name: edits(key, name) - (1 if len(key) > 3 and name.startswith(key) and len(name) > len(key) + 1 else 0)
        for name in known
    }
    near = min(distances, key=distances.__getitem__, default="")
    return near if near and distances[near] <= min(len(key) // 4, 3) else None


def edits(one: str, other: str) -> int:
    """How many letters have to be put in, left out, changed, or swapped with their neighbour to make `other` of `one`
    (optimal string alignment)."""
    before, above = [], list(range(len(other) + 1))
    for row, letter in enumerate(one, start=1):
        line = [row]
        for column, wanted in enumerate(other, start=1):
            best = min(above[column] + 1, line[-1] + 1, above[column - 1] + (letter != wanted))
            if row > 1 and column > 1 and letter == other[column - 2] and one[row - 2] == wanted:
                best = min(best, before[column - 2] + 1)
            line.append(best)
        before, above = above, line
    return above[-1]


def _location_of(key: str, choices: Choices) -> str | None:
    """The table that has this very key."""
    found = [location for location, keys in _locations(choices).items() if key in keys]
    if not found:
        return None
    table, _, _ = found[0].partition(" with type = ")
    types = [one.removeprefix(f"{table} with type = ") for one in found if one.startswith(f"{table} with type = ")]
    return f"{table} with type = {' or '.join(types)}" if types and table != found[0] else found[0]


def _locations(choices: Choices) -> dict[str, set[str]]:
    """Every table of a file, and the keys known there."""
    by_type = {
        f'in [{name}] with type = "{kind}"': set(cls.model_fields)
        for name, choice in choices.items()
        for kind, cls in choice.classes.items()
    }
    return {
        "at the top of the run's file, above all tables": set(run_keys()),
        **{
            f"in [{name}]": known_keys(name, cls) | _common(choices[name].classes if name in choices else {})
            for name, cls in SECTIONS.items()
        },
        **by_type,
        "at the top of a dataset file": known_keys("dataset", DatasetSettings),
        "in [[directory]] of a dataset file": known_keys("directory", DirectorySettings),
    }


def _common(classes: Classes) -> set[str]:
    """The keys that all the classes share."""
    return set.intersection(*(set(cls.model_fields) for cls in classes.values())) if classes else set()
