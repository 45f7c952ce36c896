"""A language model that reads captions, beside their tokens for T5: what Anima's text conditioner takes.

Shapes: L tokens of the language model, M tokens of T5, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from models.foundation.checkpoints.headers import fingerprint
from models.foundation.encoders.text import TextEncoder, load_tokenizer
from models.foundation.encoders.text_features import EncodedText, MaskedHiddenStates
from utils.dataset.samples import Bucket
from utils.errors import UserError

TOKENIZER = "t5_tokenizer"
"""The part of a diffusers folder."""
TOKENS = "t5_tokens"


@dataclass(frozen=True)
class PlainCaptions(MaskedHiddenStates):
    """The last hidden state of a causal language model for the tokens of each caption alone, (l, D) with l up to
    `length`, and a mask (l,) of ones. A caption without tokens is a row of zeros."""

    name: str
    length: int

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        rows = [tokenizer(caption, max_length=self.length, truncation=True).input_ids for caption in captions]
        # Padding behind a caption does not change it.
        tokens = [torch.tensor(row or [0]) for row in rows]
        tokens_BL = pad_sequence(tokens, batch_first=True).to(text_encoder.device)
        hidden_BLD = text_encoder(tokens_BL, use_cache=False).last_hidden_state
        return {
            self.name: [
                hidden[: len(row)] if row else torch.zeros_like(hidden[:1])
                for hidden, row in zip(hidden_BLD, rows, strict=True)
            ],
            f"{self.name}_mask": [torch.ones(max(len(row), 1), dtype=torch.bool) for row in rows],
        }


class WithT5Tokens(TextEncoder):
    """The language model, whose features have the caption's T5 tokens beside them: `t5_tokens` (m,) with m up to as
    many as it reads itself, and `t5_tokens_mask` of ones.

    Args:
        known: the number of T5 tokens that the model knows.
        others, further: as of `TextEncoder`.
    """

    def __init__(self, *others: Any, known: int, **further: Any):
        super().__init__(*others, **further)
        self.known = known

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(super().fingerprint, self.folder / TOKENIZER)

    @cached_property
    def t5_tokenizer(self) -> Any:
        return load_tokenizer(self.folder / TOKENIZER)

    def _check_tokenizer(self) -> None:
        super()._check_tokenizer()
        if len(self.t5_tokenizer) > self.known:
            raise UserError.of(
                f"this tokenizer has {len(self.t5_tokenizer)} tokens, and the text conditioner knows {self.known}; is "
                "it another model's?",
                str(self.folder / TOKENIZER),
            )

    @torch.no_grad()
    def encode(self, caption: list[str]) -> EncodedText:
        rows = [self.t5_tokenizer(one, max_length=self.token_limit, truncation=True).input_ids for one in caption]
        return {
            **super().encode(caption),
            TOKENS: [torch.tensor(row) for row in rows],
            f"{TOKENS}_mask": [torch.ones(len(row), dtype=torch.bool) for row in rows],
        }

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape = (self.token_limit,)
        own = {TOKENS: (shape, torch.int64), f"{TOKENS}_mask": (shape, torch.bool)}
        return {**super().feature_shapes(bucket), **own}
