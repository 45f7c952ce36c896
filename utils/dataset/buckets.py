"""Which size each file is trained at. A bucket is one size; a batch is cut from one bucket."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from utils.dataset.manifest import Manifest, MediaFile, Row
from utils.media.geometry import round_to_multiple
from utils.settings.schema import DatasetSettings, ResolvedDirectory


@dataclass(frozen=True)
class MediaFacts:
    """What a model asks of sizes: width and height are multiples of `spatial` pixels, the frames after the
    first a multiple of `temporal`, and there are at most `max_frames` of them."""

    spatial: int
    temporal: int = 1
    max_frames: int = 1


@dataclass(frozen=True, order=True)
class Bucket:
    """A size: width and height in pixels, number of frames."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True)
class Sample:
    """One thing to train on once an epoch.

    `id` names its draws, and no two samples of a list share it. `repeat` tells apart samples that are
    otherwise the same, and that are one item in the cache.
    """

    id: str
    media: MediaFile
    caption: str
    control: MediaFile | None
    bucket: Bucket
    repeat: int


@dataclass(frozen=True)
class BucketLine:
    """What one bucket gives to an epoch.

    A batch is one of all data ranks together; `fill` counts the samples that appear again to complete
    batches. In the line of the total `bucket` is None, and what completes the last step is counted too.
    """

    bucket: Bucket | None
    files: int
    samples: int
    batches: int
    fill: int


@dataclass(frozen=True)
class _Size:
    """A width and height on offer, and the numbers of frames on offer with it."""

    width: int
    height: int
    frames: Sequence[int]


def assign(manifest: Manifest, dataset: DatasetSettings, facts: MediaFacts) -> list[Sample]:
    """The samples of an epoch: each file once per resolution and repeat, in the bucket nearest its shape.

    Raises:
        ValueError: no size is set that a file could have.
    """
    choices = [_choices(dataset.resolved(directory), facts) for directory in dataset.directory]
    seen: Counter[tuple[str, str, Bucket]] = Counter()
    return [
        _sample(row, bucket, seen)
        for row in manifest.rows
        for bucket in _buckets_of(row.media, choices[row.directory], facts)
        for _ in range(row.repeats)
    ]


def _sample(row: Row, bucket: Bucket, seen: Counter[tuple[str, str, Bucket]]) -> Sample:
    caption = hashlib.blake2b(row.caption.encode(), digest_size=4).hexdigest()
    name = (row.media.digest[:16], caption, bucket)
    # Counted over all rows: a file that lies in two folders must not draw the same noise twice.
    repeat = seen[name]
    seen[name] += 1
    identity = "-".join(map(str, [*name, repeat]))
    return Sample(identity, row.media, row.caption, row.control, bucket, repeat)


def _choices(settings: ResolvedDirectory, facts: MediaFacts) -> list[list[_Size]]:
    """For each resolution, the sizes to choose from."""

    def rounded(width: float, height: float, frames: Sequence[int]) -> _Size:
        multiple = facts.spatial
        return _Size(round_to_multiple(width, multiple), round_to_multiple(height, multiple), frames)

    if settings.size_buckets:
        return [[rounded(width, height, [frames]) for width, height, frames in settings.size_buckets]]
    # A still picture is trained as one, also among clips.
    frames = [1, *settings.frame_buckets]
    shapes = [size if isinstance(size, tuple) else (size, size) for size in settings.resolutions]
    if not settings.enable_ar_bucket:
        return [[rounded(width, height, frames)] for width, height in shapes]
    ratios = _ratios(settings)
    areas = [width * height for width, height in shapes]
    return [[rounded(math.sqrt(area * ratio), math.sqrt(area / ratio), frames) for ratio in ratios] for area in areas]


def _ratios(settings: ResolvedDirectory) -> list[float]:
    """The aspect ratios (width / height) of the buckets."""
    if settings.ar_buckets:
        return [ratio[0] / ratio[1] if isinstance(ratio, tuple) else ratio for ratio in settings.ar_buckets]
    low, high, count = math.log(settings.min_ar), math.log(settings.max_ar), settings.num_ar_buckets
    if count == 1:
        return [math.exp((low + high) / 2)]
    return [math.exp(low + (high - low) * index / (count - 1)) for index in range(count)]


def _buckets_of(media: MediaFile, choices: list[list[_Size]], facts: MediaFacts) -> list[Bucket]:
    """The file's bucket at each resolution; resolutions that come to the same one count once."""
    chosen = {}
    for sizes in choices:
        fitting = [Bucket(size.width, size.height, frames) for size in sizes if (frames := _frames(media, size, facts))]
        if fitting:
            chosen[min(fitting, key=lambda bucket: _distance(media, bucket))] = None
    if not chosen:
        hint = f"add one of at most {media.frames} frame(s) to `size_buckets`, or set `resolutions`"
        raise ValueError(f"{media.path}: no bucket fits a file of {media.frames} frame(s); {hint}")
    return list(chosen)


def _frames(media: MediaFile, size: _Size, facts: MediaFacts) -> int:
    """The longest clip that can be cut from the file at this size, in frames; 0: none."""
    lengths = (min(frames, facts.max_frames) for frames in size.frames if frames <= media.frames)
    return max(((length - 1) // facts.temporal * facts.temporal + 1 for length in lengths), default=0)


def _distance(media: MediaFile, bucket: Bucket) -> tuple[float, int]:
    """How unlike the shapes are; of the like, the longest bucket is the nearest."""
    return abs(math.log(media.width / media.height) - math.log(bucket.width / bucket.height)), -bucket.frames


def by_bucket(samples: Iterable[Sample]) -> dict[Bucket, list[Sample]]:
    """The samples of each bucket, buckets in ascending order."""
    groups = defaultdict(list)
    for sample in samples:
        groups[sample.bucket].append(sample)
    return dict(sorted(groups.items()))


def table(samples: Sequence[Sample], micro_batch: int, data_ranks: int, accumulation: int) -> list[BucketLine]:
    """A line for each bucket, then one of the total."""
    slot = micro_batch * data_ranks
    lines = [_line(bucket, group, math.ceil(len(group) / slot), slot) for bucket, group in by_bucket(samples).items()]
    steps = math.ceil(sum(line.batches for line in lines) / accumulation)
    return [*lines, _line(None, samples, steps * accumulation, slot)]


def _line(bucket: Bucket | None, samples: Sequence[Sample], batches: int, slot: int) -> BucketLine:
    files = len({sample.media.path for sample in samples})
    return BucketLine(bucket, files, len(samples), batches, batches * slot - len(samples))


def format_table(lines: Iterable[BucketLine]) -> str:
    """The table as text, columns aligned."""
    rows = [("bucket", "files", "samples", "batches", "fill")]
    rows += [(str(line.bucket or "total"), line.files, line.samples, line.batches, line.fill) for line in lines]
    return "\n".join(f"{name:<16}" + "".join(f"{count:>9}" for count in counts) for name, *counts in rows)
