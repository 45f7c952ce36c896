"""The parts of a model: where its denoiser and its text encoders are, in a diffusers folder or by an option."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.foundation.checkpoints.configs import made_of
from models.foundation.checkpoints.folders import TextPart, check_diffusers_folder, read_config
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import TextFeatures
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model, as its options name them.

    Attributes:
        denoiser_class: name of the stock class of diffusers.
        denoiser_folder: where a diffusers folder keeps the denoiser.
        config_keys: keys that the denoiser's configuration must have.
        text_parts: the text encoders, and where a diffusers folder keeps them.
        dtype: the type in which text encoders compute.
        kept: the format in which the Linears of text encoders are kept; None for `dtype`.
        with_scheduler: whether a diffusers folder has a scheduler.
    """

    options: ModelSettings
    denoiser_class: str
    denoiser_folder: str
    config_keys: tuple[str, ...]
    text_parts: tuple[TextPart, ...]
    dtype: torch.dtype
    kept: str | None
    with_scheduler: bool = True

    def check(self) -> None:
        """Whether all parts of the diffusers folder are there, or the files that replace their weights.

        Raises:
            UserError: lists everything that is missing or damaged.
        """
        check_diffusers_folder(self.options, self.denoiser_folder, self.text_parts, with_scheduler=self.with_scheduler)

    # Kept, as every micro-batch asks for it.
    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The configuration of the denoiser.

        Raises:
            UserError: it is missing or damaged, or belongs to another model.
        """
        return read_config(
            self.options.diffusers_path, self.denoiser_folder, model=self.denoiser_class, keys=self.config_keys
        )

    def made_denoiser(self, **further: Any) -> nn.Module:
        """The denoiser that its class of diffusers makes of the configuration.

        Args:
            further: arguments beside the configuration.

        Raises:
            UserError: it makes none of it.
        """
        return made_of(self.denoiser_class, self.denoiser_config, self._denoiser_config_file, **further)

    @property
    def denoiser_path(self) -> Path:
        """File or folder of the denoiser's weights."""
        return self.options.transformer_path or self.options.diffusers_path / self.denoiser_folder

    def misfit(self, message: str) -> Problem:
        """A problem of the denoiser's configuration."""
        return Problem(str(self._denoiser_config_file), "", message)

    @property
    def _denoiser_config_file(self) -> Path:
        return self.options.diffusers_path / self.denoiser_folder / "config.json"

    def text_part(self, name: str) -> TextPart:
        """The text encoder of this name."""
        return next(part for part in self.text_parts if part.name == name)

    def text_config(self, name: str) -> dict[str, Any]:
        """The configuration of the text encoder of this name.

        Raises:
            UserError: it is missing or damaged, or belongs to another model.
        """
        return self.text_part(name).config(self.options.diffusers_path)

    def text_encoder(
        self, features: TextFeatures, kind: type[TextEncoder] = TextEncoder, *, kept: str | None = None, **further: Any
    ) -> TextEncoder:
        """The text encoder that gives these features, with the weights that the options name.

        Args:
            kind: the class of the encoder.
            kept: the format of this encoder's Linears, if it is not that of all text encoders.
            further: arguments of this class beyond those of `TextEncoder`.

        Raises:
            UserError: its configuration is missing or damaged, or belongs to another model.
        """
        part, folder = self.text_part(features.encoder), self.options.diffusers_path
        file, kept = part.override(self.options), kept or self.kept
        return kind(part, folder, file, self.dtype, features, kept=kept, **further)
