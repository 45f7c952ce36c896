"""Files of a run that has nothing wrong, to be spoilt by the tests."""

from pathlib import Path

import pytest

import optimizers
from utils import adapters
from utils.settings.choices import Choice
from utils.settings.model_schema import ModelSettings


class TinyOptions(ModelSettings):
    """Options of a model that has one key of its own."""

    max_sequence_length: int = 16
    """Tokens of a caption."""


def options_for(name: str) -> type[ModelSettings]:
    """As the models' own look-up does."""
    if name != "tiny":
        raise ValueError(f'no model is called "{name}"; known: tiny')
    return TinyOptions


CHOICES = {"model": Choice(options_for), "adapter": adapters.choice(), "optimizer": optimizers.choice()}
CLASSES = {**{section: choice.classes for section, choice in CHOICES.items()}, "model": {"tiny": TinyOptions}}
RUN = """
{output_dir}
{dataset}
{top}

[model]
type = "tiny"
{weights}
{model}

[optimizer]
type = "adamw"
lr = 1e-3
{optimizer}

{tables}
"""
SOUND = {
    "output_dir": 'output_dir = "runs"',
    "dataset": 'dataset = "dataset.toml"',
    "weights": 'diffusers_path = "weights"',
}
DATASET = """
resolutions = [64]

[[directory]]
path = "pictures"
"""


class Folder:
    """The current folder, with a sound run in it; `write` and `run` put other text in place."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("weights", "pictures"):
            (root / folder).mkdir()
        self.write("dataset.toml", DATASET)

    def write(self, name: str, text: str) -> Path:
        (self.root / name).write_text(text, encoding="utf-8")
        return Path(name)

    def run(self, **parts: str) -> Path:
        """The sound run, with other lines in some of its parts."""
        blank = dict.fromkeys(("top", "model", "optimizer", "tables"), "")
        return self.write("run.toml", RUN.format(**{**blank, **SOUND, **parts}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.chdir(tmp_path)
    return Folder(tmp_path)
