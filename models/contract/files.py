"""A model's files: where its parts lie, how their tensors are named and kept, and whether they belong together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import nn

from models.foundation.checkpoints.denoiser import DenoiserWeights
from models.foundation.checkpoints.folders import TextPart, all_of, problems_of
from models.foundation.checkpoints.key_layouts import KeyLayout
from models.foundation.checkpoints.storage import StorageRules
from models.foundation.encoders.parts import ModelParts
from utils.dataset.encoders import Encoder
from utils.errors import Problem, UserError
from utils.quantised.formats import FORMATS, Format
from utils.settings.model_schema import ModelSettings, torch_dtype

Features = Mapping[str, torch.Tensor]
"""What the encoders of a model make of samples, by name, each (B, ...)."""


class ModelEncoder(Encoder, Protocol):
    """An encoder of a model."""

    def check(self) -> None:
        """Whether its files are whole and fit one another, from headers alone.

        Raises:
            UserError: they do not.
        """


class ModelFiles(ABC):
    """The files of a model, and the options that name them.

    Attributes:
        Options: the `[model]` keys of this model.
        denoiser_class: name of the stock class of diffusers.
        denoiser_folder: the denoiser's part of a diffusers folder; a property if an option chooses it.
        config_keys: keys that the denoiser's configuration must have.
        text_parts: the text encoders, and where a diffusers folder keeps them; a property if options or the folder
            decide which ones exist.
        folder_has_scheduler: whether a diffusers folder has a scheduler; otherwise inference makes it.
        original_layout: names of the publisher's single-file checkpoint, if they differ from diffusers' names.
        keep_in_high_precision: parts of the names of parameters that stay float32 regardless of `dtype`.
        block_format: the format of the Linears of the repeated blocks, if they are quantised.
        spec_architecture: what ModelSpec, in the headers of weights, calls the model; default: its type with hyphens; a
            property if the model's files decide.
        comfyui_note: what one must do in ComfyUI to use an export, beyond loading it.
    """

    Options: ClassVar[type[ModelSettings]] = ModelSettings
    denoiser_class: ClassVar[str]
    denoiser_folder: str = "transformer"
    config_keys: ClassVar[tuple[str, ...]] = ()
    text_parts: tuple[TextPart, ...] = ()
    folder_has_scheduler: ClassVar[bool] = True
    original_layout: ClassVar[KeyLayout | None] = None
    keep_in_high_precision: ClassVar[tuple[str, ...]] = ()
    spec_architecture: str | None = None
    comfyui_note: ClassVar[str | None] = None

    def __init__(self, options: ModelSettings, seed: int = 0):
        self.options = options
        self.seed = seed
        self.dtype: torch.dtype = torch_dtype(options.dtype)
        self.block_format: Format | None = FORMATS.get(options.transformer_dtype)
        kept = options.dtype if self.block_format else options.transformer_dtype
        self.denoiser_dtype: torch.dtype = torch_dtype(kept or options.dtype)

    def check(self) -> None:
        """Whether the files that the options name exist and belong to this model, from their headers only.

        Raises:
            UserError: says what is missing or does not fit.
        """
        self.check_folder()
        if problems := all_of(self.problems_of_parts()):
            raise UserError(problems)
        self.check_tensors()

    def check_folder(self) -> None:
        """Whether all parts of the diffusers folder exist, or the files that replace their weights.

        Raises:
            UserError: lists everything that is missing or damaged.
        """
        self.parts.check()

    def problems_of_parts(self) -> Iterable[Problem]:
        """Why the parts of a complete folder do not belong to this model, or do not fit each other or the options.

        Raises:
            UserError: the configuration of a part belongs to another model.
        """
        return []

    def check_tensors(self) -> None:
        """Whether denoiser and encoders find their tensors in the files, by name and shape.

        Raises:
            UserError: lists all that do not fit.
        """
        encoders = [encoder.check for encoder in self.encoders()]
        problems = problems_of([lambda: self.weights.open(self.weights.build_empty()), *encoders])
        if problems:
            raise UserError(problems)

    @abstractmethod
    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        """The VAE first, then the others; with control images (if the model takes them) also their encoders."""

    def build_denoiser(self) -> nn.Module:
        """The whole diffusers module, from its configuration, with its initial weights."""
        return self.parts.made_denoiser()

    @cached_property
    def parts(self) -> ModelParts:
        """Denoiser and text encoders: where they are, and their configurations."""
        asked = self.options.text_encoder_dtype
        kept = asked if asked in FORMATS else None
        return ModelParts(
            self.options,
            self.denoiser_class,
            self.denoiser_folder,
            self.config_keys,
            self.text_parts,
            dtype=self.dtype if asked is None or kept else torch_dtype(asked),
            kept=kept,
            with_scheduler=self.folder_has_scheduler,
        )

    @property
    def storage(self) -> StorageRules:
        """In which form each parameter of the denoiser is kept."""
        return StorageRules.with_high_precision(self.denoiser_dtype, self.keep_in_high_precision)

    @property
    def weights(self) -> DenoiserWeights:
        """How the denoiser is built and where its weights lie."""
        seed = self.seed if self.options.from_scratch else None
        return DenoiserWeights(
            self.build_denoiser, self.options.type, self.parts.denoiser_path, self.original_layout, self.storage, seed
        )
