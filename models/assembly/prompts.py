"""The prompts of samples: which encoders read them, and how the model draws samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from models.base import BasePipeline
from utils.dataset.batches import SampleReader
from utils.dataset.encoders import Encoder, reads_mask, reads_media, reads_text
from utils.dataset.manifest import media_file
from utils.dataset.samples import Bucket, SampleVersion, version_of_prompt
from utils.errors import Problem, UserError
from utils.media.decode import load_clip, load_image
from utils.media.geometry import View
from utils.media.source import MediaError
from utils.ranks import Ranks
from utils.run.attempts import reason_of
from utils.run.sampling import SampleModel, Schedule
from utils.settings.run_tables import SamplingSettings
from utils.settings.schema import Settings

PICTURES = "[sampling] control_images"


def check_sampling(pipeline: BasePipeline, sampling: SamplingSettings) -> None:
    """Whether the model can draw the requested samples, with these prompts and pictures and at this size.

    Raises:
        UserError: it cannot.
    """
    problems = [
        *_problems_of_guidance(pipeline, sampling),
        *_problems_of_pictures(pipeline, sampling),
        *pipeline.problems_of_samples(sampling),
    ]
    if problems:
        raise UserError(problems)
    if sampling.prompts:
        prompt_versions(pipeline, sampling)
        _decode(pipeline, sampling)
        _step(pipeline, sampling)


def _step(pipeline: BasePipeline, sampling: SamplingSettings) -> None:
    """Whether the scheduler can be built and can do the steps: its configuration is read for nothing else, and would
    only fail when samples are due."""
    try:
        schedule_of(pipeline, sampling).try_out(sampling.steps)
    except UserError:
        raise
    except Exception as error:
        raise UserError.of(
            f"the scheduler cannot do the {sampling.steps} steps of samples ({reason_of(error)}); download it again, "
            "change [sampling] steps, or leave the prompts out",
            str(pipeline.options.diffusers_path / "scheduler"),
        ) from error


def _decode(pipeline: BasePipeline, sampling: SamplingSettings) -> None:
    """Reads the pictures completely: a truncated one has a good header, and would only fail when it is needed."""
    view = View(sampling.width, sampling.height)
    for file in dict.fromkeys(chain(*sampling.control_images)):
        try:
            if pipeline.follows_clip:
                load_clip(file, view, 0.0, sampling.frames, pipeline.media.fps)
            else:
                load_image(file, view)
        except MediaError as error:
            raise UserError.of(str(error), where=PICTURES) from error


def _problems_of_guidance(pipeline: BasePipeline, sampling: SamplingSettings) -> Iterator[Problem]:
    if sampling.prompts and pipeline.unguided and sampling.guidance != pipeline.no_guidance:
        yield Problem("", "[sampling] guidance", pipeline.unguided)
    if not sampling.negative_prompt:
        return
    if pipeline.unguided:
        reason = "samples of this model are drawn without guidance; leave it out"
    elif not pipeline.guided_by_second_prediction:
        reason = "guidance is an input of this model; leave it out"
    elif sampling.guidance == pipeline.no_guidance:
        reason = (
            f"with `guidance = {pipeline.no_guidance:g}` nothing leads away from it; leave it out, or raise guidance"
        )
    else:
        return
    yield Problem("", "[sampling] negative_prompt", f"is not used: {reason}")


def _problems_of_pictures(pipeline: BasePipeline, sampling: SamplingSettings) -> Iterator[Problem]:
    given, prompts = sampling.control_images, len(sampling.prompts)
    most = 1 + pipeline.ends_in_picture if pipeline.starts_from_picture else pipeline.max_controls
    if pipeline.starts_from_picture and prompts and not given:
        yield Problem("", PICTURES, "this model makes what it makes of a picture: give one for each prompt")
    if pipeline.starts_from_picture and prompts and sampling.frames == 1 < pipeline.media.max_frames:
        yield Problem("", "[sampling] frames", "one frame is the picture itself, of which a clip is made; set more")
    if given and not most:
        yield Problem("", PICTURES, "this model is shown no pictures; leave it out")
    elif given and not prompts:
        yield Problem("", PICTURES, "is for prompts, and there are none; add some, or leave it out")
    elif given and len(given) not in (1, prompts):
        yield Problem(
            "", PICTURES, f"has {len(given)} entries for {prompts} prompts; give one for each, or one for all"
        )
    elif pipeline.ends_in_picture and any(len(pictures) != most for pictures in given):
        yield Problem("", PICTURES, "this model makes clips from a first frame to a last: give both with each prompt")
    elif any(len(pictures) > most for pictures in given):
        yield Problem("", PICTURES, f"this model is shown at most {most} with a prompt; give fewer")
    elif len({len(pictures) for pictures in given}) > 1:
        yield Problem("", PICTURES, "give as many with each prompt")


def check_encoders(encoders: Sequence[Encoder], controls: int, pipeline: BasePipeline, settings: Settings) -> None:
    """Whether the encoders, which were made for data with `controls` control images per sample, can encode the prompts
    too.

    Raises:
        UserError: they cannot.
    """
    per_prompt = 0 if pipeline.starts_from_picture else _pictures_a_prompt(settings.sampling)
    of_both = any(reads_text(encoder) and reads_media(encoder) for encoder in encoders)
    if settings.sampling.prompts and per_prompt != controls and (per_prompt or of_both):
        raise UserError.of(
            f"gives {per_prompt} per prompt, and the data has {controls} per sample: give as many here as control_path "
            "does there",
            where=PICTURES,
        )
    if of_both and not settings.cache_text_embeddings:
        raise UserError.of(
            "this model's text encoder reads control images with a caption, which is cached; leave it out",
            where="key `cache_text_embeddings`",
        )


def _pictures_a_prompt(sampling: SamplingSettings) -> int:
    return len(sampling.control_images[0]) if sampling.control_images else 0


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


def encoders_of_prompts(encoders: Sequence[Encoder], sampling: SamplingSettings) -> list[Encoder]:
    """The encoders that read the prompts of a run."""
    return prompt_encoders(encoders, with_pictures=bool(sampling.control_images))


def prompt_versions(pipeline: BasePipeline, sampling: SamplingSettings) -> list[list[SampleVersion]]:
    """What encoders read for each prompt: the prompt and, if there is a second prediction, the negative prompt, both
    with the prompt's pictures.

    Raises:
        UserError: the model cannot draw pictures of this size, or a control image cannot be read.
    """
    bucket = sample_bucket(pipeline, sampling) if sampling.prompts else None
    pictures = [_pictures(files) for files in sampling.control_images] or [()]
    pictures *= len(sampling.prompts) if len(pictures) == 1 else 1
    others = [sampling.negative_prompt] if is_guided(pipeline, sampling) else []
    rate = pipeline.media.fps
    how = {"clip_fps": rate} if pipeline.starts_from_picture else {"control_fps": rate if sampling.frames > 1 else 0.0}
    how["control_fit"] = pipeline.control_fit
    return [
        [version_of_prompt(text, bucket, version, **how) for text in (prompt, *others)]
        for prompt, version in zip(sampling.prompts, pictures, strict=False)
    ]


def _pictures(files: Sequence[Path]) -> tuple:
    try:
        return tuple(media_file(file) for file in files)
    except MediaError as error:
        raise UserError.of(str(error), where=PICTURES) from error


def is_guided(pipeline: BasePipeline, sampling: SamplingSettings) -> bool:
    """Whether samples need a second prediction for the negative prompt."""
    return bool(sampling.prompts) and pipeline.guided_by_second_prediction and sampling.guidance != pipeline.no_guidance


def give_back_memory(device: torch.device) -> None:
    """Lets go of what torch's allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def schedule_of(pipeline: BasePipeline, sampling: SamplingSettings) -> Schedule:
    """The steps to samples of this size."""
    shape = pipeline.latent_shape(sampling.width, sampling.height, sampling.frames)
    shift = pipeline.sampling_shift or pipeline.resolution_shift
    return Schedule(pipeline.scheduler, pipeline.sampling_levels, pipeline.tokens(shape), shift)


def sample_model(
    pipeline: BasePipeline, encoders: Sequence[Encoder], settings: Settings, ranks: Ranks, cache_dir: Path
) -> SampleModel:
    """How to draw this model's samples; the prompts must be in the cache."""
    autoencoder, sampling = encoders[0], settings.sampling
    prompts = prompt_versions(pipeline, sampling)
    contrasts = pipeline.contrasts(_pictures_a_prompt(sampling)) if is_guided(pipeline, sampling) else ()
    reader = SampleReader(encoders_of_prompts(encoders, sampling), cache_dir)
    blind = SampleReader(prompt_encoders(encoders), cache_dir)

    def features(index: int) -> list[Mapping[str, torch.Tensor]]:
        prompt, *negative = prompts[index]
        asked = [(prompt, True), *((*negative, sees) for sees in contrasts)]
        return [(reader if sees else blind).batch([version]).features for version, sees in asked]

    def decode(latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # The VAE comes beside the training's state: it gets the room that the allocator keeps, and gives it back.
        give_back_memory(ranks.device)
        autoencoder.load(ranks.device)
        try:
            return [autoencoder.decode(one)[0].cpu() for one in latents]
        finally:
            autoencoder.unload()
            give_back_memory(ranks.device)

    return SampleModel(
        features=features,
        predictions=1 + len(contrasts),
        prepare=pipeline.prepare_inputs,
        for_scheduler=pipeline.objective.for_scheduler,
        latent_shape=partial(pipeline.latent_shape, sampling.width, sampling.height, sampling.frames),
        guided=pipeline.guided,
        before=pipeline.before_steps,
        after=pipeline.after_steps,
        features_everywhere=pipeline.starts_from_picture,
        fps=pipeline.media.fps,
        schedule=schedule_of(pipeline, sampling),
        decode=decode,
    )
