"""The model to which files of weights belong, without its weights: by a run's config, or by its type and a path."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

import models
from models.assembly.stage import model_names
from models.base import BasePipeline
from models.foundation.checkpoints.adapter_files import TEXT_ENCODERS, file_in, header_of
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.headers import read_header
from utils.adapters.kinds import ModelNames
from utils.adapters.presets import TensorSource
from utils.errors import UserError
from utils.settings.model_schema import ModelSettings, TextEncoderFile
from utils.settings.reader import read_settings

logger = logging.getLogger(__name__)

TYPE = "model_type"
"""Where the header of an export says of which type its model is."""


@dataclass(frozen=True)
class Model:
    """A model, whose weights are read one by one when they are asked for.

    Attributes:
        has_weights: whether a place was named where they are.
    """

    pipeline: BasePipeline
    has_weights: bool = True

    @cached_property
    def denoiser(self) -> nn.Module:
        """The whole of it, without memory."""
        return self.pipeline.weights.build_empty()

    @cached_property
    def names(self) -> ModelNames:
        """What its modules are called, here and in files."""
        return replace(model_names(self.pipeline, self.denoiser), read=lambda name: self.source.read(name))

    @cached_property
    def source(self) -> TensorSource:
        """Its weights.

        Raises:
            UserError: they are not there.
        """
        if not self.has_weights:
            raise UserError.of("the weights of the base are needed for this: name their file or folder", where="--base")
        return self.pipeline.weights.anew()

    def weight(self, name: str) -> torch.Tensor:
        """One of its weights, in float32."""
        return self.source.read(name).float()

    def with_weights(self, path: Path) -> Model:
        """The same model with the weights of another place: a file, a folder of the denoiser's, or a folder with a
        folder for each part. Text encoders are that place's if they are trained and it has some."""
        own, options = path / self.pipeline.denoiser_folder, self.pipeline.options
        here = {part.name: path / part.folder for part in self.texts_in(path) if getattr(options, part.lr_option)}
        texts = [entry for entry in options.text_encoders if entry.type not in here]
        if path.is_dir():
            # Of a file the pipeline finds them.
            texts += [TextEncoderFile(type=name, path=place) for name, place in here.items()]
        given = {"transformer_path": own if own.is_dir() else path, "from_scratch": False, "text_encoders": texts}
        return self._with(given)

    def training(self, texts: Sequence[TextPart]) -> Model:
        """The same model, of which these text encoders are a part, and no others; they are read in float32."""
        kind = type(self.pipeline.options)
        rates = [name for name in kind.model_fields if name.startswith("text_encoder") and name.endswith("_lr")]
        return self._with(dict.fromkeys(rates) | {part.lr_option: 1.0 for part in texts} | {"dtype": "float32"})

    def _with(self, changes: Mapping[str, object]) -> Model:
        options = self.pipeline.options.model_copy(update=dict(changes))
        return Model(type(self.pipeline)(options, self.pipeline.seed), self.has_weights)

    def texts_in(self, path: Path | None) -> list[TextPart]:
        """The text encoders that this model can train, of which a file or a folder with parts has weights."""
        known = [part for part in self.pipeline.text_parts if hasattr(part, "lr_option")]
        if path is None or path.is_dir():
            return [part for part in known if path and (path / part.folder).is_dir()]
        keys = read_header(path, with_gguf=True).files
        return [part for part in known if any(key.startswith(part.names.prefix) for key in keys)]

    def texts_of_base(self) -> list[TextPart]:
        """Those of which the model's own place has weights."""
        options = self.pipeline.options
        given = {entry.type for entry in options.text_encoders}
        own = self.texts_in(options.diffusers_path)
        return [part for part in self.pipeline.text_parts if part.name in given or part in own]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a model."""
    group = parser.add_argument_group("the model", "by the config of a run, or by type and base")
    group.add_argument("--config", type=Path, metavar="TOML", help="a run's config, whose [model] is taken")
    group.add_argument(
        "--type", metavar="TYPE", help="the model's type; default: what the header of a file of ours says"
    )
    group.add_argument(
        "--base", type=Path, metavar="PATH", help="a folder in diffusers' layout, or a single file of the denoiser"
    )
    group.add_argument(
        "--architecture", metavar="NAME", help="which model of the type a single file is, as in configs/"
    )


def open_model(arguments: argparse.Namespace, files: Sequence[Path] = ()) -> Model:
    """The model that the arguments name.

    Args:
        files: adapters, whose headers may say what it is, and for whose text encoders it is to have some.

    Raises:
        UserError: they name none, or one that is not there.
    """
    if arguments.config:
        given = [name for name in ("type", "base", "architecture") if getattr(arguments, name)]
        if given:
            raise UserError.of("names the model already; leave one of them out", where=f"--config beside --{given[0]}")
        options = read_settings(arguments.config, models.choices()).model
    else:
        options = _options(arguments, files)
    if options.preset_adapters:
        logger.warning("the config's preset_adapters are left out: the base is taken without them")
        options = options.model_copy(update={"preset_adapters": []})
    return Model(models.build(options), bool(arguments.config or arguments.base))


def _options(arguments: argparse.Namespace, files: Sequence[Path]) -> ModelSettings:
    said = {header_of(file_in(file)).get(TYPE) for file in files} - {None}
    model_type = arguments.type or (said.pop() if len(said) == 1 else None)
    if model_type is None:
        raise UserError.of(
            "which model it is for is not known: add --type, as in --type flux; or --config", where="--type"
        )
    kind, base = models.find(model_type).Options, arguments.base
    keys = {"type": models.spelling(model_type), "architecture": arguments.architecture}
    if base is not None:
        if not base.exists():
            raise UserError.of("no such file or folder", str(base), "--base")
        keys["diffusers_path" if base.is_dir() else "transformer_path"] = base
        if base.is_dir() and any(_has_texts(file) for file in files):
            # Where text encoders are trained, they are a part of the model.
            rates = [name for name in kind.model_fields if name.startswith("text_encoder") and name.endswith("_lr")]
            keys |= dict.fromkeys(rates, 1.0)
    return kind(**keys)


def _has_texts(file: Path) -> bool:
    return any(name.startswith(TEXT_ENCODERS) for name in read_header(file_in(file)).files)
