"""Llama as a text encoder with several hidden states.

Shapes: B captions, N states, L tokens, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.foundation.encoders.text import TextEncoder, load_tokenizer
from models.foundation.encoders.text_features import Shapes, TextFeatures

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class StatesFeatures(TextFeatures):
    """The outputs of some layers of a language model (B, N, L, D), for models that also see the padding up to
    `length`."""

    name: str
    length: int
    layers: tuple[int, ...]

    def shapes(self, config: PretrainedConfig) -> Shapes:
        return {self.name: (len(self.layers), self.length, config.hidden_size)}

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        tokens = tokenizer(captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        tokens = tokens.to(text_encoder.device)
        output = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True)
        # The first state is the input of the first layer.
        return {self.name: torch.stack([output.hidden_states[1 + layer] for layer in self.layers], dim=1)}


class LlamaEncoder(TextEncoder):
    """Llama as a `TextEncoder`."""

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.tokenizer_folder, names_padding=False)
        # Llama has no padding token, and the stock pipelines pad with the end token.
        tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
