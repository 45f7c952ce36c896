"""Rules about the keys that say when weights are exported, and what their files are called."""

import re
from collections.abc import Iterator

from utils.errors import Problem
from utils.settings.rule import SettingsRule, at
from utils.settings.schema import Settings

PATTERNS = ("file_name", "file_name_comfyui")
PLACES = ("{name}", "{at}")


def _ratio_has_epochs(settings: Settings, _: int) -> Iterator[Problem]:
    place = "key `save_n_epoch_ratio`"
    if not settings.save_n_epoch_ratio:
        return
    if settings.save_every_n_epochs:
        yield at(place, "says what save_every_n_epochs says too; leave out one of them")
    if settings.epochs is None:
        yield at(place, "is a number of exports over the `epochs`; set that too, or save_every_n_epochs instead")


def _names_can_be_filled(settings: Settings, _: int) -> Iterator[Problem]:
    for key in PATTERNS:
        pattern = getattr(settings, key) or ""
        if unknown := [place for place in re.findall(r"\{[^}]*\}?", pattern) if place not in PLACES]:
            yield at(f"key `{key}`", f"has '{unknown[0]}'; what is filled in is {' and '.join(PLACES)}")
        elif "{name}" in pattern and settings.run_name is None:
            yield at(f"key `{key}`", "has '{name}', which is run_name; set that too")
    if settings.file_name and settings.file_name == settings.file_name_comfyui:
        yield at("key `file_name_comfyui`", "is that of the other file, `file_name`; write another")


EXPORT_RULES = (
    SettingsRule(("save_n_epoch_ratio", "save_every_n_epochs", "epochs"), _ratio_has_epochs),
    SettingsRule((*PATTERNS, "run_name"), _names_can_be_filled),
)


def names_are_used(settings: Settings) -> Iterator[Problem]:
    """Names of files that a run does not write."""
    if settings.file_name and settings.adapter is None:
        yield at(
            "key `file_name`",
            "not used without [adapter]: diffusers finds the parts of its folder by their own names",
        )
    if settings.file_name_comfyui and settings.save_format == "diffusers":
        yield at("key `file_name_comfyui`", 'not used with save_format = "diffusers", which writes no such file')
