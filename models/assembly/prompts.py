"""The prompts of samples: which encoders read them, and what they read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from models.base import BasePipeline
from utils.dataset.buckets import control_frames
from utils.dataset.encoders import Encoder, reads_mask, reads_media
from utils.dataset.manifest import media_file
from utils.dataset.samples import Bucket, MediaFile, SampleVersion, version_of_prompt
from utils.errors import UserError
from utils.media.source import MediaError
from utils.run.sampling import Schedule
from utils.settings.run_tables import SamplingSettings
from utils.settings.sample_requests import SampleRequest
from utils.settings.schema import Settings

PICTURES, MASKS = "[sampling] control_images", "[sampling] mask_images"


def pictures_a_prompt(requests: Sequence[SampleRequest]) -> int:
    """How many pictures the model is shown with each prompt."""
    return len(requests[0].control_images) if requests else 0


def sample_bucket(pipeline: BasePipeline, sampling: SamplingSettings) -> Bucket:
    """The size of the samples.

    Raises:
        UserError: the model makes no pictures of this size.
    """
    size, spatial = (sampling.width, sampling.height), pipeline.media.spatial
    frames = pipeline.media.frames(sampling.frames)
    if frames != sampling.frames:
        raise UserError.of(
            f"this model makes clips of {pipeline.media.describe_frames()}; set {frames} instead of {sampling.frames}",
            where="[sampling] frames",
        )
    if too_large := pipeline.too_large(*size):
        raise UserError.of(f"{too_large}; set them lower", where="[sampling] width, height")
    if any(side % spatial for side in size):
        width, height = (max(spatial, round(side / spatial) * spatial) for side in size)
        raise UserError.of(
            f"the sides of this model's pictures are multiples of {spatial}; set {width} x {height} instead of "
            f"{size[0]} x {size[1]}",
            where="[sampling] width, height",
        )
    return Bucket(*size, sampling.frames)


def prompt_encoders(encoders: Sequence[Encoder], *, with_pictures: bool = False) -> list[Encoder]:
    """The encoders that read a prompt: those of text, and with pictures also those of pictures, except for the first,
    whose latents are drawn."""
    others = encoders[1:] if with_pictures else encoders
    return [encoder for encoder in others if not (reads_mask(encoder) if with_pictures else reads_media(encoder))]


def live_encoders(settings: Settings, encoders: Sequence[Encoder]) -> list[Encoder]:
    """The text encoders whose features are not cached."""
    return [] if settings.cache_text_embeddings else prompt_encoders(encoders)


def encoders_of_prompts(encoders: Sequence[Encoder], requests: Sequence[SampleRequest]) -> list[Encoder]:
    """The encoders that read the prompts of a run."""
    return prompt_encoders(encoders, with_pictures=bool(pictures_a_prompt(requests)))


def prompt_versions(pipeline: BasePipeline, sampling: SamplingSettings) -> list[SampleVersion]:
    """What encoders read for the one prompt of `sampling`: the prompt and, if there is a second prediction, the
    negative prompt, both with the prompt's pictures and mask.

    Raises:
        UserError: the model cannot draw pictures of this size, or a control image or mask cannot be read.
    """
    bucket = sample_bucket(pipeline, sampling)
    pictures = _media(sampling.control_images[0], PICTURES) if sampling.control_images else ()
    others = [sampling.negative_prompt] if is_guided(pipeline, sampling) else []
    rate = pipeline.media.fps
    how = {"clip_fps": rate} if pipeline.starts_from_picture else {"control_fps": rate if sampling.frames > 1 else 0.0}
    how["control_fit"] = pipeline.control_fit
    how["control_frames"] = partial(control_frames, frames=sampling.frames, fps=rate, facts=pipeline.media)
    if sampling.mask_images:
        (how["mask"],) = _media(sampling.mask_images, MASKS)
    return [version_of_prompt(text, bucket, pictures, **how) for text in (sampling.prompts[0], *others)]


def _media(files: Sequence[Path], where: str) -> tuple[MediaFile, ...]:
    try:
        return tuple(media_file(file) for file in files)
    except MediaError as error:
        raise UserError.of(str(error), where=where) from error


def is_guided(pipeline: BasePipeline, sampling: SamplingSettings) -> bool:
    """Whether a sample needs a second prediction for the negative prompt."""
    return pipeline.guided_by_second_prediction and sampling.guidance != pipeline.no_guidance


def schedule_of(pipeline: BasePipeline, sampling: SamplingSettings) -> Schedule:
    """The steps to samples of this size."""
    shape = pipeline.latent_shape(sampling.width, sampling.height, sampling.frames)
    shift = pipeline.sampling_shift or pipeline.resolution_shift
    return Schedule(pipeline.scheduler, pipeline.sampling_levels, pipeline.tokens(shape), shift)
