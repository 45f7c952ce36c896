"""A run's data, brought into the cache by the model's encoders, and read from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.base import BasePipeline
from models.foundation.outputs import prompt_encoders, prompts_shown
from models.foundation.plan import choices_of, encoders_of
from utils.dataset.batches import SampleReader
from utils.dataset.collection import (
    Collection,
    Source,
    collect_together,
    tell,
    too_many_failures,
    without_failures,
)
from utils.dataset.encoders import Encoder
from utils.dataset.encoding import Filling, fill, reclaim_unwanted
from utils.dataset.manifest import Scan
from utils.dataset.masks import MaskEncoder
from utils.ranks import Ranks
from utils.run.reporting import timed
from utils.settings.errors import Problem, SettingsError
from utils.settings.schema import Settings


@dataclass(frozen=True)
class Data:
    """The cached datasets, and the encoders that made them; `live` are those whose features are not cached."""

    training: Collection
    evaluation: Sequence[Collection]
    encoders: Sequence[Encoder]
    live: Sequence[Encoder]
    cache_dir: Path


def load_data(
    settings: Settings, pipeline: BasePipeline, sources: Sequence[Source], scan: Scan, filling: Filling
) -> Data:
    """Scans the datasets and encodes what the cache lacks of them and of the prompts to be sampled.

    Raises:
        SettingsError: whole directories cannot be used, or more files are broken than the settings allow.
    """
    ranks, cached_texts = filling.ranks, settings.cache_text_embeddings
    collections = collect_together(ranks, sources, pipeline.media, scan, **choices_of(settings))
    encoders = encoders_of(pipeline, collections)
    of_prompts = prompt_encoders(encoders)
    live = [] if cached_texts else of_prompts
    samples = [sample for collection in collections for sample in collection.samples]
    prompts = [shown.sample for shown in prompts_shown(pipeline, settings.sampling).values()]
    wanted = {
        encoder.name: [*([] if encoder in live else samples), *(prompts if encoder in of_prompts else [])]
        for encoder in encoders
    }
    with timed("cache"), filling.alone():
        reports = [fill(encoder, wanted[encoder.name], filling) for encoder in encoders if wanted[encoder.name]]
        if ranks.is_main:
            for encoder in encoders:
                reclaim_unwanted(encoder, wanted[encoder.name], filling)
    collections = without_failures(collections, reports)
    if ranks.is_main:
        tell(collections, filling.cache_dir)
    problems = too_many_failures(collections, settings.max_failed_fraction)
    if problems:
        raise SettingsError([*problems, Problem("", "", "what is encoded stays encoded")])
    return Data(collections[0], collections[1:], encoders, live, filling.cache_dir)


def reader_of(data: Data, ranks: Ranks) -> SampleReader:
    """What this stage reads of the cache: the first one all features, the last one what its target is made of. The text
    encoders that are not cached come to life here."""
    if not ranks.is_first_stage:
        masks = [encoder for encoder in data.encoders if isinstance(encoder, MaskEncoder)]
        return SampleReader([data.encoders[0], *masks], data.cache_dir)
    for encoder in data.live:
        encoder.load(ranks.device)
    return SampleReader(data.encoders, data.cache_dir, data.live)
