"""Qwen3-VL as a text encoder for captions together with pictures.

Shapes: L tokens, F features, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from PIL import Image

from models.foundation.checkpoints.headers import fingerprint
from models.foundation.encoders.first_frame import processor_of
from models.foundation.encoders.qwen3_vl import Qwen3VLStates
from models.foundation.encoders.qwen_vl import PICTURE, PROCESSOR
from models.foundation.encoders.text import TextEncoder
from utils.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchFeature
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

BEFORE, BEHIND = "<|vision_start|>", "<|vision_end|>"
"""The tokens around a picture."""


class Qwen3VLPictureEncoder(TextEncoder):
    """Qwen3-VL as an `Encoder` of a caption and of pictures, which it sees with the settings in the folder's
    `processor`. Subclasses say which, and how they stand beside the caption.

    Args:
        others, further: as of `TextEncoder`; the features are `Qwen3VLStates`.
    """

    sees_pictures = True
    features: Qwen3VLStates

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(super().fingerprint, self.folder / PROCESSOR)

    @cached_property
    def processor(self) -> Qwen2VLImageProcessorPil:
        """The processor that turns pictures into patches.

        Raises:
            UserError: its settings are missing or damaged.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return processor_of(self.folder / PROCESSOR, Qwen2VLImageProcessorPil)

    def check(self) -> None:
        super().check()
        assert self.processor
        config = self.config()
        known = {
            PICTURE: config.image_token_id,
            BEFORE: config.vision_start_token_id,
            BEHIND: config.vision_end_token_id,
        }
        for token, number in known.items():
            if self.tokenizer.convert_tokens_to_ids(token) != number:
                raise UserError.of(
                    f"this tokenizer knows another {token} than the encoder in {self.subfolder}, or none; take the "
                    "model's own",
                    str(self.tokenizer_folder),
                )

    @property
    def side(self) -> int:
        """How many pixels of a side a token of a picture covers."""
        return self.processor.patch_size * self.processor.merge_size

    def patches(self, pictures: Sequence[Image.Image]) -> tuple[BatchFeature, list[int]]:
        """What the encoder is shown of pictures, and how many tokens each has."""
        patches = self.processor(images=list(pictures), return_tensors="pt")
        return patches, (patches.image_grid_thw.prod(dim=1) // self.processor.merge_size**2).tolist()

    def states(self, row: Sequence[int], patches: BatchFeature) -> torch.Tensor:
        """The features (L, F) of a row of tokens with those of pictures."""
        tokens_1L = torch.tensor([row]).to(self.model.device)
        states = self.features.states(
            self.model,
            tokens_1L,
            attention_mask=torch.ones_like(tokens_1L),
            # Without it transformers numbers the tokens of a picture like words.
            mm_token_type_ids=(tokens_1L == self.model.config.image_token_id).int(),
            pixel_values=patches.pixel_values.to(self.model.device, self.dtype),
            image_grid_thw=patches.image_grid_thw.to(self.model.device),
        )
        return self.features.joined(states)[0]
