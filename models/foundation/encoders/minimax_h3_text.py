"""What MiniMax-H3 reads from Qwen3-VL: a caption without anything around it, or behind the key frames of its clip, or
behind references.

Shapes: B samples, L tokens, D features, C channels, F frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from models.foundation.encoders.first_frame import first_pictures
from models.foundation.encoders.qwen3_vl import Qwen3VLStates
from models.foundation.encoders.qwen3_vl_pictures import BEFORE, BEHIND, CLIP, Qwen3VLPictureEncoder
from models.foundation.encoders.qwen_vl import PICTURE
from models.foundation.encoders.text_features import EncodedText
from models.foundation.layers.minimax_h3_layout import OF_TEXT, OF_VIDEO
from utils.dataset.inputs import ENDS, as_clip, control_names
from utils.dataset.samples import Bucket, Control

LAYER = 50
"""The hidden state that the model reads."""
OF_TEXTS = ("model.embed_tokens.", "model.layers.", "model.norm.")
LABEL, CLIP_LABEL, MOMENT = "<Picture {}>: ", "<Video {}>: ", "<{:.1f} seconds>"
FPS, SEEN_FPS, PAIR = 24.0, 2.0, 2
"""Frames a second of clips, and of those that the encoder sees, of which it joins two."""
MOST_PICTURES, MOST_CLIPS = 9, 3
"""References of a sample."""
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
    """Qwen3-VL as an `Encoder` of a caption and of pictures and clips, each with its label before the caption. Beside
    the features of `BareStates` it yields what kind each token is, `<name>_kinds` (l,): those of a picture or clip are
    of the kind of video."""

    def _features(self, captions: list[str], given: Iterable[Sequence[Sequence[Image.Image]]]) -> EncodedText:
        """Those of captions, and of what each is given: the frames of clips, or pictures, which are one frame."""
        self.truncated += sum(self.token_count(text) > self.token_limit for text in captions)
        read = [self._read(text, own) for text, own in zip(captions, given, strict=True)]
        name = self.features.name
        return {
            name: [states_LD for states_LD, _ in read],
            f"{name}_mask": [torch.ones(len(kinds), dtype=torch.bool) for _, kinds in read],
            f"{name}_kinds": [torch.tensor(kinds) for _, kinds in read],
        }

    def _read(self, caption: str, given: Sequence[Sequence[Image.Image]]) -> tuple[torch.Tensor, list[int]]:
        """The states of a sample's tokens (L, D), and their kinds."""
        pictures = [frames[0] for frames in given if len(frames) == 1]
        seen = [seen_frames(len(frames)) for frames in given if len(frames) > 1]
        clips = [
            [frames[number] for number in numbers]
            for frames, (numbers, _) in zip((one for one in given if len(one) > 1), seen, strict=True)
        ]
        shown, counts = self.patches(pictures) if pictures else ({}, [])
        of_clips, clip_counts = self.clip_patches(clips) if clips else ({}, [])
        of_pictures = enumerate(counts, start=1)
        of_all_clips = enumerate(zip(clip_counts, (times for _, times in seen), strict=True), start=1)
        tokens: list[tuple[int, int]] = []
        for frames in given:
            if len(frames) == 1:
                picture, count = next(of_pictures)
                tokens += [*self._text(LABEL.format(picture)), *self._vision(PICTURE, count)]
                continue
            clip, (count, times) = next(of_all_clips)
            tokens += self._text(CLIP_LABEL.format(clip))
            for time in times:
                tokens += [*self._text(MOMENT.format(time)), *self._vision(CLIP, count)]
        tokens += [(token, OF_TEXT) for token in self.features.row(self.tokenizer, caption)]
        row, kinds = zip(*tokens, strict=True)
        return self.states(row, {**shown, **of_clips}), list(kinds)

    def _text(self, text: str) -> list[tuple[int, int]]:
        """The tokens of a text, with their kinds."""
        return [(token, OF_TEXT) for token in self.tokenizer(text, add_special_tokens=False).input_ids]

    def _vision(self, token: str, count: int) -> list[tuple[int, int]]:
        """The tokens of a picture, or of a pair of frames, with their kinds."""
        number = self.tokenizer.convert_tokens_to_ids
        return [(number(one), OF_VIDEO) for one in (BEFORE, *[token] * count, BEHIND)]

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
        return self._features(caption, ([[one] for one in frames] for frames in zip(*by_frame, strict=True)))

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self._shapes([(bucket.height // self.side) * (bucket.width // self.side)] * len(self.frames))


class ReferenceEncoder(LabelledPictureEncoder):
    """Of the control images and clips, which are references. It sees them at the sizes that the dataset gives them,
    with the settings in the folder's `processor`, and of clips two frames a second.

    Args:
        controls: their number.
        others, further: as of `TextEncoder`; the features are `BareStates`.
    """

    def __init__(self, *others: Any, controls: int, **further: Any):
        super().__init__(*others, **further)
        self.reads = ("caption", *map(as_clip, control_names(controls)))

    @torch.no_grad()
    def encode(self, caption: list[str], **controls_BCFHW: torch.Tensor) -> EncodedText:
        by_control = [
            zip(*(first_pictures(one, frame) for frame in range(one.shape[2])), strict=True)
            for one in (controls_BCFHW[name] for name in self.reads[1:])
        ]
        return self._features(caption, zip(*by_control, strict=True))

    def misfit(self, references: Sequence[Control], size: str) -> str | None:
        """What to tell of the references of a sample that are too many, or of which the stock pipeline shows the
        encoder a clip at another size; None of others.

        Args:
            size: what decides their sizes.

        Raises:
            UserError: the folder does not say how clips are prepared.
        """
        clips = [reference for reference in references if reference.bucket.frames > 1]
        if len(clips) > MOST_CLIPS or len(references) - len(clips) > MOST_PICTURES:
            return f"the model takes {MOST_PICTURES} pictures and {MOST_CLIPS} clips as references; give fewer"
        for clip in clips:
            width, height, frames = clip.bucket.width, clip.bucket.height, clip.bucket.frames
            seen = self.clip_size(width, height, len(seen_frames(frames)[0]))
            if seen != (width, height):
                return (
                    f"the reference {clip.media.locator} of {frames} frames has {width} x {height} pixels, and "
                    f"Qwen3-VL would see it at {seen[0]} x {seen[1]}; set another {size}"
                )
        return None

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shapes for pictures."""
        return self._shapes([(bucket.height // self.side) * (bucket.width // self.side)] * (len(self.reads) - 1))


def seen_frames(count: int) -> tuple[list[int], list[float]]:
    """Which of a clip's frames the encoder sees, and the time of each pair of them in seconds."""
    from diffusers.modular_pipelines.minimax_h3.encoders import MiniMaxH3Ref2VATextEncoderStep

    return MiniMaxH3Ref2VATextEncoderStep._sample_video_condition_frames(np.arange(count), FPS, SEEN_FPS, PAIR)
