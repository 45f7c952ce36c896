"""Qwen3-VL as a text encoder for captions, of which models read the states of several layers.

Shapes: B captions, L tokens, K layers, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from models.foundation.encoders.text_features import Shapes, TextFeatures

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Qwen3VLStates(TextFeatures):
    """Hidden states of Qwen3-VL side by side for the tokens of each caption (l, K D), with l up to
    `length` - `skipped`, and a mask (l,) of ones.

    Attributes:
        layers: which hidden states; 0 are the embeddings.
        skipped: number of tokens at the beginning that are not features.
    """

    name: str
    length: int
    layers: tuple[int, ...]
    skipped: int = 0

    def shapes(self, config: PretrainedConfig) -> Shapes:
        tokens = self.length - self.skipped
        return {self.name: (tokens, len(self.layers) * config.hidden_size), f"{self.name}_mask": (tokens,)}

    def row(self, tokenizer: Any, caption: str) -> list[int]:
        """The tokens that are read for a caption."""
        return tokenizer(self.written(tokenizer, caption), max_length=self.length, truncation=True).input_ids

    def states(self, text_encoder: nn.Module, tokens_BL: torch.Tensor, **pictures: Any) -> Sequence[torch.Tensor]:
        """The states of `layers`, each (B, L, D).

        Args:
            pictures: what the encoder is told of pictures among the tokens.
        """
        states = text_encoder(tokens_BL, output_hidden_states=True, use_cache=False, **pictures).hidden_states
        return [states[layer] for layer in self.layers]

    def joined(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The features (B, L, K D) of these states."""
        return rearrange(list(states), "k b l d -> b l (k d)")

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        rows = [self.row(tokenizer, caption) for caption in captions]
        # It is causal, so padding behind a caption does not change it.
        tokens_BL = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(text_encoder.device)
        states_BLF = self.joined(self.states(text_encoder, tokens_BL))
        return {
            self.name: [states[self.skipped : len(row)] for states, row in zip(states_BLF, rows, strict=True)],
            f"{self.name}_mask": [torch.ones(len(row) - self.skipped, dtype=torch.bool) for row in rows],
        }
