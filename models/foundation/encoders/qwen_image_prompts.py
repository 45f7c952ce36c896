"""What Qwen-Image and its Edit models ask Qwen2.5-VL about a caption and its pictures."""

from __future__ import annotations

from dataclasses import dataclass

from models.foundation.encoders.qwen_vl import PICTURE, Prompt

CONTROLS = ("control", "control_2", "control_3")

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
"""How many tokens of the templates precede the user's words: the model does not see them."""


@dataclass(frozen=True)
class Variant:
    """What tells an Edit model from others; the weights have the same shapes.

    Attributes:
        controls: how many control images it takes.
        picture: what stands for one in its prompt; `{}` is its number.
        area: at which the text encoder sees one, in pixels.
    """

    controls: int = 0
    picture: str = ""
    area: int = 0

    def prompt(self, name: str, controls: int) -> Prompt:
        """What is read of a caption together with this many control images, all its tokens; `name` is the features'."""
        pictures = "".join(self.picture.format(number + 1) for number in range(controls))
        return Prompt(name, CHAT.format(ALTER, pictures + "{}"), ALTER_TOKENS, None)


SHOWN = f"<|vision_start|>{PICTURE}<|vision_end|>"
VARIANTS = {
    "image": Variant(),
    "edit": Variant(1, SHOWN, 1024 * 1024),
    "edit_plus": Variant(len(CONTROLS), f"Picture {{}}: {SHOWN}", 384 * 384),
}


def caption_prompt(name: str, length: int) -> Prompt:
    """What is read of a caption alone, of up to `length` tokens; `name` is the features'."""
    return Prompt(name, CHAT.format(DESCRIBE, "{}"), DESCRIBE_TOKENS, DESCRIBE_TOKENS + length)
