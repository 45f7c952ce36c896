"""What Qwen-Image 2.1 reads from Qwen3-VL: a caption in its template, alone or with control images before it.

Shapes: B samples, L tokens, D features, C channels, F frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.foundation.encoders.first_frame import first_pictures
from models.foundation.encoders.qwen3_vl import Qwen3VLStates
from models.foundation.encoders.qwen3_vl_pictures import BEFORE, BEHIND, Qwen3VLPictureEncoder
from models.foundation.encoders.qwen_vl import PICTURE
from models.foundation.encoders.text_features import EncodedText
from models.foundation.layers.chain import capture_outputs
from utils.dataset.inputs import control_names
from utils.dataset.samples import Bucket

SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
USER = "<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Caption(Qwen3VLStates):
    """What the last layer gives for the tokens of a caption in the model's template, and the mask; without those of the
    system message, and before the text model's last norm, which the last of transformers' hidden states have behind
    them. An empty caption is a space, as in the stock pipeline; of one that is too long the last words are left out,
    not what stands behind it."""

    layers: tuple[int, ...] = (-1,)

    def written(self, tokenizer: Any, caption: str) -> str:
        return f"{SYSTEM}{USER}{caption or ' '}{ASSISTANT}"

    def row(self, tokenizer: Any, caption: str) -> list[int]:
        row = tokenizer(self.written(tokenizer, caption)).input_ids
        return self.shortened(tokenizer, row, self.length)

    @staticmethod
    def shortened(tokenizer: Any, row: list[int], length: int) -> list[int]:
        """A row of tokens that ends as the template does, of no more than `length`."""
        behind = len(tokenizer(ASSISTANT).input_ids)
        return row if len(row) <= length else row[: length - behind] + row[-behind:]

    def states(self, text_encoder: nn.Module, tokens_BL: torch.Tensor, **pictures: Any) -> Sequence[torch.Tensor]:
        last = text_encoder.language_model.layers[-1]
        with capture_outputs([last], lambda module, given, made: made) as captured:
            text_encoder(tokens_BL, use_cache=False, **pictures)
        return captured

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        # As many as the tokenizer makes of it; it ends with a token of its own.
        skipped = len(tokenizer(SYSTEM).input_ids)
        made = super().__call__(text_encoder, tokenizer, captions)
        return {name: [row[skipped:] for row in rows] for name, rows in made.items()}


class ControlledCaptionEncoder(Qwen3VLPictureEncoder):
    """Qwen3-VL as an `Encoder` of a caption together with its control images, which stand before it with their numbers.
    Beside the features of `Caption` it yields `<name>_places` (K,): how many of the text's tokens come before each
    picture. Of a picture's own tokens nothing is kept, since the model puts its latents in their places.

    Args:
        controls: number of control images.
        others, further: as of `TextEncoder`; the features are a `Caption`.
    """

    features: Caption

    def __init__(self, *others: Any, controls: int, **further: Any):
        super().__init__(*others, **further)
        self.controls = control_names(controls)
        self.reads = ("caption", *self.controls)

    @property
    def _shown(self) -> str:
        """What stands before a caption, with one token for each picture."""
        numbers = range(1, len(self.controls) + 1)
        return " ".join(f"<image{number}>{BEFORE}{PICTURE}{BEHIND}" for number in numbers)

    @torch.no_grad()
    def encode(self, caption: list[str], **controls_BCFHW: torch.Tensor) -> EncodedText:
        self.truncated += sum(self.token_count(text) > self.token_limit for text in caption)
        by_control = [first_pictures(controls_BCFHW[name]) for name in self.controls]
        name, picture = self.features.name, self.model.config.image_token_id
        skipped = len(self.tokenizer(SYSTEM).input_ids)
        made: dict[str, list[torch.Tensor]] = {name: [], f"{name}_mask": [], f"{name}_places": []}
        for text, *pictures in zip(caption, *by_control, strict=True):
            patches, counts = self.patches(pictures)
            short = self._tokens(text)
            counts_left = iter(counts)
            row = [same for token in short for same in [token] * (next(counts_left) if token == picture else 1)]
            is_text_L = torch.tensor(row[skipped:]) != picture
            made[name].append(self.states(row, patches)[skipped:][is_text_L.to(self.model.device)])
            made[f"{name}_mask"].append(torch.ones(int(is_text_L.sum()), dtype=torch.bool))
            slots = [place for place, token in enumerate(short[skipped:]) if token == picture]
            made[f"{name}_places"].append(torch.tensor(slots) - torch.arange(len(slots)))
        return {**made, f"{name}_places": torch.stack(made[f"{name}_places"])}

    def _tokens(self, caption: str) -> list[int]:
        """The tokens that are read, with one for each picture."""
        features, before = self.features, self.tokenizer(f"{SYSTEM}{USER}").input_ids
        plain = self.tokenizer(f"{caption or ' '}{ASSISTANT}").input_ids
        behind = features.shortened(self.tokenizer, plain, features.length - len(before))
        return before + self.tokenizer(self._shown).input_ids + behind

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        name, count = self.features.name, len(self.controls)
        tokens, width = self.shapes[name]
        tokens += len(self.tokenizer(self._shown).input_ids) - count
        return {
            name: ((tokens, width), self.dtype),
            f"{name}_mask": ((tokens,), torch.bool),
            f"{name}_places": ((count,), torch.int64),
        }

    def seen(self, width: int, height: int) -> tuple[int, int]:
        """The width and height in pixels at which it sees a picture of this size."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        size = self.processor.size
        seen = smart_resize(height, width, self.side, size["shortest_edge"], size["longest_edge"])
        return seen[1], seen[0]
