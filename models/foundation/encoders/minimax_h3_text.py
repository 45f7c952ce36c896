"""What MiniMax-H3 reads from Qwen3-VL: a caption without anything around it, or behind the key frames of its clip, or
behind references.

Shapes: B samples, L tokens, D features, C channels, F frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from models.foundation.encoders.first_frame import first_pictures
from models.foundation.encoders.qwen3_vl import Qwen3VLStates
from models.foundation.encoders.qwen3_vl_pictures import BEFORE, BEHIND, Qwen3VLPictureEncoder
from models.foundation.encoders.qwen_vl import PICTURE
from models.foundation.encoders.text_features import EncodedText
from models.foundation.layers.minimax_h3_layout import OF_TEXT, OF_VIDEO
from utils.dataset.encoders import ENDS, control_names
from utils.dataset.samples import Bucket

LAYER = 50
"""The hidden state that the model reads."""
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


class LabelledPictureEncoder(Qwen3VLPictureEncoder):
    """Qwen3-VL as an `Encoder` of a caption and of pictures, each with its label before the caption. Beside the
    features of `BareStates` it yields what kind each token is, `<name>_kinds` (l,): those of a picture are of the kind
    of video."""

    def _features(self, captions: list[str], pictures: Iterable[Sequence[Image.Image]]) -> EncodedText:
        """Those of captions and of the pictures of each."""
        self.truncated += sum(self.token_count(text) > self.token_limit for text in captions)
        read = [self._read(text, own) for text, own in zip(captions, pictures, strict=True)]
        name = self.features.name
        return {
            name: [states_LD for states_LD, _ in read],
            f"{name}_mask": [torch.ones(len(kinds), dtype=torch.bool) for _, kinds in read],
            f"{name}_kinds": [torch.tensor(kinds) for _, kinds in read],
        }

    def _read(self, caption: str, pictures: Sequence[Image.Image]) -> tuple[torch.Tensor, list[int]]:
        """The states of a sample's tokens (L, D), and their kinds."""
        patches, counts = self.patches(pictures)
        row, kinds = zip(*self._tokens(caption, counts), strict=True)
        return self.states(row, patches), list(kinds)

    def _tokens(self, caption: str, counts: list[int]) -> Iterator[tuple[int, int]]:
        """The tokens with their kinds: each picture of so many tokens behind its label, then the caption."""
        number = self.tokenizer.convert_tokens_to_ids
        for picture, count in enumerate(counts, start=1):
            label = self.tokenizer(LABEL.format(picture), add_special_tokens=False).input_ids
            yield from ((token, OF_TEXT) for token in label)
            seen = (BEFORE, *[PICTURE] * count, BEHIND)
            yield from ((number(token), OF_VIDEO) for token in seen)
        yield from ((token, OF_TEXT) for token in self.features.row(self.tokenizer, caption))

    def _shapes(self, tokens_of_pictures: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shapes for the longest caption and, approximately, for pictures of so many tokens."""
        name = self.features.name
        tokens, width = self.shapes[name]
        tokens += sum(LABEL_TOKENS + count for count in tokens_of_pictures)
        kinds = {f"{name}_mask": torch.bool, f"{name}_kinds": torch.int64}
        return {name: ((tokens, width), self.dtype)} | {one: ((tokens,), dtype) for one, dtype in kinds.items()}


class KeyFrameEncoder(LabelledPictureEncoder):
    """Of the first frame of its clip, or also of the last. It sees them at the size of the clip, with the settings in
    the folder's `processor`.

    Args:
        to_last: it sees the last frame too, which in samples is a second picture.
        others, further: as of `TextEncoder`; the features are `BareStates`.
    """

    def __init__(self, *others: Any, to_last: bool, **further: Any):
        super().__init__(*others, **further)
        self.frames = (0, -1) if to_last else (0,)
        self.reads = ("caption", ENDS if to_last else "pixels")

    @torch.no_grad()
    def encode(self, caption: list[str], **clips: torch.Tensor) -> EncodedText:
        (pixels_BCFHW,) = clips.values()
        by_frame = [first_pictures(pixels_BCFHW, frame) for frame in self.frames]
        return self._features(caption, zip(*by_frame, strict=True))

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self._shapes([(bucket.height // self.side) * (bucket.width // self.side)] * len(self.frames))


class ReferenceEncoder(LabelledPictureEncoder):
    """Of the control images, which are references. It sees them at the sizes that the dataset gives them, with the
    settings in the folder's `processor`.

    Args:
        controls: their number.
        others, further: as of `TextEncoder`; the features are `BareStates`.
    """

    def __init__(self, *others: Any, controls: int, **further: Any):
        super().__init__(*others, **further)
        self.controls = control_names(controls)
        self.reads = ("caption", *self.controls)

    @torch.no_grad()
    def encode(self, caption: list[str], **controls_BCFHW: torch.Tensor) -> EncodedText:
        by_control = [first_pictures(controls_BCFHW[name]) for name in self.controls]
        return self._features(caption, zip(*by_control, strict=True))

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self._shapes([(bucket.height // self.side) * (bucket.width // self.side)] * len(self.controls))
