"""How MiniMax-H3's tokens lie in one sequence: of each sample the text, what is given of pictures (key frames, or
references) and the video.

Shapes: B batch, C latent channels, f h w latent frames, height and width, U text tokens and V video tokens of all
samples, of which W are not given, P = U + V tokens of the sequence, L text tokens of a sample, N numbers of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange

PATCH = 2
OF_VIDEO, OF_TEXT, OF_SOUND = range(3)
"""What kind of token it is, as the model is told: it has a modulation for each."""
KINDS = 3
SOUND_CHANNELS = 2
ANCHORS = ("first", "last")


class Layout(NamedTuple):
    """Of the samples of a batch. `video_V` and `text_U` are the places of these tokens in the sequence, `noisy_W` of
    those of video that are not given. `sample_P` is the number of the sample of each token, `kind_P` what kind it is,
    and `is_given_P` whether it is of a picture that is given. `parts` and `texts` are tensors without elements, whose
    lengths are the numbers of tokens of each sample, and of its text."""

    positions_P3: torch.Tensor
    video_V: torch.Tensor
    noisy_W: torch.Tensor
    text_U: torch.Tensor
    sample_P: torch.Tensor
    kind_P: torch.Tensor
    is_given_P: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    texts: tuple[torch.Tensor, ...]


def layout(
    kinds: Sequence[torch.Tensor], size: Sequence[int], keys: int = 0, references: Sequence[Sequence[int]] = ()
) -> Layout:
    """The layout of samples without sound, each in that of the stock pipeline.

    Args:
        kinds: of each sample the kinds of its text's tokens (L,).
        size: latent frames, height and width of a clip.
        keys: number of key frames of each, of which a first one is in the clip's first frame and a second one in its
            last.
        references: latent frames, height and width of each reference; with these there are no key frames.
    """
    how = *size, 0, (1, PATCH, PATCH), SOUND_CHANNELS, OF_SOUND, OF_VIDEO
    made = [_of_sample(kind_L, how, keys, references) for kind_L in kinds]
    positions, of_parts, videos, _, texts, counts, _ = zip(*made, strict=True)
    lengths = [len(kind_S) for kind_S in of_parts]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(dim=0)
    videos, texts = ([start + place for start, place in zip(starts, one, strict=True)] for one in (videos, texts))
    split = [video.split([count, len(video) - count]) for video, count in zip(videos, counts, strict=True)]
    is_given_P = torch.zeros(sum(lengths), dtype=torch.int64)
    is_given_P[torch.cat([key for key, _ in split])] = 1
    return Layout(
        positions_P3=torch.cat(positions).float(),
        video_V=torch.cat(videos),
        noisy_W=torch.cat([noisy for _, noisy in split]),
        text_U=torch.cat(texts),
        sample_P=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        kind_P=torch.cat(of_parts),
        is_given_P=is_given_P,
        parts=tuple(torch.empty(length, 0) for length in lengths),
        texts=tuple(torch.empty(len(text_U), 0) for text_U in texts),
    )


def _of_sample(
    kind_L: torch.Tensor, how: Sequence[Any], keys: int, references: Sequence[Sequence[int]]
) -> tuple[Any, ...]:
    """What the stock pipeline makes of a sample."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import (
        MiniMaxH3PrepareLayoutStep,
        MiniMaxH3Ref2VAPrepareLayoutStep,
    )
    from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3ImageReference, MiniMaxH3VideoReference

    if not references:
        return MiniMaxH3PrepareLayoutStep.build_packed_sequence(kind_L, *how, ANCHORS[:keys])
    # It looks at nothing but the shapes of latents, and at what kind each is.
    picture, clip = MiniMaxH3ImageReference(image=None), MiniMaxH3VideoReference(frames=None)
    given = [clip if frames > 1 else picture for frames, *_ in references]
    latents = [torch.empty(1, 1, *size, device="meta") for size in references]
    return MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(kind_L, given, latents, [], *how)


def tokens_of(latents_BCfhw: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tokens of a sample's latents, one after the other, and so of all samples (1, V, N)."""
    rows = "b c f (h p) (w q) -> b (f h w) (c p q)"
    tokens_BVN = torch.cat([rearrange(one, rows, p=PATCH, q=PATCH) for one in latents_BCfhw], dim=1)
    return tokens_BVN.flatten(0, 1).unsqueeze(0)
