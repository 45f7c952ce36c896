"""Qwen2.5-VL as a text encoder for captions in a model's template, and for captions together with pictures.

Shapes: B samples, L tokens, D features, C channels, F frames, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from models.foundation.checkpoints.configs import PROCESSOR_FILE, check_processor, explained
from models.foundation.checkpoints.headers import fingerprint
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import EncodedText, Shapes, TextFeatures
from utils.dataset.inputs import control_names
from utils.dataset.samples import Bucket
from utils.errors import UserError
from utils.media.writing import tensor_to_image

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PICTURE = "<|image_pad|>"
"""The token that represents a picture in a template."""
PROCESSOR = "processor"
"""The part of a diffusers folder that says how pictures are prepared."""
SIDE = 32
"""The sides of pictures for the encoder are multiples of this."""


@dataclass(frozen=True)
class Prompt(TextFeatures):
    """The text that Qwen2.5-VL reads for a caption, and which of its last hidden states are features: for each caption
    (l, D), and a mask (l,) of ones.

    Attributes:
        name: of the features.
        template: the text, with `{}` for the caption.
        skipped: number of tokens at the beginning of the template that are not features.
        length: number of tokens that are read, including those of the template; None for all.
    """

    name: str
    template: str
    skipped: int
    length: int | None

    def shapes(self, config: PretrainedConfig) -> Shapes:
        # Without a limit there is no longest text.
        tokens = 0 if self.length is None else self.length - self.skipped
        return {self.name: (tokens, config.hidden_size), f"{self.name}_mask": (tokens,)}

    def written(self, tokenizer: Any, caption: str) -> str:
        return self.template.format(caption)

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> EncodedText:
        return self.features(text_encoder, tokenizer, [self.written(tokenizer, caption) for caption in captions])

    def features(
        self, text_encoder: nn.Module, tokenizer: Any, texts: list[str], **pictures: torch.Tensor
    ) -> EncodedText:
        """Features of whole texts, and of pictures, if there are any, as transformers' image processor gives them."""
        # Padding on the right changes nothing, since no token looks ahead.
        cut = {"max_length": self.length, "truncation": True} if self.length else {}
        tokens = tokenizer(texts, padding="longest", padding_side="right", return_tensors="pt", **cut).to(
            text_encoder.device
        )
        if pictures:
            # Without it transformers numbers the tokens of a picture like words; the model has learned rows and
            # columns.
            pictures["mm_token_type_ids"] = (tokens.input_ids == text_encoder.config.image_token_id).int()
        asked = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        hidden_BLD = self.state(text_encoder, **asked, **pictures)
        lengths = tokens.attention_mask.sum(1).tolist()
        features = [hidden[self.skipped : length] for hidden, length in zip(hidden_BLD, lengths, strict=True)]
        masks = [torch.ones(len(hidden), dtype=torch.bool) for hidden in features]
        return {self.name: features, f"{self.name}_mask": masks}

    def state(self, text_encoder: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
        """The hidden state that is read (B, L, D)."""
        return text_encoder(**inputs).last_hidden_state


def image_processor(folder: Path) -> Qwen2VLImageProcessorPil:
    """The processor that turns pictures into patches, with the settings in a diffusers folder.

    Raises:
        UserError: they are missing or damaged.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if not (folder / PROCESSOR / PROCESSOR_FILE).is_file():
        raise UserError.of(
            "the settings of the image processor are missing; they lie in the folder of an Edit model: copy its "
            f"`{PROCESSOR}` here",
            str(folder / PROCESSOR),
        )
    check_processor(folder / PROCESSOR)
    with explained(folder / PROCESSOR / PROCESSOR_FILE, "image processor"):
        return Qwen2VLImageProcessorPil.from_pretrained(folder / PROCESSOR, local_files_only=True)


class PictureTextEncoder(TextEncoder):
    """Qwen2.5-VL as an `Encoder` of a caption together with its control images. Each picture is scaled to `area` in its
    own shape, then turned into patches with the settings in the folder's `processor`.

    Args:
        controls: number of control images.
        area: of a picture, in pixels.
        caption_tokens: about how many tokens the longest captions have.
        others, further: as of `TextEncoder`; the template has one `PICTURE` for each control image, and all tokens are
            read.
    """

    sees_pictures = True

    def __init__(self, *others: Any, controls: int, area: int, caption_tokens: int, **further: Any):
        super().__init__(*others, **further)
        self.area, self.caption_tokens = area, caption_tokens
        self.controls = control_names(controls)
        self.reads = ("caption", *self.controls)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(super().fingerprint, str(self.area), self.folder / PROCESSOR)

    @cached_property
    def processor(self) -> Qwen2VLImageProcessorPil:
        return image_processor(self.folder)

    def check_pictures(self) -> None:
        """Whether the folder says how pictures are prepared, and which token represents one.

        Raises:
            UserError: it does not.
        """
        image_processor(self.folder)
        if self.tokenizer.convert_tokens_to_ids(PICTURE) != self.config().image_token_id:
            raise UserError.of(
                f"this tokenizer knows another {PICTURE} than the encoder in {self.subfolder}, or none; take the Edit "
                "model's own",
                str(self.tokenizer_folder),
            )

    @torch.no_grad()
    def encode(self, caption: list[str], **controls_BCFHW: torch.Tensor) -> EncodedText:
        pictures = [
            self._seen(pixels_CFHW)
            for pictures_of_one in zip(*(controls_BCFHW[name] for name in self.controls), strict=True)
            for pixels_CFHW in pictures_of_one
        ]
        patches = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
        counts = iter((patches.image_grid_thw.prod(dim=1) // self.processor.merge_size**2).tolist())
        texts = [_with_room(self.features.written(self.tokenizer, one), counts) for one in caption]
        return self.features.features(self.model, self.tokenizer, texts, **patches)

    def _seen(self, pixels_CFHW: torch.Tensor) -> Image.Image:
        """A picture at the size at which the encoder sees it."""
        picture = tensor_to_image(pixels_CFHW)
        return picture.resize(size_of_area(self.area, *picture.size), Image.Resampling.LANCZOS)

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shapes for the text and, approximately, for the tokens of the pictures."""
        _, width = self.shapes[self.features.name]
        side = self.processor.patch_size * self.processor.merge_size
        length = self.caption_tokens + len(self.controls) * (self.area // side**2)
        return {
            self.features.name: ((length, width), self.dtype),
            f"{self.features.name}_mask": ((length,), torch.bool),
        }


def _with_room(text: str, counts: Iterator[int]) -> str:
    """A text with as many tokens for each picture as the picture needs."""
    first, *others = text.split(PICTURE)
    return first + "".join(PICTURE * next(counts) + part for part in others)


def size_of_area(area: int, width: int, height: int) -> tuple[int, int]:
    """Width and height of about this area, in the shape of `width` x `height` (`calculate_dimensions` of diffusers'
    Qwen-Image-Edit)."""
    ratio = width / height
    exact = math.sqrt(area * ratio)
    return round(exact / SIDE) * SIDE, round(exact / ratio / SIDE) * SIDE
