"""The prompts with which Tencent's models give captions to a language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from models.foundation.encoders.qwen_vl import Prompt

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
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
SYSTEM, USER = (
    "<|start_header_id|>system<|end_header_id|>\n\n",
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
)
OF_A_VIDEO = f"{SYSTEM}Describe the video by detailing the following aspects: {ASPECTS}{USER}"
OF_A_PICTURE = (
    f"{SYSTEM}<image>\nDescribe the video by detailing the following aspects according to the reference image: "
    f"{ASPECTS}\n\n{USER}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
OF_A_VIDEO_TOKENS, OF_A_PICTURE_TOKENS = 95, 103
"""The number of template tokens before the caption, which the model does not see; a picture counts as one."""


def video_prompt(name: str, length: int) -> StatePrompt:
    """HunyuanVideo's prompt for a caption of up to `length` tokens, with the one that ends it. `name` is the features'
    name."""
    return StatePrompt(name, OF_A_VIDEO, OF_A_VIDEO_TOKENS, OF_A_VIDEO_TOKENS + length)
