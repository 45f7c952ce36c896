"""The prompts with which Qwen-Image and its Edit models give captions and pictures to Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import dataclass

from models.foundation.encoders.qwen_vl import PICTURE, Prompt
from utils.dataset.inputs import control_names

CONTROLS = control_names(3)

CHAT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
ALTER = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
DESCRIBE_TOKENS, ALTER_TOKENS = 34, 64
"""The number of template tokens before the user's text, which the model does not see."""


@dataclass(frozen=True)
class Variant:
    """What distinguishes an Edit model from others; the weights have the same shapes.

    Attributes:
        controls: the largest number of control images.
        picture: the text for one control image in the prompt; `{}` is its number.
        area: the area in pixels at which the text encoder sees a control image.
    """

    controls: int = 0
    picture: str = ""
    area: int = 0

    def prompt(self, name: str, controls: int) -> Prompt:
        """The prompt for a caption with this many control images; all tokens are read. `name` is the features' name."""
        pictures = "".join(self.picture.format(number + 1) for number in range(controls))
        return Prompt(name, CHAT.format(ALTER, pictures + "{}"), ALTER_TOKENS, None)


SHOWN = f"<|vision_start|>{PICTURE}<|vision_end|>"
VARIANTS = {
    "image": Variant(),
    "edit": Variant(1, SHOWN, 1024 * 1024),
    "edit_plus": Variant(len(CONTROLS), f"Picture {{}}: {SHOWN}", 384 * 384),
}


def caption_prompt(name: str, length: int) -> Prompt:
    """The prompt for a caption without pictures, with up to `length` tokens. `name` is the features' name."""
    return Prompt(name, CHAT.format(DESCRIBE, "{}"), DESCRIBE_TOKENS, DESCRIBE_TOKENS + length)
