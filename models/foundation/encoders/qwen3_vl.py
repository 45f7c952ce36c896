"""Qwen3-VL as a text encoder for captions in a model's template.

Shapes: B captions, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.foundation.encoders.text_features import EncodedText, Shapes, TextFeatures
from models.foundation.layers.chain import capture_outputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAST = -1
"""The last layer, in `layers`."""


@dataclass(frozen=True)
class Qwen3VLStates(TextFeatures):
    """What layers of Qwen3-VL's text model give for the tokens of a caption in a template: for each caption (l, N D)
    for N layers, side by side, and a mask (l,) of ones. They are as the layers give them: the text model's last norm,
    which transformers applies to the last of its hidden states, is left out.

    Attributes:
        name: of the features.
        before, after: the template around the caption.
        skipped: the beginning of `before`, up to a special token, whose tokens are not features.
        length: number of tokens that are read, including those of the template. What a longer caption loses are its
            last words, not what stands after it.
        layers: the numbers of the layers, from 1.
    """

    name: str
    before: str
    after: str
    skipped: str
    length: int
    layers: tuple[int, ...] = (LAST,)

    def shapes(self, config: PretrainedConfig) -> Shapes:
        width = len(self.layers) * config.hidden_size
        return {self.name: (self.length, width), f"{self.name}_mask": (self.length,)}

    def written(self, tokenizer: Any, caption: str) -> str:
        return self.before + caption + self.after

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> EncodedText:
        skipped, ending = (len(tokenizer(text).input_ids) for text in (self.skipped, self.after))
        rows = [tokenizer(self.written(tokenizer, caption)).input_ids for caption in captions]
        rows = [row if len(row) <= self.length else row[: self.length - ending] + row[-ending:] for row in rows]
        # Padding on the right changes nothing, since no token looks ahead.
        tokens = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(text_encoder.device)
        asked = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        hidden_BLD = torch.cat(states(text_encoder, self.layers, **asked), dim=-1)
        features = [hidden[skipped : len(row)] for hidden, row in zip(hidden_BLD, rows, strict=True)]
        masks = [torch.ones(len(hidden), dtype=torch.bool) for hidden in features]
        return {self.name: features, f"{self.name}_mask": masks}


def states(text_encoder: nn.Module, layers: Sequence[int], **inputs: torch.Tensor) -> list[torch.Tensor]:
    """What these layers of Qwen3-VL's text model, numbered from 1, give (B, L, D)."""
    all_of_them = text_encoder.language_model.layers
    read = [all_of_them[layer if layer < 0 else layer - 1] for layer in layers]
    with capture_outputs(read, lambda module, given, made: made) as captured:
        text_encoder(**inputs, use_cache=False)
    return captured
