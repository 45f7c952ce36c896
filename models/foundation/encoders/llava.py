"""LLaVA as a text encoder that reads a caption together with the first frame of its clip.

Shapes: B samples, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.foundation.checkpoints.headers import fingerprint
from models.foundation.encoders.first_frame import PROCESSOR, clip_processor, first_pictures
from models.foundation.encoders.hunyuan_prompts import StatePrompt
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import EncodedText
from utils.dataset.samples import Bucket
from utils.errors import UserError

if TYPE_CHECKING:
    from transformers import LlavaConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PICTURE, PROJECTOR = "<image>", "multi_modal_projector."
END_OF_HEADER = "<|end_header_id|>"
HEADERS = 3
"""Of the system, the user and the assistant."""
HEADER_TOKENS = 4
"""The end of the user's turn and the three tokens of the assistant's header, which the model does not see."""


@dataclass(frozen=True)
class PicturePrompt(StatePrompt):
    """A `StatePrompt` with one `PICTURE` before the caption, and with an assistant's header behind it, whose tokens are
    left out. Of the picture's tokens every `stride`-th precedes the caption's.

    Attributes:
        stride: 2, 4 and so on.
    """

    stride: int = 1

    def features(
        self, text_encoder: nn.Module, tokenizer: Any, texts: list[str], **pictures: torch.Tensor
    ) -> EncodedText:
        tokens = tokenizer(
            texts, padding="longest", padding_side="right", max_length=self.length, truncation=True, return_tensors="pt"
        )
        config = text_encoder.config
        count = picture_tokens(config)
        mask_BL, end = tokens.attention_mask.bool(), tokenizer.convert_tokens_to_ids(END_OF_HEADER)
        rows = [ids[mask] for ids, mask in zip(tokens.input_ids, mask_BL, strict=True)]
        at = [(row == config.image_token_index).nonzero()[0].item() for row in rows]
        wide = [
            torch.cat([row[:place], row.new_full((count,), config.image_token_index), row[place + 1 :]])
            for row, place in zip(rows, at, strict=True)
        ]
        ids_BL = nn.utils.rnn.pad_sequence(wide, batch_first=True, padding_value=tokenizer.pad_token_id)
        seen_BL = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in wide], batch_first=True)
        device = text_encoder.device
        states_BLD = self.state(
            text_encoder, input_ids=ids_BL.to(device), attention_mask=seen_BL.to(device), **pictures
        )
        features = [
            torch.cat([states[place : place + count : self.stride], states[count - 1 :][self._seen(row, end)]])
            for states, row, place in zip(states_BLD, rows, at, strict=True)
        ]
        return {self.name: features, f"{self.name}_mask": [torch.ones(len(one), dtype=torch.bool) for one in features]}

    def _seen(self, row_L: torch.Tensor, end: int) -> torch.Tensor:
        """The places of the tokens that the model sees, in a row with one token for the picture. Where the caption is
        so long that the header is cut off, the last tokens go in its place, as in the stock pipeline."""
        ends = (row_L == end).nonzero()
        last = ends[-1].item() if len(ends) >= HEADERS else len(row_L) - 1
        places = torch.arange(self.skipped, len(row_L))
        return places[(places <= last - HEADER_TOKENS) | (places > last)]


def picture_tokens(config: LlavaConfig) -> int:
    """The number of tokens that a picture has."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def in_one(reading: Mapping[str, Any], seeing: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of LLaVA of those of a Llama and of what sees for it, as ComfyUI's two files name them."""
    words = {name.removeprefix("language_model."): tensor for name, tensor in reading.items() if PROJECTOR not in name}
    text = {name: tensor for name, tensor in words.items() if "vision_tower." not in name and name != "lm_head.weight"}
    named = {f"language_model.model.{name.removeprefix('model.')}": tensor for name, tensor in text.items()}
    return named | {
        name if name.startswith(PROJECTOR) else f"vision_tower.{name.removeprefix('vision_tower.')}": tensor
        for name, tensor in seeing.items()
    }


class LlavaEncoder(TextEncoder):
    """LLaVA as an `Encoder` of a caption and of the first frame of its clip, with the settings in the folder's
    `image_processor`. As for `ClipVision`, it sees the frame at the size of the clip.

    Args:
        vision: a file of the weights with which it sees, where those with which it reads are a file of Llama's; None if
            they are in one.
        others, named: as of `TextEncoder`.
    """

    reads = ("caption", "pixels")
    sees_pictures = True

    def __init__(self, *others: Any, vision: Path | None = None, **named: Any):
        super().__init__(*others, **named)
        self.vision = vision

    @cached_property
    def fingerprint(self) -> str:
        whole = fingerprint(super().fingerprint, self.folder / PROCESSOR)
        return fingerprint(whole, self.vision) if self.vision else whole

    @property
    def _is_in_stock_folder(self) -> bool:
        return self.vision is None and super()._is_in_stock_folder

    def _tensors(self, read: Callable[[Path, torch.dtype, str], dict[str, Any]]) -> dict[str, Any]:
        tensors = super()._tensors(read)
        if self.vision is None:
            if not any("vision_tower." in name for name in tensors):
                raise UserError.of(
                    "holds what reads captions alone; give the file of what sees pictures as image_encoder_path "
                    "(ComfyUI's is llava_llama3_vision.safetensors)",
                    str(self._source),
                )
            return tensors
        seen = read(self.vision, self.dtype, "")
        if not any(name.startswith(PROJECTOR) for name in seen):
            raise UserError.of(
                f"has no tensors `{PROJECTOR}*`, with which LLaVA makes words of what it sees; give that of LLaVA",
                str(self.vision),
            )
        return in_one(tensors, seen)

    @cached_property
    def processor(self) -> CLIPImageProcessorPil:
        """The processor that turns a picture into the encoder's input.

        Raises:
            UserError: its settings are missing or damaged.
        """
        return clip_processor(self.folder)

    def check(self) -> None:
        super().check()
        assert self.processor
        for token, known in ((PICTURE, self.config().image_token_index), (END_OF_HEADER, None)):
            number = self.tokenizer.convert_tokens_to_ids(token)
            if number in (None, self.tokenizer.unk_token_id) or number != (known or number):
                raise UserError.of(
                    f"this tokenizer knows another {token} than the encoder in {self.subfolder}, or none; take the "
                    "model's own",
                    str(self.tokenizer_folder),
                )

    @torch.no_grad()
    def encode(self, caption: list[str], pixels: torch.Tensor) -> EncodedText:
        self.truncated += sum(self.token_count(text) > self.token_limit for text in caption)
        seen = self.processor(images=first_pictures(pixels), return_tensors="pt").pixel_values
        texts = [self.features.written(self.tokenizer, one) for one in caption]
        pictures = {"pixel_values": seen.to(self.model.device, self.dtype)}
        return self.features.features(self.model, self.tokenizer, texts, **pictures)

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        name = self.features.name
        tokens, width = self.shapes[name]
        tokens += -(-picture_tokens(self.config()) // self.features.stride)
        return {name: ((tokens, width), self.dtype), f"{name}_mask": ((tokens,), torch.bool)}
