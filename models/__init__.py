"""What is trained. One file is one `[model] type`; this folder's listing is the list of models."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from utils.settings.choices import Choice, Choices

if TYPE_CHECKING:
    # Names are listed, and unknown ones refused, before torch is imported.
    from models.base import BasePipeline
    from utils.settings.model_schema import ModelSettings

NOT_MODELS = {"__init__", "base"}


def available() -> list[str]:
    """The names that `[model] type` may have."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_MODELS)


def spelling(model_type: str) -> str:
    """A model type as its file is called: capitals, hyphens and underscores make no difference, since trainers differ
    in them ("lumina_2", "qwen-image"). An unknown one is returned as it is."""

    def letters(name: str) -> str:
        return name.replace("-", "").replace("_", "").lower()

    return next((name for name in available() if letters(name) == letters(model_type)), model_type)


def find(model_type: str) -> type[BasePipeline]:
    """The pipeline class of a model type; imports that one model only.

    Raises:
        ValueError: there is no such type; names those that there are.
    """
    name = spelling(model_type)
    if name not in available():
        raise ValueError(f"unknown model type '{model_type}'; this version trains: {', '.join(available())}")
    module = importlib.import_module(f"models.{name}")
    base = importlib.import_module("models.base").BasePipeline
    pipelines = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    assert len(pipelines) == 1, f"models/{name}.py must define exactly one pipeline class"
    return pipelines[0]


def build(options: ModelSettings, seed: int = 0) -> BasePipeline:
    """The pipeline that trains the model of these options.

    Raises:
        UserError: they name single files without a diffusers folder, of which no configurations are known or fit.
    """
    kind = find(options.type)
    if options.diffusers_path is None:
        published = importlib.import_module("models.foundation.checkpoints.published")
        options = published.without_folder(options, kind)
    return kind(options, seed)


def choices() -> Choices:
    """What `type` may be in [model], [adapter] and [optimizer]: what the reader of settings is to be given."""
    import optimizers
    from utils import adapters

    return {
        "model": Choice(lambda model_type: find(model_type).Options, spelling=spelling),
        "adapter": adapters.choice(),
        "optimizer": optimizers.choice(),
    }
