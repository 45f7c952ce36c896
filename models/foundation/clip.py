"""CLIP text encoders, for models that read their words and not only their summary.

Shapes: B captions, L tokens, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from models.foundation.files import read_config
from models.foundation.text_encoders import TextEncoder

Pooled = Literal["text_embeds", "pooler_output"]
CONFIG_KEYS = ("hidden_size", "max_position_embeddings", "projection_dim")


@dataclass(frozen=True)
class ClipFeatures:
    """The hidden state before CLIP's last layer, of `length` tokens (B, L, D), padding included and without a mask, as
    inference makes it; and beside it what CLIP pools of the caption (B, D).

    Attributes:
        pooled: of transformers' output: with CLIP's projection, without it, or None for no pooled feature.
    """

    name: str
    length: int
    pooled: Pooled | None

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        tokens = tokenizer(captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        output = text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True)
        features = {self.name: output.hidden_states[-2]}
        return {**features, f"{self.name}_pooled": output[self.pooled]} if self.pooled else features


def clip_config(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a CLIP text encoder of a diffusers folder.

    Raises:
        SettingsError: it is missing, damaged, or another model's.
    """
    return read_config(folder, part, model="clip_text_model", keys=CONFIG_KEYS)


def clip(
    name: str, folder: Path, part: str, tokenizer: str, file: Path | None, dtype: torch.dtype, pooled: Pooled | None
) -> TextEncoder:
    """A CLIP text encoder of a diffusers folder with the features `<name>` and, if asked for, `<name>_pooled`."""
    config = clip_config(folder, part)
    length, projected = config["max_position_embeddings"], pooled == "text_embeds"
    shapes = {name: (length, config["hidden_size"])}
    if pooled:
        shapes[f"{name}_pooled"] = (config["projection_dim" if projected else "hidden_size"],)
    model_class = CLIPTextModelWithProjection if projected else CLIPTextModel
    features = ClipFeatures(name, length, pooled)
    return TextEncoder(name, model_class, folder, part, tokenizer, file, dtype, features, shapes)
