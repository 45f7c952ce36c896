"""A run's data: the training set and the evaluation sets, scanned, put into buckets, cached."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.dataset.buckets import MediaFacts, Sample, assign
from utils.dataset.encoding import CacheReport
from utils.dataset.manifest import scan
from utils.ranks import Ranks, share
from utils.settings.errors import Problem, SettingsError
from utils.settings.schema import DatasetSettings

logger = logging.getLogger(__name__)

FAILURES_LISTED = 10


@dataclass(frozen=True)
class Source:
    """A dataset file and what it says. The training set's name is "train"."""

    name: str
    file: Path
    settings: DatasetSettings


@dataclass(frozen=True)
class Collection:
    """The samples of one dataset file."""

    source: Source
    samples: list[Sample]

    @property
    def has_controls(self) -> bool:
        return any(sample.control for sample in self.samples)


def collect(
    sources: Sequence[Source],
    facts: MediaFacts,
    index_path: Path,
    *,
    trust: bool = False,
    progress: bool = False,
    heed: Callable[[], None] = lambda: None,
) -> list[Collection]:
    """The samples of every source.

    Args:
        index_path: where the identities of files are remembered.
        trust: take remembered files as unchanged without looking at them.
        heed: called now and then; what it raises ends the search.

    Raises:
        SettingsError: with everything that is wrong with the data.
    """
    problems: list[Problem] = []
    collections = []
    for source in sources:
        manifest = scan(source.settings, index_path, str(source.file), trust=trust, progress=progress, heed=heed)
        problems += manifest.problems
        for warning in manifest.warnings:
            logger.warning("%s", warning)
        if not manifest.problems:
            try:
                collections.append(Collection(source, assign(manifest, source.settings, facts)))
            except ValueError as error:
                problems.append(Problem(str(source.file), "buckets", str(error)))
    problems += _mixed_controls(collections)
    if problems:
        raise SettingsError(problems)
    return collections


def collect_together(
    ranks: Ranks,
    sources: Sequence[Source],
    facts: MediaFacts,
    index_path: Path,
    *,
    trust: bool = False,
    heed: Callable[[], None] = lambda: None,
) -> list[Collection]:
    """`collect` on all ranks: the main rank reads the files, the others what it remembered of them.

    Raises:
        SettingsError: on every rank, when the main rank found something wrong.
    """
    collections, problems = None, []
    if ranks.is_main:
        try:
            collections = collect(sources, facts, index_path, trust=trust, progress=True, heed=heed)
        except SettingsError as error:
            problems = [[problem.file, problem.where, problem.message] for problem in error.problems]
    shared = share(ranks, "collection", problems, heed=heed)[0]
    if shared:
        raise SettingsError(Problem(*problem) for problem in shared)
    return collections if collections is not None else collect(sources, facts, index_path, trust=trust)


def _mixed_controls(collections: Sequence[Collection]) -> list[Problem]:
    """Batches either all have control images or have none."""
    if not any(collection.has_controls for collection in collections):
        return []
    return [
        Problem(
            str(collection.source.file),
            "control_path",
            "some directories of this run have control images and some "
            "have none; give all of them a control_path, or train them apart",
        )
        for collection in collections
        if not all(sample.control for sample in collection.samples)
    ]


def refuse_failures(reports: Sequence[CacheReport]) -> None:
    """Stops before training when files could not be encoded.

    Raises:
        SettingsError: naming the files and the reasons.
    """
    failures = [failure for report in reports for failure in report.failures]
    if not failures:
        return
    problems = [Problem("", "unreadable", failure.reason) for failure in failures[:FAILURES_LISTED]]
    if len(failures) > FAILURES_LISTED:
        problems.append(Problem("", "", f"and {len(failures) - FAILURES_LISTED} more"))
    problems.append(Problem("", "", "mend or remove these files and start again; what is encoded stays encoded"))
    raise SettingsError(problems)
