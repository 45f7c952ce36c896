"""Whether a model can draw the samples that a run asks for: told before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from models.assembly.prompts import MASKS, PICTURES, pictures_a_prompt, prompt_versions, sample_bucket, schedule_of
from models.base import BasePipeline
from utils.dataset.encoders import Encoder, reads_media, reads_text, text_of
from utils.dataset.inputs import TEXT
from utils.errors import Problem, UserError
from utils.media.decode import load_clip, load_image, load_mask
from utils.media.geometry import View, same_shape
from utils.media.source import MediaError
from utils.run.attempts import reason_of
from utils.settings.prompt_files import PromptFile
from utils.settings.run_tables import SamplingSettings
from utils.settings.sample_requests import SampleRequest, remarks_of, requests_of
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

NO_PICTURES = "this model is shown no pictures; leave it out"
NO_MASKS = (
    "no masks are given to this model, or not with its options (VACE takes them with [model] mask_means = "
    '"made_anew"); leave it out'
)


def check_sampling(pipeline: BasePipeline, sampling: SamplingSettings, *, has_adapter: bool = True) -> None:
    """Whether the model can draw the requested samples, with these prompts and pictures and at these sizes. Tells what
    of a file of prompts is not used.

    Args:
        has_adapter: whether an adapter is trained, whose strength samples may change.

    Raises:
        UserError: it cannot.
    """
    problems = [*_problems_of_lists(pipeline, sampling)]
    if problems:
        raise UserError(problems)
    requests = requests_of(sampling, pipeline.guided_by_second_prediction)
    if sampling.prompt_file:
        tell_remarks(pipeline, sampling.from_file)
    if not requests and (problems := [*_problems_of_guidance(pipeline, sampling), *_of_model(pipeline, sampling)]):
        raise UserError(problems)
    check_requests(pipeline, requests, has_adapter=has_adapter)


def tell_remarks(pipeline: BasePipeline, file: PromptFile) -> None:
    """Tells what of a file of prompts is not used."""
    for remark in remarks_of(file, pipeline.guided_by_second_prediction):
        logger.warning("%s: %s: %s", remark.file, remark.where, remark.message)


def check_requests(pipeline: BasePipeline, requests: Sequence[SampleRequest], *, has_adapter: bool = True) -> None:
    """The same of samples one by one.

    Raises:
        UserError: lists what is wrong with all of them.
    """
    problems: list[Problem] = []
    for request in requests:
        one = request.settings
        found = [
            *_problems_of_guidance(pipeline, one),
            *_problems_of_pictures(pipeline, one),
            *_problems_of_masks(pipeline, one),
            *_problems_of_scale(pipeline, one, has_adapter=has_adapter),
            *_of_model(pipeline, one),
        ]
        problems += map(request.problem, found or _problems_of_drawing(pipeline, one))
    if not problems and len({len(request.control_images) for request in requests}) > 1:
        problems.append(Problem("", PICTURES, "give as many with each prompt"))
    if problems:
        raise UserError(dict.fromkeys(problems))


def _of_model(pipeline: BasePipeline, sampling: SamplingSettings) -> list[Problem]:
    return list(pipeline.problems_of_samples(sampling))


def _problems_of_scale(pipeline: BasePipeline, sampling: SamplingSettings, *, has_adapter: bool) -> Iterator[Problem]:
    if sampling.adapter_scale == 1.0:
        return
    if not has_adapter:
        yield Problem("", "[sampling] adapter_scale", "there is no [adapter] that is trained; leave it out")
    elif pipeline.options.train:
        message = "changes the adapter alone, and not what [model] train has trained with it; leave it out"
        yield Problem("", "[sampling] adapter_scale", message)


def _problems_of_drawing(pipeline: BasePipeline, sampling: SamplingSettings) -> list[Problem]:
    """What only shows where a sample is begun: its size, its pictures and their shapes, its steps."""
    problems: list[Problem] = []
    for check in (_size, _shown, _shape_of_mask, _decode, _step):
        try:
            check(pipeline, sampling)
        except UserError as error:
            problems += error.problems
            break
    return problems


def _shown(pipeline: BasePipeline, sampling: SamplingSettings) -> None:
    """Whether the model can be shown the pictures."""
    if told := pipeline.misfit_of_prompt(prompt_versions(pipeline, sampling)[0].sample):
        raise UserError.of(told, where=PICTURES)


def _size(pipeline: BasePipeline, sampling: SamplingSettings) -> None:
    sample_bucket(pipeline, sampling)
    prompt_versions(pipeline, sampling)


def _shape_of_mask(pipeline: BasePipeline, sampling: SamplingSettings) -> None:
    sample = prompt_versions(pipeline, sampling)[0].sample
    if sample.mask is None:
        return
    mask, guide = sample.mask.media, sample.controls[0].media
    if not same_shape((mask.width, mask.height), (guide.width, guide.height)):
        raise UserError.of(
            f"{mask.locator} is {mask.width}x{mask.height} and {guide.locator} {guide.width}x{guide.height}, so that "
            "it does not lie on it; scale it to the same shape",
            where=MASKS,
        )


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
    """Reads the pictures and masks completely: a truncated one has a good header, and would only fail when it is
    needed."""
    view = View(sampling.width, sampling.height)
    for file in sampling.mask_images:
        try:
            load_mask(file, view, 0.0, sampling.frames, pipeline.media.fps)
        except MediaError as error:
            raise UserError.of(str(error), where=MASKS) from error
    for file in dict.fromkeys(sampling.control_images[0] if sampling.control_images else ()):
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


def _problems_of_lists(pipeline: BasePipeline, sampling: SamplingSettings) -> Iterator[Problem]:
    """What is wrong with the lists of `control_images` and of `mask_images` beside that of `prompts`."""
    prompts = len(sampling.prompts)
    for where, given, refusal in (
        (PICTURES, sampling.control_images, "" if _most(pipeline) else NO_PICTURES),
        (MASKS, sampling.mask_images, NO_MASKS if pipeline.masks_weigh else ""),
    ):
        if given and refusal:
            yield Problem("", where, refusal)
        elif given and not sampling.asks:
            yield Problem("", where, "is for prompts, and there are none; add some, or leave it out")
        elif given and len(given) not in (1, prompts):
            message = f"has {len(given)} entries for {prompts} prompts; give one for each, or one for all"
            yield Problem("", where, message)


def _most(pipeline: BasePipeline) -> int:
    """How many pictures the model is shown with a prompt."""
    return 1 + pipeline.ends_in_picture if pipeline.starts_from_picture else pipeline.max_controls


def _problems_of_pictures(pipeline: BasePipeline, sampling: SamplingSettings) -> Iterator[Problem]:
    """Of one sample."""
    given, most = sampling.control_images, _most(pipeline)
    if pipeline.starts_from_picture and not given:
        yield Problem("", PICTURES, "this model makes what it makes of a picture: give one for each prompt")
    if pipeline.starts_from_picture and sampling.frames == 1 < pipeline.media.max_frames:
        yield Problem("", "[sampling] frames", "one frame is the picture itself, of which a clip is made; set more")
    if given and not most:
        yield Problem("", PICTURES, NO_PICTURES)
    elif pipeline.ends_in_picture and any(len(pictures) != most for pictures in given):
        yield Problem("", PICTURES, "this model makes clips from a first frame to a last: give both with each prompt")
    elif any(len(pictures) > most for pictures in given):
        yield Problem("", PICTURES, f"this model is shown at most {most} with a prompt; give fewer")


def _problems_of_masks(pipeline: BasePipeline, sampling: SamplingSettings) -> Iterator[Problem]:
    """Of one sample."""
    if sampling.mask_images and pipeline.masks_weigh:
        yield Problem("", MASKS, NO_MASKS)
    elif sampling.mask_images and not sampling.control_images:
        message = "says what of a control image is made anew, and there is none; give one with the prompt"
        yield Problem("", MASKS, message)


def check_encoders(encoders: Sequence[Encoder], controls: int, pipeline: BasePipeline, settings: Settings) -> None:
    """Whether the encoders, which were made for data with `controls` control images per sample, can encode the prompts
    too.

    Raises:
        UserError: they cannot.
    """
    requests = requests_of(settings.sampling, pipeline.guided_by_second_prediction)
    per_prompt = 0 if pipeline.starts_from_picture else pictures_a_prompt(requests)
    of_both = any(reads_text(encoder) and reads_media(encoder) for encoder in encoders)
    if requests and per_prompt != controls and (per_prompt or of_both):
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
    tell_long_prompts(encoders, requests, pipeline)


def tell_long_prompts(encoders: Sequence[Encoder], requests: Sequence[SampleRequest], pipeline: BasePipeline) -> None:
    """Tells which prompts are longer than one of the text encoders reads."""
    for request in requests:
        for version in prompt_versions(pipeline, request.settings):
            for encoder in encoders:
                if not hasattr(encoder, "token_count") or len(version.caption.encode()) < encoder.token_limit // 2:
                    continue
                name = next(name for name in encoder.reads if name in TEXT)
                count = encoder.token_count(text_of(version, encoder, name))
                if count > encoder.token_limit:
                    logger.warning(
                        "%s: the prompt is too long: %s reads %d of the %d tokens of %.60r",
                        ": ".join(filter(None, (request.file, request.where))),
                        encoder.name,
                        encoder.token_limit,
                        count,
                        version.caption,
                    )
