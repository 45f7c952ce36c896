"""What MiniMax-H3 reads from Qwen3-VL: a caption without anything around it, or behind the key frames of its clip.

Shapes: B samples, L tokens, D features, C channels, F frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from models.foundation.checkpoints.headers import fingerprint
from models.foundation.encoders.first_frame import first_pictures, processor_of
from models.foundation.encoders.qwen3_vl import Qwen3VLStates
from models.foundation.encoders.qwen_vl import PICTURE, PROCESSOR
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import EncodedText
from models.foundation.layers.minimax_h3_layout import OF_TEXT, OF_VIDEO
from utils.dataset.encoders import ENDS
from utils.dataset.samples import Bucket
from utils.errors import UserError

if TYPE_CHECKING:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

LAYER = 50
"""The hidden state that the model reads."""
BEFORE, BEHIND = "<|vision_start|>", "<|vision_end|>"
"""The tokens around a picture."""
OF_TEXTS = ("model.embed_tokens.", "model.layers.", "model.norm.")
LABEL = "<Picture {}>: "
LABEL_TOKENS = 8
"""About how many tokens a label has."""


def from_comfyui(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file under the names of transformers: ComfyUI's has the text's part as a model of texts."""
    return {
        f"language_model.{name.removeprefix('model.')}" if name.startswith(OF_TEXTS) else name: tensor
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class BareStates(Qwen3VLStates):
    """`Qwen3VLStates` of captions without anything around them, of which an empty one has no token."""

    layers: tuple[int, ...] = (LAYER,)

    @property
    def layers_kept(self) -> int:
        # One more than is read, since a norm follows the last.
        return max(self.layers) + 1

    def row(self, tokenizer: Any, caption: str) -> list[int]:
        return tokenizer(caption, max_length=self.length, truncation=True, add_special_tokens=False).input_ids

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        is_read = [bool(self.row(tokenizer, caption)) for caption in captions]
        written = [caption for caption, read in zip(captions, is_read, strict=True) if read]
        made = super().__call__(text_encoder, tokenizer, written) if written else {}
        features = {}
        for name, (_, *width) in self.shapes(text_encoder.config.get_text_config()).items():
            rows, dtype = iter(made.get(name, ())), torch.bool if name.endswith("_mask") else text_encoder.dtype
            empty = torch.empty(0, *width, dtype=dtype)
            features[name] = [next(rows) if read else empty for read in is_read]
        return features


class KeyFrameEncoder(TextEncoder):
    """Qwen3-VL as an `Encoder` of a caption and of the first frame of its clip, or also of the last, each with its
    label before the caption. It sees them at the size of the clip, with the settings in the folder's `processor`.
    Beside the features of `BareStates` it yields what kind each token is, `<name>_kinds` (l,): those of a picture are
    of the kind of video.

    Args:
        to_last: it sees the last frame too, which in samples is a second picture.
        others, further: as of `TextEncoder`; the features are `BareStates`.
    """

    sees_pictures = True

    def __init__(self, *others: Any, to_last: bool, **further: Any):
        super().__init__(*others, **further)
        self.frames = (0, -1) if to_last else (0,)
        self.reads = ("caption", ENDS if to_last else "pixels")

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

    @torch.no_grad()
    def encode(self, caption: list[str], **clips: torch.Tensor) -> EncodedText:
        (pixels_BCFHW,) = clips.values()
        self.truncated += sum(self.token_count(text) > self.token_limit for text in caption)
        by_frame = [first_pictures(pixels_BCFHW, frame) for frame in self.frames]
        read = [self._read(text, list(pictures)) for text, *pictures in zip(caption, *by_frame, strict=True)]
        name = self.features.name
        return {
            name: [states_LD for states_LD, _ in read],
            f"{name}_mask": [torch.ones(len(kinds), dtype=torch.bool) for _, kinds in read],
            f"{name}_kinds": [torch.tensor(kinds) for _, kinds in read],
        }

    def _read(self, caption: str, pictures: list[Image.Image]) -> tuple[torch.Tensor, list[int]]:
        """The states of a sample's tokens (L, D), and their kinds."""
        patches = self.processor(images=pictures, return_tensors="pt")
        counts = (patches.image_grid_thw.prod(dim=1) // self.processor.merge_size**2).tolist()
        row, kinds = zip(*self._tokens(caption, counts), strict=True)
        tokens_1L = torch.tensor([row]).to(self.model.device)
        states = self.model(
            input_ids=tokens_1L,
            attention_mask=torch.ones_like(tokens_1L),
            # Without it transformers numbers the tokens of a picture like words.
            mm_token_type_ids=(tokens_1L == self.model.config.image_token_id).int(),
            pixel_values=patches.pixel_values.to(self.model.device, self.dtype),
            image_grid_thw=patches.image_grid_thw.to(self.model.device),
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        return states[LAYER][0], list(kinds)

    def _tokens(self, caption: str, counts: list[int]) -> Iterator[tuple[int, int]]:
        """The tokens with their kinds: each picture of so many tokens behind its label, then the caption."""
        number = self.tokenizer.convert_tokens_to_ids
        for picture, count in enumerate(counts, start=1):
            label = self.tokenizer(LABEL.format(picture), add_special_tokens=False).input_ids
            yield from ((token, OF_TEXT) for token in label)
            seen = (BEFORE, *[PICTURE] * count, BEHIND)
            yield from ((number(token), OF_VIDEO) for token in seen)
        yield from ((token, OF_TEXT) for token in self.features.row(self.tokenizer, caption))

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shapes for the longest caption and, approximately, for the tokens of pictures."""
        name, side = self.features.name, self.processor.patch_size * self.processor.merge_size
        tokens, width = self.shapes[name]
        tokens += len(self.frames) * (LABEL_TOKENS + (bucket.height // side) * (bucket.width // side))
        kinds = {f"{name}_mask": torch.bool, f"{name}_kinds": torch.int64}
        return {name: ((tokens, width), self.dtype)} | {one: ((tokens,), dtype) for one, dtype in kinds.items()}
