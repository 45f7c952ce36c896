"""What Kandinsky 5's text encoders read: captions without line breaks, which Qwen2.5-VL reads in a template, and CLIP
as they are."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.foundation.encoders.qwen_vl import Prompt
from models.foundation.encoders.text_features import ClipPooled

SYSTEM, USER = "<|im_start|>system\nYou are a prompt engineer. {}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>"
ASPECTS = (
    "Describe the video in detail.",
    "Describe how the camera moves or shakes, describe the zoom and view angle, whether it follows the objects.",
    "Describe the location of the video, main characters or objects and their action.",
    "Describe the dynamism of the video and presented actions.",
    "Name the visual style of the video: whether it is a professional footage, user generated content, some kind of "
    "animation, video game or scren content.",
    "Describe the visual effects, postprocessing and transitions if they are presented in the video.",
    "Pay attention to the order of key actions shown in the scene.",
)
"""As the publisher spells them."""
OF_A_VIDEO = SYSTEM.format("\n".join(ASPECTS)) + USER
OF_A_PICTURE = (
    SYSTEM.format(
        "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
        "objects and background:"
    )
    + USER
)
OF_A_VIDEO_TOKENS, OF_A_PICTURE_TOKENS = 128, 40
"""The number of template tokens, counted from the beginning, that the model does not see."""


def cleaned(caption: str) -> str:
    """A caption without HTML's entities, and with one space where there is other space, as in the stock pipelines.
    These mend broken letters too where `ftfy` is installed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(caption))).strip()


@dataclass(frozen=True)
class CleanedPrompt(Prompt):
    """A `Prompt` with a cleaned caption."""

    def written(self, tokenizer: Any, caption: str) -> str:
        return super().written(tokenizer, cleaned(caption))


@dataclass(frozen=True, repr=False)
class CleanedClipPooled(ClipPooled):
    """`ClipPooled` of cleaned captions."""

    def __repr__(self) -> str:
        return "cleaned clip_pooled"

    def written(self, tokenizer: Any, caption: str) -> str:
        return cleaned(caption)

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        return super().__call__(text_encoder, tokenizer, [cleaned(caption) for caption in captions])


def kandinsky_prompt(name: str, length: int, *, of_pictures: bool) -> CleanedPrompt:
    """The prompt for a caption of up to `length` tokens, with the one that ends it. `name` is the features' name."""
    template, skipped = (OF_A_PICTURE, OF_A_PICTURE_TOKENS) if of_pictures else (OF_A_VIDEO, OF_A_VIDEO_TOKENS)
    return CleanedPrompt(name, template, skipped, skipped + length)
