"""The size at which each file is trained. A bucket is one size, and a batch comes from one bucket."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from utils.dataset.captions import caption_variants
from utils.dataset.manifest import Row
from utils.dataset.samples import Bucket, Control, MediaFile, Sample, Take
from utils.diffusion import seeds
from utils.media.colour import Jitter
from utils.media.geometry import round_to_multiple
from utils.media.source import Probe
from utils.media.timing import clip_starts, frames_at
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings

COLOURS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class MediaFacts:
    """What a model requires of media: width and height are multiples of `spatial` pixels, the number of frames beyond
    `further` is a multiple of `temporal` unless there is one alone, there are at most `max_frames` frames, and there
    are `fps` of them per second. With `control_clips` a control that is a clip is read as one, from its beginning and
    no longer than the sample; otherwise its first frame is."""

    spatial: int
    temporal: int = 1
    max_frames: int = 1
    fps: float = 16.0
    further: int = 1
    control_clips: bool = False

    def describe_frames(self) -> str:
        """The numbers of frames that the model takes, as text."""
        if self.max_frames == 1:
            return "one frame: still pictures alone"
        first, second = (self.further + count * self.temporal for count in (1, 2))
        numbers = f"1, {first}, {second} ..." if self.temporal > 1 else "any number"
        return f"{numbers} up to {self.max_frames} frames"

    def frames(self, count: int) -> int:
        """The largest number of frames, up to `count`, that the model takes."""
        groups = (min(count, self.max_frames) - self.further) // self.temporal
        return groups * self.temporal + self.further if groups > 0 else 1


@dataclass(frozen=True)
class LeftOut:
    """A file that gives no sample, or that is not used completely, and the reason with its numbers."""

    file: str
    reason: str
    is_used: bool


@dataclass(frozen=True)
class Assignment:
    """The samples of a dataset, and the files that are not used, or not completely."""

    samples: list[Sample]
    left_out: list[LeftOut]


@dataclass(frozen=True)
class _Size:
    """A width and height to choose from, with the numbers of frames that the model takes at this size."""

    width: int
    height: int
    frames: Sequence[int]


def assign(
    rows: Iterable[Row], dataset: DatasetSettings, facts: MediaFacts, *, caption_versions: bool = True
) -> Assignment:
    """Each file once per resolution (and per clip), in the bucket that is nearest to its shape.

    The random choices for the versions of a sample depend on the file only, so that all runs share cached items.

    Args:
        caption_versions: make the versions of each caption that will be cached; otherwise captions stay as written.
    """
    directories = [dataset.resolved(directory) for directory in dataset.directory]
    choosers = [_chooser(rules, facts) for rules in directories]
    # Counted over all rows: a file in two folders must not draw the same noise twice.
    seen: dict[str, int] = {}
    samples: list[Sample] = []
    left_out: list[LeftOut] = []
    for row in rows:
        buckets, reason = choosers[row.directory](row.media)
        if reason:
            left_out.append(LeftOut(str(row.media.locator), reason, bool(buckets)))
        for bucket in buckets:
            for sample in _samples(row, bucket, directories[row.directory], facts, caption_versions):
                number = seen.get(sample.id, 0)
                seen[sample.id] = number + 1
                samples.append(replace(sample, id=f"{sample.id}-copy{number}") if number else sample)
    return Assignment(rebalanced(samples), left_out)


def rebalanced(samples: list[Sample]) -> list[Sample]:
    """The samples of a training set with repeats and turns that fit all of them together."""
    return _in_turns(_balanced(samples))


def _chooser(rules: DirectorySettings, facts: MediaFacts) -> Callable[[MediaFile], tuple[list[Bucket], str]]:
    """`_buckets_of` for the files of a directory. Of a million files few have sizes of their own."""
    offers = _offers(rules, facts)
    known: dict[tuple[int, int, int, float], tuple[list[Bucket], str]] = {}

    def choose(media: MediaFile) -> tuple[list[Bucket], str]:
        size = (media.width, media.height, media.frames, media.fps)
        if size not in known:
            known[size] = _buckets_of(media, offers, rules, facts)
        return known[size]

    return choose


def _samples(
    row: Row, bucket: Bucket, rules: DirectorySettings, facts: MediaFacts, caption_versions: bool
) -> Iterator[Sample]:
    """One sample for each clip, and for each caption if every caption is a sample of its own."""
    media = row.media
    fps = _fps(rules, facts) if bucket.frames > 1 else 0.0
    width, height = _control_size(bucket, rules, facts)
    controls = tuple(
        Control(one, Bucket(width, height, control_frames(one, bucket.frames, fps, facts))) for one in row.controls
    )
    for captions in [(one,) for one in row.captions] if rules.multiple_captions == "all" else [row.captions]:
        texts = hashlib.blake2b("\0".join(captions).encode(), digest_size=4).hexdigest()
        if caption_versions:
            versions = caption_variants(captions, rules, 0, media.digest)
        else:
            versions = captions[:1] if rules.multiple_captions == "first" else tuple(dict.fromkeys(captions))
        for clip, takes in enumerate(_takes(media, bucket, rules, fps)):
            name = f"{media.digest[:16]}-{texts}-{bucket}" + (f"-clip{clip}" if clip else "")
            repeats = rules.num_repeats * row.repeats
            yield Sample(name, media, bucket, takes, versions, controls, row.mask, fps, repeats, rules)


def _takes(media: MediaFile, bucket: Bucket, rules: DirectorySettings, fps: float) -> list[tuple[Take, ...]]:
    """The cached versions of each clip; a still picture counts as one clip."""

    def drawn(number: int, what: str) -> float:
        return seeds.uniform(0, "take", media.digest, number, what)

    def take(number: int, start: float) -> Take:
        crop = (drawn(number, "x"), drawn(number, "y")) if rules.crop == "random" else rules.crop
        changes = [
            width * (2 * drawn(number, name) - 1)
            for name, width in zip(COLOURS, rules.color_jitter or (), strict=False)
        ]
        jitter = Jitter(*(1 + change for change in changes[:3]), changes[3]) if changes else Jitter()
        # Every other version is flipped, so that two versions include both; which comes first is random.
        flip = rules.flip and (number + (drawn(0, "flip") < 0.5)) % 2 == 1
        return Take(crop, flip, jitter, start)

    def starts(number: int) -> list[float]:
        if bucket.frames == 1:
            return [0.0]
        frames = clip_starts(_available(media, fps), bucket.frames, rules.video_clip_mode, drawn(number, "start"))
        return [frame / fps for frame in frames]

    if bucket.frames == 1 and rules.crop != "random" and not rules.color_jitter and not rules.flip:
        return _plain_takes(rules.crop)
    versions = [[take(number, start) for start in starts(number)] for number in range(rules.augment_variants)]
    return [tuple(dict.fromkeys(version)) for version in zip(*versions, strict=True)]


@cache
def _plain_takes(crop: Literal["center", "none"]) -> list[tuple[Take, ...]]:
    """The version of a still picture about which nothing is drawn: one object, whatever the number of samples."""
    return [(Take(crop),)]


def _balanced(samples: list[Sample]) -> list[Sample]:
    """The samples, with repeats such that regularisation data appears as often as the rest."""
    if not any(rules.is_regularisation_data for rules in rules_of(samples)):
        return samples
    count = {kind: sum(s.repeats for s in samples if s.rules.is_regularisation_data is kind) for kind in (True, False)}
    if not all(count.values()):
        return samples
    factor = count[False] / count[True]
    return [replace(s, repeats=s.repeats * factor) if s.rules.is_regularisation_data else s for s in samples]


def _in_turns(samples: list[Sample]) -> list[Sample]:
    """The samples with a `turn` for those that are used a fraction of a time per epoch. The turns of a directory are
    evenly spread: independent draws could put many samples into one epoch and none into the next."""
    groups: dict[int, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        if not float(sample.repeats).is_integer():
            groups[id(sample.rules)].append(position)
    if not groups:
        return samples
    placed = list(samples)
    for positions in groups.values():
        positions.sort(key=lambda position: seeds.derive(0, "turn", samples[position].id))
        for number, position in enumerate(positions):
            placed[position] = replace(samples[position], turn=number / len(positions))
    return placed


def _offers(rules: DirectorySettings, facts: MediaFacts) -> list[list[_Size]]:
    """The sizes to choose from, for each resolution."""

    def rounded(width: float, height: float, frames: Sequence[int]) -> _Size:
        multiple, counts = facts.spatial, sorted({facts.frames(count) for count in frames})
        return _Size(round_to_multiple(width, multiple), round_to_multiple(height, multiple), counts)

    if rules.size_buckets:
        return [[rounded(width, height, [frames]) for width, height, frames in rules.size_buckets]]
    # A still picture is trained as a still picture, even among clips.
    frames = [1, *rules.frame_buckets]
    shapes = [size if isinstance(size, tuple) else (size, size) for size in rules.resolutions]
    if not rules.enable_ar_bucket:
        return [[rounded(width, height, frames)] for width, height in shapes]
    ratios = _ratios(rules)
    areas = [width * height for width, height in shapes]
    return [[rounded(math.sqrt(area * ratio), math.sqrt(area / ratio), frames) for ratio in ratios] for area in areas]


def _ratios(rules: DirectorySettings) -> list[float]:
    """The aspect ratios (width / height) of the buckets."""
    if rules.ar_buckets:
        return [ratio[0] / ratio[1] if isinstance(ratio, tuple) else ratio for ratio in rules.ar_buckets]
    low, high, count = math.log(rules.min_ar), math.log(rules.max_ar), rules.num_ar_buckets
    if count == 1:
        return [math.exp((low + high) / 2)]
    return [math.exp(low + (high - low) * index / (count - 1)) for index in range(count)]


def _buckets_of(
    media: MediaFile, offers: list[list[_Size]], rules: DirectorySettings, facts: MediaFacts
) -> tuple[list[Bucket], str]:
    """The file's buckets, one for each resolution without duplicates, and the reason if the file is not used, or not
    completely."""
    area = media.width * media.height
    if rules.min_resolution and area < rules.min_resolution**2:
        return [], f"{media.width}x{media.height} pixels are fewer than min_resolution = {rules.min_resolution} squared"
    if rules.max_resolution and area > rules.max_resolution**2:
        return [], f"{media.width}x{media.height} pixels are more than max_resolution = {rules.max_resolution} squared"
    is_clip = media.frames > 1
    available = _available(media, _fps(rules, facts)) if is_clip else 1
    chosen: dict[Bucket, None] = {}
    own_sizes: list[Bucket] = []
    for sizes in offers:
        fitting = [
            Bucket(size.width, size.height, frames)
            for size in sizes
            for frames in size.frames
            if frames <= available and (frames > 1) == is_clip
        ]
        if fitting:
            nearest = min(fitting, key=lambda bucket: _distance(media, bucket))
            if rules.no_upscale and not _fills(media, nearest):
                own_sizes.append(_within(media, nearest, facts))
            else:
                chosen[nearest] = None
    if own_sizes:
        # One size for all resolutions that ask for more, although they do not round to the same size.
        chosen[max(own_sizes, key=lambda bucket: bucket.pixels)] = None
    buckets = [bucket for bucket in chosen if bucket.pixels]
    if not buckets:
        return [], _why_not(media, available, offers, facts, bool(own_sizes), rules)
    return buckets, _cut_short(media, available, max(bucket.frames for bucket in buckets), rules, facts)


def _why_not(
    media: MediaFile,
    available: int,
    offers: list[list[_Size]],
    facts: MediaFacts,
    too_small: bool,
    rules: DirectorySettings,
) -> str:
    if too_small:
        return f"{media.width}x{media.height} pixels are fewer than one cell of {facts.spatial}x{facts.spatial}"
    if media.frames == 1:
        return "no bucket is for still pictures; add one of 1 frame to size_buckets, or set resolutions"
    if facts.max_frames == 1:
        return "a clip, and this model is trained on still pictures alone"
    lengths = sorted({count for sizes in offers for size in sizes for count in size.frames} - {1})
    needed = f"the shortest bucket has {lengths[0]}" if lengths else "no bucket has more than one; set frame_buckets"
    return f"{_length(media, available, rules, facts)}, and {needed}"


def _cut_short(media: MediaFile, available: int, frames: int, rules: DirectorySettings, facts: MediaFacts) -> str:
    """The message about a clip of which not every frame is used."""
    if media.frames == 1 or rules.video_clip_mode == "multiple_overlapping":
        return ""
    clips = available // frames if rules.video_clip_mode == "chunks" else 1
    if clips * frames == available:
        return ""
    return f"{_length(media, available, rules, facts)}, bucket {frames}" + (f" x {clips} clips" if clips > 1 else "")


def _length(media: MediaFile, available: int, rules: DirectorySettings, facts: MediaFacts) -> str:
    return f"{media.frames} frames at {media.fps:.4g} fps = {available} at {_fps(rules, facts):.4g} fps"


def _available(media: MediaFile, fps: float) -> int:
    """How many frames the file has at `fps`."""
    return frames_at(Probe(media.width, media.height, media.frames, media.fps), fps)


def _fps(rules: DirectorySettings, facts: MediaFacts) -> float:
    return rules.framerate or facts.fps


def _fills(media: MediaFile, bucket: Bucket) -> bool:
    return media.width >= bucket.width and media.height >= bucket.height


def _within(media: MediaFile, bucket: Bucket, facts: MediaFacts) -> Bucket:
    """The largest bucket of the same shape that the file fills; its width is 0 if that is less than one cell."""
    # With integers: a rounding error just below a whole cell would cost that cell.
    is_wider = media.width * bucket.height > media.height * bucket.width
    size, of = (media.height, bucket.height) if is_wider else (media.width, bucket.width)
    width, height = (side * size // of // facts.spatial * facts.spatial for side in (bucket.width, bucket.height))
    return Bucket(width, height, bucket.frames)


def control_frames(control: MediaFile, frames: int, fps: float, facts: MediaFacts) -> int:
    """How many frames of a control are read, for a sample of so many at `fps`."""
    if not facts.control_clips or 1 in (frames, control.frames):
        return 1
    return facts.frames(min(frames, _available(control, fps)))


def _control_size(bucket: Bucket, rules: DirectorySettings, facts: MediaFacts) -> tuple[int, int]:
    """The target's shape at the controls' own area."""
    if rules.control_resolution is None:
        return bucket.width, bucket.height
    scale = rules.control_resolution / math.sqrt(bucket.width * bucket.height)
    width, height = (round_to_multiple(side * scale, facts.spatial) for side in (bucket.width, bucket.height))
    return width, height


def _distance(media: MediaFile, bucket: Bucket) -> tuple[float, int]:
    """How different the shapes are; among equal shapes the longest bucket is the nearest."""
    return abs(math.log(media.width / media.height) - math.log(bucket.width / bucket.height)), -bucket.frames


def by_shape(samples: Iterable[Sample]) -> dict[tuple[Bucket, ...], list[Sample]]:
    """The samples that can share a batch, by their common shape, in ascending order."""
    groups = defaultdict(list)
    for sample in samples:
        groups[sample.shape].append(sample)
    return dict(sorted(groups.items()))


def rules_of(samples: Iterable[Sample]) -> list[DirectorySettings]:
    """The rules of the samples' directories, each once."""
    return list({id(sample.rules): sample.rules for sample in samples}.values())
