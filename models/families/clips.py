"""What models of clips share: those that are told how many frames there are per second, and those that are made from a
first frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from utils.dataset.samples import Sample
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.paths import missing
from utils.settings.values import UserPath


class SeesFrames(ModelSettings):
    """The keys of models of which some see frames through an image encoder."""

    image_encoder_path: UserPath | None = None
    """File or folder of the weights of the image encoder, which sees the first frame in some models of picture to
    video; default: from `diffusers_path`, and of HunyuanVideo 1.0 from the file of LLaVA."""


def problems_of_image_encoder(options: SeesFrames, *, sees: bool) -> Iterator[Problem]:
    """Why the option does not fit a model that sees frames, or does not."""
    path, place = options.image_encoder_path, "[model] image_encoder_path"
    if path is not None and not sees:
        yield Problem("", place, "is for models that see the first frame through an image encoder; leave it out")
    elif path is not None:
        yield from missing(place, path)
    elif sees and options.architecture is not None:
        yield Problem(
            "", place, "the weights of the image encoder are needed, by which this model sees the first frame"
        )


def problems_of_halves(options: SeesFrames, name: str, *, sees: bool) -> Iterator[Problem]:
    """Why the option does not fit a model whose text encoder, of this name, sees frames too, or does not."""
    path, place = options.image_encoder_path, "[model] image_encoder_path"
    if path is None:
        return
    if not sees:
        message = (
            "is for models that see the first frame, and this one makes clips of text alone; leave it out, or name the "
            "architecture of a model of picture to video"
        )
        yield Problem("", place, message)
        return
    yield from missing(place, path)
    own = next((one.path for one in options.text_encoders if one.type == name), None)
    if own is None or own.is_dir():
        message = (
            f"is the half with which the text encoder '{name}' sees: give the half with which it reads as a file in "
            "text_encoders, or leave this out, where one folder or file has both"
        )
        yield Problem("", place, message)


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
