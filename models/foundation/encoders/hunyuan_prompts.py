"""The prompts with which Tencent's models give captions to a language model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.foundation.encoders.qwen_image_prompts import CHAT, DESCRIBE, DESCRIBE_TOKENS
from models.foundation.encoders.qwen_vl import Prompt
from models.foundation.encoders.text_features import EncodedText, MaskedHiddenStates

STATE = -3
"""Index of the hidden state that is read: two layers before the last."""


@dataclass(frozen=True)
class StatePrompt(Prompt):
    """A `Prompt` of which another hidden state than the last is read.

    Attributes:
        state_read: its index; the first ones are the embeddings.
    """

    state_read: int = STATE

    def state(self, text_encoder: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
        return text_encoder(**inputs, output_hidden_states=True).hidden_states[self.state_read]


ASPECTS = (
    "1. The main content and theme of the video.",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
    "4. background environment, light, style and atmosphere.",
    "5. camera angles, movements, and transitions used in the video",
)
TOGETHER = f"{''.join(ASPECTS)}:<|eot_id|>"
SYSTEM, USER = (
    "<|start_header_id|>system<|end_header_id|>\n\n",
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
)
OF_A_VIDEO = f"{SYSTEM}Describe the video by detailing the following aspects: {TOGETHER}{USER}"
OF_A_PICTURE = (
    f"{SYSTEM}<image>\nDescribe the video by detailing the following aspects according to the reference image: "
    f"{TOGETHER}\n\n{USER}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
OF_A_VIDEO_TOKENS, OF_A_PICTURE_TOKENS = 95, 103
"""The number of template tokens before the caption, which the model does not see; a picture counts as one."""


def video_prompt(name: str, length: int) -> StatePrompt:
    """HunyuanVideo's prompt for a caption of up to `length` tokens, with the one that ends it. `name` is the features'
    name."""
    return StatePrompt(name, OF_A_VIDEO, OF_A_VIDEO_TOKENS, OF_A_VIDEO_TOKENS + length)


OF_AN_IMAGE = f"<|im_start|>system\n{DESCRIBE}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>"
IN_LINES = "".join(f"{' ' * 9}{aspect}" for aspect in ASPECTS)
"""With the spaces of lines that were broken in the publisher's source."""
ASSISTED = CHAT.format(
    f"You are a helpful assistant. Describe the video by detailing the following aspects:{IN_LINES}.", "{}"
)
ASSISTED_TOKENS = 108


@dataclass(frozen=True)
class AssistedPrompt(StatePrompt):
    """A `StatePrompt` that has a space in the place of an empty caption."""

    def written(self, tokenizer: Any, caption: str) -> str:
        return super().written(tokenizer, caption or " ")


def assisted_prompt(name: str, length: int) -> AssistedPrompt:
    """HunyuanVideo 1.5's prompt for a caption of up to `length` tokens, with those behind it. `name` is the features'
    name."""
    return AssistedPrompt(name, ASSISTED, ASSISTED_TOKENS, ASSISTED_TOKENS + length)


QUOTES = ("''", '""', "‘’", "“”")
"""What may stand around text that is drawn, in the order in which it is read."""


def image_prompt(name: str, length: int) -> StatePrompt:
    """HunyuanImage's prompt for a caption of up to `length` tokens, with the one that ends it. `name` is the features'
    name."""
    return StatePrompt(name, OF_AN_IMAGE, DESCRIBE_TOKENS, DESCRIBE_TOKENS + length)


@dataclass(frozen=True)
class GlyphFeatures(MaskedHiddenStates):
    """What ByT5 makes of the texts in quotation marks in a caption (l, D), with l up to `length`, and a mask (l,) of
    ones; of a caption without such texts a single row of zeros, which the mask leaves out."""

    name: str
    length: int

    def quoted(self, caption: str) -> list[str]:
        """The texts in quotation marks, one kind of these after the other."""
        return [text for begin, end in QUOTES for text in re.findall(f"{begin}(.*?){end}", caption)]

    def written(self, tokenizer: Any, caption: str) -> str:
        """The quoted texts, as ByT5 reads them; empty if there are none."""
        return "".join(f'Text "{text}". ' for text in self.quoted(caption))

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> EncodedText:
        texts = [self.written(tokenizer, caption) for caption in captions]
        width, device = text_encoder.config.d_model, text_encoder.device
        none = torch.zeros(1, width, dtype=text_encoder.dtype, device=device)
        features, masks = [none] * len(texts), [torch.zeros(1, dtype=torch.bool)] * len(texts)
        quoting = [number for number, text in enumerate(texts) if text]
        if quoting:
            asked = [texts[number] for number in quoting]
            tokens = tokenizer(asked, padding="longest", max_length=self.length, truncation=True, return_tensors="pt")
            tokens = tokens.to(device)
            hidden_BLD = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
            for number, hidden, length in zip(quoting, hidden_BLD, tokens.attention_mask.sum(1).tolist(), strict=True):
                features[number], masks[number] = hidden[:length], torch.ones(length, dtype=torch.bool)
        return {self.name: features, f"{self.name}_mask": masks}


@dataclass(frozen=True)
class VideoGlyphFeatures(GlyphFeatures):
    """`GlyphFeatures` of the texts in double quotation marks, in their order, each once."""

    def quoted(self, caption: str) -> list[str]:
        found = re.findall('"(.*?)"|“(.*?)”', caption)
        return list(dict.fromkeys(straight or curled for straight, curled in found))
