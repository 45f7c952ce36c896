"""CLIP text encoders, for models that read their words and not only their summary; frozen, or trained in the entry.

Shapes: B captions, L tokens, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from models.foundation.files import read_config
from models.foundation.text_encoders import Original, TextEncoder
from models.foundation.weights import fingerprint
from utils.dataset.samples import Bucket

Pooled = Literal["text_embeds", "pooler_output"]
CONFIG_KEYS = ("hidden_size", "max_position_embeddings", "projection_dim")


@dataclass(frozen=True)
class ClipFeatures:
    """A hidden state of CLIP, of `length` tokens (B, L, D), padding included and without a mask, as inference makes it;
    and beside it what CLIP pools of the caption (B, D).

    Attributes:
        pooled: of transformers' output: with CLIP's projection, without it, or None for no pooled feature.
        layer: which hidden state: that before the last layer is -2.
        normalised: whether it goes through CLIP's last norm.
    """

    name: str
    length: int
    pooled: Pooled | None
    layer: int = -2
    normalised: bool = False

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        return self.of_tokens(text_encoder, self.tokens(tokenizer, captions).to(text_encoder.device))

    def tokens(self, tokenizer: Any, captions: list[str]) -> torch.Tensor:
        """Numbers of the captions' tokens, (B, L)."""
        return tokenizer(
            captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids

    def of_tokens(self, text_encoder: nn.Module, tokens_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features, by name."""
        output = text_encoder(tokens_BL, output_hidden_states=True)
        hidden_BLD = output.hidden_states[self.layer]
        if self.normalised:
            hidden_BLD = getattr(text_encoder, "text_model", text_encoder).final_layer_norm(hidden_BLD)
        features = {self.name: hidden_BLD}
        return {**features, f"{self.name}_pooled": output[self.pooled]} if self.pooled else features


def clip_config(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a CLIP text encoder of a diffusers folder.

    Raises:
        SettingsError: it is missing, damaged, or another model's.
    """
    return read_config(folder, part, model="clip_text_model", keys=CONFIG_KEYS)


def clip(
    name: str,
    folder: Path,
    part: str,
    tokenizer: str,
    file: Path | None,
    dtype: torch.dtype,
    pooled: Pooled | None,
    *,
    original: Original | None = None,
    trained: bool = False,
    **read: Any,
) -> TextEncoder:
    """A CLIP text encoder of a diffusers folder with the features `<name>` and, if asked for, `<name>_pooled`.

    Args:
        original: how it is kept in the publisher's checkpoints.
        trained: it yields the numbers of tokens, `<name>_tokens`, from which the model makes features itself.
        read: further fields of `ClipFeatures`.
    """
    config = clip_config(folder, part)
    length, projected = config["max_position_embeddings"], pooled == "text_embeds"
    shapes = {name: (length, config["hidden_size"])}
    if pooled:
        shapes[f"{name}_pooled"] = (config["projection_dim" if projected else "hidden_size"],)
    model_class = CLIPTextModelWithProjection if projected else CLIPTextModel
    features = ClipFeatures(name, length, pooled, **read)
    encoder = ClipTokens if trained else TextEncoder
    return encoder(name, model_class, folder, part, tokenizer, file, dtype, features, shapes, original)


class ClipTokens(TextEncoder):
    """What a CLIP that is trained reads: the numbers of a caption's tokens. Its own weights are the model's to load."""

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint("tokens", self.name, str(self.features.length), self.tokenizer_folder)

    def load(self, device: torch.device) -> None:
        self.truncated = 0

    def encode(self, caption: list[str]) -> dict[str, torch.Tensor]:
        self.truncated += sum(self.token_count(text) > self.token_limit for text in caption)
        return {f"{self.name}_tokens": self.features.tokens(self.tokenizer, caption)}

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {f"{self.name}_tokens": ((self.features.length,), torch.int64)}


def clip_module(encoder: TextEncoder, *, loaded: bool) -> nn.Module:
    """CLIP as a part of what is trained, with its weights or as it is born; its parameters are named as in its files.

    Args:
        encoder: which `clip` gave.
    """
    model = encoder.load_model() if loaded else encoder.model_class(encoder.config())
    return model if hasattr(model, "text_model") else _Nested(model)


class _Nested(nn.Module):
    """transformers keeps a CLIP without projection one level higher than its files, and all adapters, have it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.text_model = model

    def forward(self, *inputs: Any, **keys: Any) -> Any:
        return self.text_model(*inputs, **keys)
