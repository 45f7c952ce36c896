"""Brings a run's data into the cache with the model's encoders, and reads it from there."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from models.assembly.prompts import encoders_of_prompts, live_encoders, prompt_versions
from models.assembly.room import check_caching
from models.assembly.sample_checks import check_encoders
from models.base import BasePipeline
from utils.dataset.batches import SampleReader
from utils.dataset.buckets import rules_of
from utils.dataset.cache_lock import reading
from utils.dataset.collecting import collect_together
from utils.dataset.collection import (
    Collection,
    Source,
    check_encoder_names,
    tell,
    too_many_failures,
    with_truncated,
    without_failures,
)
from utils.dataset.encoders import Encoder
from utils.dataset.encoding import CacheJob, fill, lacks, reclaim_unwanted
from utils.dataset.epochs import Epochs, micro_batch_of
from utils.dataset.manifest import Scan
from utils.dataset.masks import MaskEncoder
from utils.dataset.references import Keep
from utils.dataset.samples import Sample
from utils.errors import Problem, UserError
from utils.ranks import Ranks
from utils.run.reporting import timed
from utils.settings.dataset_schema import DatasetSettings
from utils.settings.sample_requests import requests_of
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The cached datasets and their encoders; the features of `live` encoders are not cached. As long as this object or
    the process lives, no other run deletes anything from the cache."""

    training: Collection
    evaluation: Sequence[Collection]
    encoders: Sequence[Encoder]
    live: Sequence[Encoder]
    cache_dir: Path
    in_use: BinaryIO | None


def load_data(
    settings: Settings,
    pipeline: BasePipeline,
    sources: Sequence[Source],
    scan: Scan,
    job: CacheJob,
    check_room: Callable[[Sequence[Collection], Sequence[Encoder]], None] | None = None,
) -> Data:
    """Scans the datasets, and encodes the samples and the prompts for sampling that the cache lacks.

    Args:
        check_room: whether there is room for what comes after; called on all ranks before anything is encoded.

    Raises:
        UserError: whole directories cannot be used, more files are broken than the settings allow, or an encoder is
            larger than the card on which it is to encode something.
    """
    ranks = job.ranks
    collections = collect_together(ranks, sources, pipeline.media, scan, **choices_of(settings, pipeline))
    encoders = encoders_of(pipeline, collections)
    check_encoders(encoders, controls_of(collections), pipeline, settings)
    check_data(pipeline, collections)
    check_epochs(settings, ranks, collections[0].samples)
    requests = requests_of(settings.sampling, pipeline.guided_by_second_prediction)
    of_prompts = encoders_of_prompts(encoders, requests)
    live = live_encoders(settings, encoders)
    samples = [sample for collection in collections for sample in collection.samples]
    prompts = [version.sample for one in requests for version in prompt_versions(pipeline, one.settings)]
    if settings.model.folded_guidance is not None:
        samples += [replace(sample, captions=("",)) for sample in collections[0].samples]
    wanted = {
        encoder.name: ([] if encoder in live else samples, prompts if encoder in of_prompts else [])
        for encoder in encoders
    }
    filled = [encoder for encoder in encoders if any(wanted[encoder.name])]
    identity = (
        f"{collections[0].identity} {settings.model.folded_guidance is not None}" if collections[0].identity else ""
    )
    by_encoder = {encoder.name: (encoder, sum(wanted[encoder.name], [])) for encoder in filled}
    check = partial(check_caching, settings, ranks, by_encoder, partial(lacks, job=job))
    checks = [partial(check_room, collections, encoders), check] if check_room else [check]
    job, in_use = replace(job, before_encoding=_once(checks)), None
    with timed("cache"), job.alone():
        reports = []
        for encoder in filled:
            own, further = wanted[encoder.name]
            reports.append(fill(encoder, own, job, further=further, identity=identity if own else ""))
        if ranks.is_main:
            reclaim_unwanted([report.encoder for report in reports], job)
            in_use = reading(job.cache_dir)
    collections = without_failures(collections, reports)
    if ranks.is_main:
        tell(with_truncated(collections, encoders, job.raise_if_stopping), job.cache_dir)
    problems = too_many_failures(collections, settings.max_failed_fraction)
    if problems:
        raise UserError([*problems, Problem("", "", "what is encoded stays encoded")])
    return Data(collections[0], collections[1:], encoders, live, job.cache_dir, in_use)


def _once(checks: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """The checks, made when it is called first."""

    @cache
    def check_all() -> None:
        for check in checks:
            check()

    return check_all


def check_epochs(settings: Settings, ranks: Ranks, samples: Sequence[Sample]) -> None:
    """Whether every epoch of the run has samples, so that hours of encoding or training do not end in an empty one. It
    examines epochs until no directory begins or ends any more and all fractions of repeats have had their turn.

    Raises:
        UserError: an epoch has no samples.
    """
    epochs = Epochs(
        samples,
        partial(micro_batch_of, settings),
        ranks.data_ranks,
        settings.gradient_accumulation_steps,
        settings.seed,
    )
    rules = rules_of(samples)
    steady_epoch = max(max(one.start_epoch, one.end_epoch or 1) for one in rules)
    steady_step = max(max(one.start_step, one.end_step or 0) for one in rules)
    in_turn = math.ceil(1 / min(1.0, *(sample.repeats for sample in samples)))
    last = settings.epochs or (math.inf if settings.max_steps else 1)
    limit = settings.max_steps or math.inf
    epoch, steady = 0, 0
    while epoch < last and epochs.first_step(epoch) < limit and steady <= in_turn:
        epochs.steps_in(epoch)
        steady += epoch >= steady_epoch and epochs.first_step(epoch) >= steady_step
        epoch += 1


def reader_of(data: Data, ranks: Ranks) -> SampleReader:
    """Reads the features that this stage needs: the first stage reads all, the last one only those for its target.
    Loads the text encoders whose features are not cached."""
    if not ranks.is_first_stage:
        masks = [encoder for encoder in data.encoders if isinstance(encoder, MaskEncoder)]
        return SampleReader([data.encoders[0], *masks], data.cache_dir)
    for encoder in data.live:
        encoder.load(ranks.device)
    return SampleReader(data.encoders, data.cache_dir, data.live)


def choices_of(settings: Settings, pipeline: BasePipeline) -> dict[str, Any]:
    """What the run's settings and its model say for collecting data."""
    return {
        "max_failed_fraction": settings.max_failed_fraction,
        "caption_versions": settings.cache_text_embeddings,
        "masks_weigh": pipeline.masks_weigh,
    }


def controls_of(collections: Sequence[Collection]) -> int:
    """The number of control images per sample."""
    return max(collection.controls for collection in collections)


def check_data(pipeline: BasePipeline, collections: Sequence[Collection]) -> None:
    """Whether the model can be trained on the collections; tells of sizes that its shift was not made for.

    Raises:
        UserError: it cannot.
    """
    problems = [problem for collection in collections for problem in pipeline.problems_of_data(collection.samples)]
    problems += [*_too_large(pipeline, collections), *_without_masks(pipeline, collections)]
    if problems:
        raise UserError(problems)
    for remark in _beyond_the_rule(pipeline, collections):
        logger.warning(remark)


def _too_large(pipeline: BasePipeline, collections: Sequence[Collection]) -> Iterator[Problem]:
    """The sizes for which the model has no positions, one problem for each dataset file."""
    for collection in collections:
        sizes = {(sample.bucket.width, sample.bucket.height): sample for sample in collection.samples}
        told = {size: said for size in sizes if (said := pipeline.too_large(*size))}
        if told:
            largest = max(told, key=lambda size: size[0] * size[1])
            message = f"{told[largest]}; set it lower (the first such file is {sizes[largest].media.locator})"
            yield Problem(str(collection.source.file), "key `resolutions`", message)


def _without_masks(pipeline: BasePipeline, collections: Sequence[Collection]) -> Iterator[Problem]:
    """The problem of a training set without masks, for a model that is told to keep what they say."""
    if not (pipeline.masks_weigh or collections[0].has_masks):
        message = (
            "the model is to keep what masks leave black, and no file has a mask: set mask_path, alpha_mask or "
            "default_mask_file, or have masks mean weights"
        )
        yield Problem(str(collections[0].source.file), "masks", message)


def _beyond_the_rule(pipeline: BasePipeline, collections: Sequence[Collection]) -> Iterator[str]:
    """A line on the sizes that are smaller, and on those that are larger, than those that `flux_shift` was made for."""
    rule = pipeline.resolution_shift
    if not pipeline.options.flux_shift or rule.fitted_to is None:
        return
    buckets = {sample.bucket for collection in collections for sample in collection.samples}
    sizes = {pipeline.tokens(pipeline.latent_shape(one.width, one.height, one.frames)): one for one in buckets}
    least, most = rule.fitted_to
    for tokens, is_beyond in ((min(sizes), min(sizes) < least), (max(sizes), max(sizes) > most)):
        if is_beyond:
            bucket = sizes[tokens]
            yield (
                f"[model] flux_shift: {bucket.width} x {bucket.height} has {tokens} image tokens, and the rule was "
                f"made for {least} to {most}; the shift there is {rule.factor(tokens):.2f} (within, it is from "
                f"{rule.factor(least):.2f} to {rule.factor(most):.2f}). `shift` is the same for all sizes"
            )


def encoders_of(pipeline: BasePipeline, collections: Sequence[Collection]) -> list[Encoder]:
    """The encoders for the collections: those of the model, and one for masks if there are any that weigh the loss.

    Raises:
        UserError: the collections contain something that the model does not take.
    """
    encoders = pipeline.encoders_for(controls_of(collections))
    check_encoder_names(collections, encoders)
    encoder = MaskEncoder(pipeline.latent_shape, pipeline.frame_groups)
    masks = [encoder] if pipeline.masks_weigh and any(one.has_masks for one in collections) else []
    return [*encoders, *masks]


def sources_of(settings: Settings, datasets: Mapping[str, DatasetSettings]) -> list[Source]:
    """The run's datasets with the files that describe them; the training set comes first, under the name "train"."""
    training = Source("train", settings.dataset, datasets["train"])
    return [
        training,
        *(
            replace(training, name=entry.name, fraction=entry.fraction)
            if entry.config is None
            else Source(entry.name, entry.config, datasets[entry.name])
            for entry in settings.eval_datasets
        ),
    ]


def cache_folder(settings: Settings, sources: Sequence[Source]) -> Path:
    """Where all of the run's datasets are cached: the training set's `cache_dir`, or beside the runs."""
    return sources[0].settings.cache_dir or settings.output_dir / "cache"


def scan_of(
    settings: Settings, sources: Sequence[Source], raise_if_stopping: Callable[[], None], *, trust: bool = False
) -> Scan:
    """How the files of the datasets are examined.

    Args:
        trust: take files that were seen before as unchanged, without looking at them.
    """
    return Scan(
        cache_folder(settings, sources) / "files.sqlite",
        trust=trust,
        verify=settings.verify == "content",
        raise_if_stopping=raise_if_stopping,
    )


def cached_data(
    settings: Settings,
    ranks: Ranks,
    pipeline: BasePipeline,
    sources: Sequence[Source],
    scan: Scan,
    *,
    owner: Path,
    regenerate: bool = False,
    check_room: Callable[[Sequence[Collection], Sequence[Encoder]], None] | None = None,
) -> Data:
    """The datasets, once all of them are in the cache.

    Args:
        owner: the run's file, on whose behalf the cache keeps items.
        regenerate: encode everything again.
        check_room: see `load_data`.

    Raises:
        UserError: see `load_data`.
    """
    job = CacheJob(
        cache_folder(settings, sources),
        owner,
        ranks,
        settings.caching_batch_size,
        regenerate=regenerate,
        verify=scan.verify,
        raise_if_stopping=scan.raise_if_stopping,
        keep=Keep(sources[0].settings.cache_keep_days, int(sources[0].settings.cache_keep_gb * 1e9)),
    )
    return load_data(settings, pipeline, sources, scan, job, check_room)
