"""CLIP text encoders for models that read all tokens and not only the pooled text; frozen, or trained in the entry.

Shapes: B captions, L tokens, D features. A weighted caption is a list of its pieces, (text, weight).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from models.foundation.checkpoints.headers import fingerprint
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import HiddenStates, Shapes
from utils.dataset.samples import Bucket

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Pooled = Literal["text_embeds", "pooler_output"]
Pieces = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class ClipFeatures(HiddenStates):
    """A hidden state of CLIP with `length` tokens (B, L, D), including padding and without a mask, as in inference; and
    the pooled feature of the caption (B, D), which weights do not change.

    Attributes:
        pooled: the field of transformers' output: with CLIP's projection, without it, or None for no pooled feature.
        layer: index of the hidden state; -2 is the one before the last layer.
        normalised: whether it passes through CLIP's last norm.
    """

    name: str
    length: int
    pooled: Pooled | None
    layer: int = -2
    normalised: bool = False

    def shapes(self, config: PretrainedConfig) -> Shapes:
        pooled_width = config.projection_dim if self.pooled == "text_embeds" else config.hidden_size
        return super().shapes(config) | ({f"{self.name}_pooled": (pooled_width,)} if self.pooled else {})

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[Pieces]) -> dict[str, torch.Tensor]:
        tokens_BL, weights_BL = self.tokens(tokenizer, captions)
        return self.of_tokens(text_encoder, tokens_BL.to(text_encoder.device), weights_BL.to(text_encoder.device))

    def tokens(self, tokenizer: Any, captions: list[Pieces]) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids of the captions' tokens and their weights, both (B, L). No token spans two pieces; tokens that begin,
        end and pad a caption have the weight 1."""
        tokens = tokenizer(
            [_texts(pieces) for pieces in captions],
            is_split_into_words=True,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        weights = [
            [1.0 if number is None else pieces[number][1] for number in tokens.word_ids(row)]
            for row, pieces in enumerate(captions)
        ]
        return tokens.input_ids, torch.tensor(weights)

    def of_tokens(
        self, text_encoder: nn.Module, tokens_BL: torch.Tensor, weights_BL: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The features, by name."""
        output = text_encoder(tokens_BL, output_hidden_states=True)
        hidden_BLD = output.hidden_states[self.layer]
        if self.normalised:
            hidden_BLD = getattr(text_encoder, "text_model", text_encoder).final_layer_norm(hidden_BLD)
        features = {self.name: weighed(hidden_BLD, weights_BL)}
        return {**features, f"{self.name}_pooled": output[self.pooled]} if self.pooled else features


def weighed(hidden_BLD: torch.Tensor, weights_BL: torch.Tensor) -> torch.Tensor:
    """Hidden states h times the weights w of their tokens, scaled so that the mean over all tokens and features of each
    caption stays the same: h w mean(h) / mean(h w). If all weights are 1, h is unchanged.

    This is the emphasis "Original" of AUTOMATIC1111's web UI, and kohya's `get_weighted_text_embeddings`. ComfyUI moves
    h away from the empty caption's h, and kohya's later code does not restore the mean.
    """
    wide_BLD = hidden_BLD.float()
    weighed_BLD = wide_BLD * weights_BL[..., None]
    restored_BLD = weighed_BLD * (_mean(wide_BLD) / _mean(weighed_BLD))
    has_weights_B = (weights_BL != 1).any(dim=1)
    return torch.where(has_weights_B[:, None, None], restored_BLD.to(hidden_BLD.dtype), hidden_BLD)


def _mean(hidden_BLD: torch.Tensor) -> torch.Tensor:
    return hidden_BLD.mean(dim=(1, 2), keepdim=True)


def _texts(pieces: Pieces) -> list[str]:
    return [text for text, _ in pieces]


class ClipEncoder(TextEncoder):
    """A frozen CLIP, which weighs the pieces of captions and yields `<name>` and, if requested, `<name>_pooled`."""

    reads = ("weighted_caption",)

    def token_count(self, caption: Pieces) -> int:
        return len(self.tokenizer(_texts(caption), is_split_into_words=True).input_ids)

    def encode(self, weighted_caption: list[Pieces]) -> dict[str, torch.Tensor]:
        return super().encode(weighted_caption)


class ClipTokens(ClipEncoder):
    """The input of a CLIP that is trained: the ids of a caption's tokens, `<name>_tokens`, and their weights,
    `<name>_weights`. The model computes the features itself and loads the weights of this CLIP."""

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint("weighted tokens", self.name, str(self.features.length), self.tokenizer_folder)

    def load(self, device: torch.device) -> None:
        self.truncated = 0

    def encode(self, weighted_caption: list[Pieces]) -> dict[str, torch.Tensor]:
        self.truncated += sum(self.token_count(pieces) > self.token_limit for pieces in weighted_caption)
        tokens_BL, weights_BL = self.features.tokens(self.tokenizer, weighted_caption)
        return {f"{self.name}_tokens": tokens_BL, f"{self.name}_weights": weights_BL}

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape = (self.features.length,)
        return {f"{self.name}_tokens": (shape, torch.int64), f"{self.name}_weights": (shape, torch.float32)}


def clip_module(encoder: TextEncoder, *, loaded: bool) -> nn.Module:
    """CLIP as a trained module, with its weights or with initial ones; its parameters have the names of its files.

    Args:
        encoder: its `ClipEncoder` or `ClipTokens`.
    """
    model = encoder.load_model() if loaded else encoder.stock_class(encoder.config(), **encoder.arguments)
    return model if hasattr(model, "text_model") else _Nested(model)


class _Nested(nn.Module):
    """Adds the level that the files and all adapters of a CLIP without projection have, and transformers has not."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.text_model = model

    def forward(self, *inputs: Any, **keys: Any) -> Any:
        return self.text_model(*inputs, **keys)
