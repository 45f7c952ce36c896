"""A run's data: the training set and the evaluation sets, scanned, sorted into buckets, without broken files."""

from __future__ import annotations

import csv
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from utils.dataset.buckets import LeftOut, MediaFacts, assign, rebalanced
from utils.dataset.encoders import Encoder, reads_text
from utils.dataset.encoding import CacheReport
from utils.dataset.held_out import emptied, held_out, without
from utils.dataset.manifest import Scan, scan
from utils.dataset.remarks import nothing_is_weighed, remarks_on, seen_in_training, truncated
from utils.dataset.samples import Sample, files_of
from utils.dataset.sources import NOT_BROKEN, Rejected, Remark
from utils.errors import Problem, UserError, printable
from utils.settings.dataset_schema import DatasetSettings

logger = logging.getLogger(__name__)

LISTED = 10
FAILED_NAME = "failed.csv"
WITHOUT_CAPTIONS = (
    ", since none has a caption. One for all is instance_prompt, in the dataset file; caption_source takes the names "
    'of the files ("filename") or of their folders ("foldername")'
)
TRAINING = "train"
"""Name of the training set."""


@dataclass(frozen=True)
class Source:
    """A dataset file and its settings. The training set's name is `TRAINING`; `fraction` is that of the training set
    which is held out from it as this set, None for a set of its own."""

    name: str
    file: Path
    settings: DatasetSettings
    fraction: float | None = None


@dataclass(frozen=True)
class Collection:
    """The samples of one dataset file; its files that are not used completely; and those that cannot be used because
    they are broken. `files` counts all files and rows that were examined. `remarks` are on samples that are used.
    Two with the same `identity`, if it is not "", have the same samples."""

    source: Source
    samples: list[Sample]
    left_out: list[LeftOut]
    rejected: list[Rejected]
    files: int
    remarks: list[Remark] = field(default_factory=list)
    identity: str = ""

    @property
    def controls(self) -> int:
        """How many control images each sample has."""
        return max((len(sample.controls) for sample in self.samples), default=0)

    @property
    def has_masks(self) -> bool:
        return any(sample.mask for sample in self.samples)


def collect(
    sources: Sequence[Source],
    facts: MediaFacts,
    how: Scan,
    *,
    max_failed_fraction: float = 0.0,
    caption_versions: bool = True,
    masks_weigh: bool = True,
    listing: bool = True,
) -> list[Collection]:
    """The samples of every source.

    Args:
        max_failed_fraction: fraction of the files that may be broken; broken files are left out.
        caption_versions: of the training set; see `buckets.assign`.
        masks_weigh: masks are weights of the loss; otherwise they say what the model makes anew.
        listing: write the files that cannot be used to `FAILED_NAME` beside the index of the files.

    Raises:
        UserError: lists everything that is wrong with whole directories, and the broken files if there are too many.
    """
    problems: list[Problem] = []
    collections = []
    held = [source for source in sources if source.fraction is not None]
    for source in (one for one in sources if one.fraction is None):
        manifest = scan(source.settings, str(source.file), how)
        problems += manifest.problems
        # Evaluation uses the same caption every time, so no versions of it are made.
        versions = caption_versions or source.name != TRAINING
        chosen = assign(manifest.rows, source.settings, facts, caption_versions=versions)
        files = len(manifest.rows) + len(manifest.rejected)
        remarks = manifest.remarks + remarks_on(manifest.rows, chosen.samples, source.settings, masks_weigh=masks_weigh)
        if collections and source.file.resolve() != collections[0].source.file.resolve():
            remarks += seen_in_training(collections[0].samples, chosen.samples)
        collections.append(Collection(source, chosen.samples, chosen.left_out, manifest.rejected, files, remarks))
        if held and len(collections) == 1:
            collections = divided(collections[0], held)
            problems += _nothing_left(collections)
        if masks_weigh and (reason := nothing_is_weighed(manifest.rows, source.settings)):
            problems.append(Problem(str(source.file), "masks", reason))
        if not files and not manifest.problems:
            problems.append(Problem(str(source.file), "", "there is no picture or clip in any of its directories"))
    if listing:
        write_list(collections, how.index.parent)
    problems += too_many_failures(collections, max_failed_fraction)
    problems += _mixed_controls(collections)
    if problems:
        raise UserError(problems)
    return collections


def divided(training: Collection, held: Sequence[Source]) -> list[Collection]:
    """The training set without what is held out from it, and the sets of that."""
    parts, begin = [], 0.0
    for source in held:
        parts.append(
            held_out(without(training.samples, [one for part in parts for one in part]), begin, source.fraction)
        )
        begin += source.fraction
    taken = [sample for part in parts for sample in part]
    left = rebalanced(without(training.samples, taken))
    names = ", ".join(source.name for source in held)
    remarks = [*training.remarks, *emptied(training.samples, left, names)]
    sets = [Collection(source, part, [], [], len(part)) for source, part in zip(held, parts, strict=True)]
    return [replace(training, samples=left, remarks=remarks), *sets]


def _nothing_left(collections: Sequence[Collection]) -> Iterator[Problem]:
    """The problems of a training set and what is held out from it, if it had anything."""
    if not any(collection.samples for collection in collections):
        return
    for collection in collections:
        name, file = collection.source.name, str(collection.source.file)
        if not collection.samples and name == TRAINING:
            yield Problem(file, "", "the fractions of eval_datasets leave nothing to train; set them lower")
        elif not collection.samples:
            message = f"'{name}' has no picture: there are too few for its fraction; leave it out"
            yield Problem(file, "", message)


def without_failures(collections: Sequence[Collection], reports: Iterable[CacheReport]) -> list[Collection]:
    """The collections without the samples that have a file which could not be encoded; those files are rejected."""
    reasons = {failure.digest: failure.reason for report in reports for failure in report.failures}
    if not reasons:
        return list(collections)
    cleaned = []
    for collection in collections:
        broken: dict[str, str] = {}
        sound = []
        for sample in collection.samples:
            faults = [reasons[media.digest] for media in files_of(sample) if media.digest in reasons]
            if faults:
                broken[str(sample.media.locator)] = faults[0]
            else:
                sound.append(sample)
        rejected = [Rejected(location, "unreadable", reason) for location, reason in broken.items()]
        cleaned.append(replace(collection, samples=sound, rejected=[*collection.rejected, *rejected]))
    return cleaned


def too_many_failures(collections: Sequence[Collection], max_failed_fraction: float) -> list[Problem]:
    """The broken files and the reasons, if too much of the data is broken to train without it."""
    problems: list[Problem] = []
    for collection in collections:
        broken = [fault for fault in collection.rejected if fault.kind not in NOT_BROKEN]
        failed, file = len(broken), str(collection.source.file)
        asked_for = collection.files - (len(collection.rejected) - failed)
        if not collection.samples:
            reasons = [f"{one.file}: {one.reason}" for one in collection.left_out[:LISTED]]
            reasons = reasons or [_describe(fault) for fault in collection.rejected[:LISTED]]
            problems += [Problem(file, "not used", reason) for reason in reasons]
            if collection.files:
                hint = WITHOUT_CAPTIONS if {fault.kind for fault in broken} == {"caption missing"} else ""
                problems.append(Problem(file, "", f"none of its {collection.files} files can be used{hint}"))
        elif failed > max_failed_fraction * asked_for:
            problems += [Problem(file, fault.kind, _describe(fault)) for fault in broken[:LISTED]]
            more = f"and {failed - LISTED} more; " if failed > LISTED else ""
            problems.append(
                Problem(
                    file,
                    "",
                    f"{more}{failed} of {asked_for} files cannot be used, which is more than "
                    f"max_failed_fraction = {max_failed_fraction:g} allows: mend or remove them ({FAILED_NAME} in the "
                    "cache lists all)",
                )
            )
    return problems


def tell(collections: Sequence[Collection], cache_dir: Path) -> None:
    """Logs by kind what is not used, and writes the files and rows with the reasons to `FAILED_NAME`."""
    write_list(collections, cache_dir)
    for line in shortfalls(collections):
        logger.warning("%s", line)
    if any(collection.rejected for collection in collections):
        logger.warning("all files that cannot be used, and why: %s", cache_dir / FAILED_NAME)


def write_list(collections: Sequence[Collection], cache_dir: Path) -> None:
    """Writes the files and rows that cannot be used to `FAILED_NAME`, and replaces an older list."""
    rejected = [(str(c.source.file), fault) for c in collections for fault in c.rejected]
    path = cache_dir / FAILED_NAME
    if rejected or path.exists():
        # It may be another user's, of a group that shares the cache.
        path.unlink(missing_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["dataset", "file", "kind", "reason"])
            writer.writerows(map(printable, [dataset, *asdict(fault).values()]) for dataset, fault in rejected)


def with_truncated(
    collections: Sequence[Collection], encoders: Sequence[Encoder], raise_if_stopping: Callable[[], None]
) -> list[Collection]:
    """The collections, with remarks on captions that are longer than the text encoders read."""
    return [
        replace(one, remarks=[*one.remarks, *truncated(encoders, one.samples, raise_if_stopping)])
        for one in collections
    ]


def shortfalls(collections: Sequence[Collection]) -> list[str]:
    """A line for each file that cannot be used, is not used, is cut short, or has a remark: up to ten of each, with the
    number of each kind."""
    lines = []
    rejected = [fault for collection in collections for fault in collection.rejected]
    # Separate sections: files that nobody asked for must not hide broken ones.
    for title, is_broken in (("cannot be used", True), ("not used", False)):
        faults = [fault for fault in rejected if (fault.kind not in NOT_BROKEN) is is_broken]
        if faults:
            kinds = Counter(fault.kind for fault in faults).most_common()
            lines.append(f"{title}: {len(faults)} ({', '.join(f'{count} {kind}' for kind, count in kinds)})")
            lines += [f"{title}: {_describe(fault)}" for fault in faults[:LISTED]]
        if len(faults) > LISTED:
            lines.append(f"{title}: and {len(faults) - LISTED} more; {FAILED_NAME} in the cache has all")
    for used, title in ((False, "not used"), (True, "cut short")):
        told = [one for collection in collections for one in collection.left_out if one.is_used is used]
        lines += [f"{title}: {one.file}: {one.reason}" for one in told[:LISTED]]
        if len(told) > LISTED:
            lines.append(f"{title}: and {len(told) - LISTED} more files")
    remarks = [remark for collection in collections for remark in collection.remarks]
    for title in dict.fromkeys(remark.title for remark in remarks):
        told = [remark for remark in remarks if remark.title == title]
        lines += [f"{title}: {remark.file}: {remark.text}" for remark in told[:LISTED]]
        if len(told) > LISTED:
            lines.append(f"{title}: and {len(told) - LISTED} more files")
    return lines


def check_encoder_names(collections: Sequence[Collection], encoders: Sequence[Encoder]) -> None:
    """Whether `uncond_fraction_per_encoder` names text encoders of the model.

    Raises:
        UserError: it names others.
    """
    known = [encoder.name for encoder in encoders if reads_text(encoder)]
    for collection in collections:
        for directory in collection.source.settings.directory:
            rules = collection.source.settings.resolved(directory)
            for name in sorted(rules.uncond_fraction_per_encoder.keys() - set(known)):
                message = f"'{name}' is none of this model's text encoders; they are {', '.join(known)}"
                raise UserError.of(message, str(collection.source.file), "uncond_fraction_per_encoder")


def _describe(fault: Rejected) -> str:
    return fault.reason if fault.location in fault.reason else f"{fault.location}: {fault.reason}"


def _mixed_controls(collections: Sequence[Collection]) -> list[Problem]:
    """Either all batches have the same number of control images, or none has any."""
    counts = Counter(len(sample.controls) for collection in collections for sample in collection.samples)
    if len(counts) < 2:
        return []
    problems = []
    for collection in collections:
        for path, own in _by_directory(collection.samples).items():
            numbers = Counter(len(sample.controls) for sample in own)
            if len(numbers) > 1:
                usual = numbers.most_common(1)[0][0]
                other = next(sample for sample in own if len(sample.controls) != usual)
                message = (
                    f"{numbers[usual]} of its {len(own)} samples have {usual} control images, and "
                    f"{other.media.locator} has {len(other.controls)}; give each row the same number"
                )
                problems.append(Problem(str(collection.source.file), f"[[directory]] {path}", message))
    message = (
        "some directories of this run have other numbers of control images than others; give all of them the same "
        "number of control_path, or train them apart"
    )
    return problems or [Problem(str(collection.source.file), "control_path", message) for collection in collections]


def _by_directory(samples: Iterable[Sample]) -> dict[Path, list[Sample]]:
    directories: dict[Path, list[Sample]] = defaultdict(list)
    for sample in samples:
        directories[sample.rules.path].append(sample)
    return directories
