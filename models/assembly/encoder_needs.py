"""The memory that text encoders take, and those that look at pictures, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from models.assembly.kept import weight_bytes
from models.assembly.live_bytes import most_at_once
from models.assembly.real_integers import RealIntegers
from models.foundation.encoders.clip import ClipTokens
from models.foundation.encoders.first_frame import ClipVision
from models.foundation.encoders.text import TextEncoder
from utils.dataset.encoders import Encoder
from utils.dataset.inputs import TEXT
from utils.dataset.samples import Bucket

GIB = 2**30
LONGEST = 512
"""Tokens of a text, where the tokenizer knows no limit."""
WORD = "a "
FEW = 2
"""Samples from which larger batches follow."""
RGB = 3


@dataclass(frozen=True)
class Need:
    """The bytes that an encoder takes.

    Attributes:
        activations: at its peak; None if they could not be counted.
        tiled: the same in tiles, as happens where there is no room for that; None if it makes none.
    """

    name: str
    weights: int
    activations: int | None
    tiled: int | None = None

    @property
    def total(self) -> int:
        """What is known of it."""
        return self.weights + (self.activations or 0)

    @property
    def least(self) -> int:
        """What it takes where there is little room."""
        return min(self.total, self.total if self.tiled is None else self.weights + self.tiled)

    def __str__(self) -> str:
        told = f"{self.name} {self.total / GIB:.2f}"
        if self.least < self.total:
            return f"{told} at once, {self.least / GIB:.2f} in tiles, if there is no room for that"
        return told if self.activations is not None else f"{told} (weights alone: its activations cannot be counted)"


def reading_needs(encoders: Iterable[Encoder], bucket: Bucket, batch: int) -> Iterator[Need]:
    """What each encoder of texts, of pictures for them, or of both takes for this many samples of a size. Those that
    make no more than numbers of tokens take nothing."""
    for encoder in encoders:
        if isinstance(encoder, ClipVision) or (isinstance(encoder, TextEncoder) and encoder.sees_pictures):
            yield _of_seeing(encoder, bucket, batch)
        elif isinstance(encoder, TextEncoder) and not isinstance(encoder, ClipTokens):
            yield _of_text(encoder, batch)


def _of_text(encoder: TextEncoder, batch: int) -> Need:
    model = encoder.empty()
    ids = torch.zeros((batch, min(encoder.token_limit, LONGEST)), dtype=torch.int64, device="meta")
    activations = counted(partial(model, input_ids=ids, output_hidden_states=True))
    return Need(encoder.name, weight_bytes([model]), activations)


def _of_seeing(encoder: ClipVision | TextEncoder, bucket: Bucket, batch: int) -> Need:
    """Of an encoder that is shown pictures, whose sizes it looks at. Each further sample adds as much as the second."""
    empty = copy(encoder)
    empty.model = encoder.empty()

    def encode(count: int) -> Any:
        with RealIntegers():
            return empty.encode(**{name: _shown(encoder, name, bucket, count) for name in encoder.reads})

    activations = [counted(partial(encode, count)) for count in range(1, min(batch, FEW) + 1)]
    if None in activations:
        return Need(encoder.name, weight_bytes([empty.model]), None)
    further = (activations[-1] - activations[0]) * (batch - len(activations))
    return Need(encoder.name, weight_bytes([empty.model]), activations[-1] + further)


def _shown(encoder: ClipVision | TextEncoder, input_name: str, bucket: Bucket, batch: int) -> Any:
    """One of its inputs: long captions, grey clips, which take no memory here, and control images of the same size."""
    if input_name in TEXT:
        tokens = getattr(encoder, "caption_tokens", None) or min(encoder.token_limit, LONGEST)
        return [WORD * tokens] * batch
    frames = 1 if input_name.startswith("control") else bucket.frames
    return torch.zeros(()).expand(batch, RGB, frames, bucket.height, bucket.width)


def counted(compute: Callable[[], Any]) -> int | None:
    """The bytes that a computation on the meta device takes; None if it cannot be done there."""
    try:
        return most_at_once(compute)
    # What looks at values cannot run without any; libraries raise many kinds of errors then.
    except Exception:
        return None
