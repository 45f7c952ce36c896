"""What models of clips share that are made from a first frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from utils.dataset.samples import Sample
from utils.errors import Problem


def problems_of_stills(samples: Sequence[Sample]) -> list[Problem]:
    """Why a model that makes clips of a first frame is not trained on still pictures among these samples."""
    stills = [sample for sample in samples if sample.bucket.frames == 1]
    if not stills:
        return []
    message = (
        f"{len(stills)} of the samples are still pictures, the first is {stills[0].media.locator}: to a model that "
        "makes clips of a first frame they teach nothing; leave them out, or set frame_buckets without 1"
    )
    return [Problem("", "[[directory]]", message)]


def without_first_frame(frames: int) -> torch.Tensor:
    """The weight (f, 1, 1) of each latent frame in the loss where the first one, of several, is given: 1 on average."""
    weight_fhw = torch.full((frames, 1, 1), frames / (frames - 1))
    weight_fhw[0] = 0.0
    return weight_fhw
