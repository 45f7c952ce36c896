"""A model's VAE and text encoders as the cache sees them: what they make, of which versions of samples, and its key.

Shapes: B batch, C channels, F frames, H height, W width. Pixels are float32 in [-1, 1].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from json.encoder import encode_basestring_ascii
from typing import Any, Protocol

import torch

from utils.dataset.inputs import TEXT, bucket_read, file_read, identity_of, read_input
from utils.dataset.samples import Bucket, Sample, SampleVersion, may_lack_caption

BYTES_PER_PIXEL = 3 * 4
"""Bytes of a decoded colour pixel in float32."""


class Encoder(Protocol):
    """A model's VAE or text encoder, as the cache sees it."""

    name: str
    """The name of its store's folder."""
    reads: tuple[str, ...]
    """The inputs of `encode`: some of "pixels", "ends", "guide", "regions", "rgba", "layers", "size_and_crop", "mask",
    "control" ("control_2" ... for further ones), "controlrgba" and "controlclip" (likewise), "caption" and
    "weighted_caption"."""
    fingerprint: str
    """A text that changes whenever its output would change."""

    def load(self, device: torch.device) -> None:
        """Brings the weights to the device."""

    def unload(self) -> None:
        """Frees them."""

    def encode(self, **inputs: Any) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """Features of a batch under names that no other encoder of the model uses, each a tensor batched in dimension
        0 or a list of B tensors of different lengths. Pixels, controls and masks come as BCFHW on the CPU. So do
        "ends", clips whose last frame is a prompt's second picture, if it has one, "guide", the first control as a clip
        as long as the sample's, which lies on it in place and time, "regions", the same with a fourth channel, 1 where
        the sample's mask says that it is made anew and 0 where it is kept, "rgba", pictures with their opacity
        in [-1, 1] as a fourth channel, "controlrgba", control images with theirs, "controlclip", controls that may be
        clips, and "layers", where the control images, at the size of the picture, follow it as further frames.
        "size_and_crop" comes as (B, 6) pixels: height and width of the file, top and left of the crop in the scaled
        picture, height and width of the pixels. Captions come as a list of B strings, weighted captions as a list of B
        lists of (text, weight)."""

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape (without the batch) and type of each feature of a sample; loads nothing."""


def item_key(encoder: Encoder, version: SampleVersion) -> str:
    """The key of the encoder's output for the sample: a hash of everything that the output depends on.

    Raises:
        ValueError: the encoder reads a control image and the sample has none.
    """
    parts = [_as_json(encoder.name), _as_json(encoder.fingerprint)]
    parts += [_as_json(identity_of(version, encoder.name, input_name)) for input_name in encoder.reads]
    return hashlib.blake2b(f"[{', '.join(parts)}]".encode(), digest_size=20).hexdigest()


def _as_json(identity: Any) -> str:
    # Most are texts, for which the encoder takes several times as long as for their letters.
    return encode_basestring_ascii(identity) if isinstance(identity, str) else json.dumps(identity)


def applies_to(encoder: Encoder, sample: Sample) -> bool:
    """Whether the encoder has something to encode in the sample; only masks may be missing."""
    return not reads_mask(encoder) or sample.mask is not None


def reads_media(encoder: Encoder) -> bool:
    """Whether the encoder reads anything but text."""
    return not set(encoder.reads) <= TEXT


def reads_mask(encoder: Encoder) -> bool:
    """Whether the encoder reads masks."""
    return "mask" in encoder.reads


def reads_text(encoder: Encoder) -> bool:
    """Whether the encoder reads captions, alone or with other inputs."""
    return bool(TEXT & set(encoder.reads))


def versions(encoder: Encoder, sample: Sample) -> Iterator[SampleVersion]:
    """All versions of the sample that differ for the encoder."""
    if not applies_to(encoder, sample):
        return
    takes = sample.takes if reads_media(encoder) else sample.takes[:1]
    captions = sample.captions if reads_text(encoder) else sample.captions[:1]
    for take in takes:
        for caption in captions:
            yield SampleVersion(sample, take, caption, sample.id)
        if reads_text(encoder) and may_lack_caption(sample):
            yield SampleVersion(sample, take, "", sample.id)


def wanted_by(encoder: Encoder, samples: Iterable[Sample]) -> dict[str, SampleVersion]:
    """The versions that the encoder makes items from, by the items' keys."""
    return {item_key(encoder, version): version for sample in samples for version in versions(encoder, sample)}


def items_wanted(encoder: Encoder, samples: Iterable[Sample]) -> list[tuple[str, Bucket]]:
    """The keys of the items that the encoder makes from the samples, and the sizes at which they are made."""
    input_name = next((input_name for input_name in encoder.reads if input_name not in TEXT), "pixels")
    return list(
        {
            item_key(encoder, version): bucket_read(input_name, sample)
            for sample in samples
            for version in versions(encoder, sample)
        }.items()
    )


def decoded_bytes(encoder: Encoder, version: SampleVersion) -> int:
    """The memory that decoding an item takes: its pixels as numbers, and one picture at the size of its file."""
    input_names = [input_name for input_name in encoder.reads if input_name not in TEXT]
    files = [file_read(input_name, version.sample) for input_name in input_names]
    pixels = sum(bucket.pixels for bucket in shape_of(encoder, version))
    return BYTES_PER_PIXEL * (pixels + max((file.width * file.height for file in files), default=0))


def shape_of(encoder: Encoder, version: SampleVersion) -> tuple[Bucket, ...]:
    """What samples must have in common to be encoded in one batch; captions always can be."""
    return tuple(
        bucket_read(input_name, version.sample)
        for input_name in encoder.reads
        if input_name not in TEXT
        for _ in range(1 + len(version.sample.controls) if input_name == "layers" else 1)
    )


def inputs_of(encoder: Encoder, version: SampleVersion) -> dict[str, Any]:
    """The encoder's inputs for a version of a sample, by name.

    Raises:
        Unreadable: a file cannot be decoded.
    """
    return {input_name: read_input(version, encoder.name, input_name) for input_name in encoder.reads}


def text_of(version: SampleVersion, encoder: Encoder, input_name: str) -> Any:
    """A text encoder's input for a version of a sample."""
    return read_input(version, encoder.name, input_name)
