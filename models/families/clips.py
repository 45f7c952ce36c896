"""What models of clips share: those that are told how many frames there are per second, and those that are made from a
first frame."""

from __future__ import annotations

from collections.abc import Sequence

from utils.dataset.samples import Sample
from utils.errors import Problem


def problems_of_rates(samples: Sequence[Sample], told: float) -> list[Problem]:
    """Why a model that is told that clips have `told` frames per second cannot be trained on these samples: clips of
    another rate."""
    other = next((sample for sample in samples if sample.bucket.frames > 1 and sample.fps != told), None)
    if other is None:
        return []
    message = (
        f"is {other.fps:g} for {other.media.locator}, and the model is told that clips have {told:g} frames per "
        "second; leave it out, or set [model] frame_rate to the same"
    )
    return [Problem("", "[[directory]] framerate", message)]


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
