"""Training samples, their versions, and which version is used when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from utils.dataset.captions import caption_variant
from utils.dataset.sources import Locator
from utils.diffusion import seeds
from utils.media.colour import Jitter
from utils.media.colour_profiles import Colours
from utils.media.geometry import View
from utils.settings.dataset_schema import ControlFit, DirectorySettings

Numbers = float | np.ndarray
_FITS = {"stretch": "none", "pad": "pad"}


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A picture or clip: its location, the hash of its content, its upright size in pixels, its number of frames, its
    frames per second (0 for a still), what of it cannot be read, although its first frame can, and what is done about
    its profile of colours."""

    locator: Locator
    digest: str
    width: int
    height: int
    frames: int
    fps: float = 0.0
    fault: str = ""
    colours: Colours = ""

    def __reduce__(self) -> tuple[Any, ...]:
        # For processes that hand a million of them on: what a dataclass does by itself takes five times as long.
        return MediaFile, _of_media(self)


@dataclass(frozen=True, order=True, slots=True)
class Bucket:
    """A size: width and height in pixels, number of frames."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    @property
    def pixels(self) -> int:
        return self.width * self.height * self.frames


@dataclass(frozen=True, slots=True)
class Take:
    """One version of a sample's pixels: the crop, flip and colours, and the second at which a clip starts."""

    crop: Literal["center", "none"] | tuple[float, float] = "center"
    flip: bool = False
    jitter: Jitter = Jitter()
    start: float = 0.0

    def view(self, bucket: Bucket) -> View:
        return View(bucket.width, bucket.height, self.crop, self.flip, self.jitter)

    def plain_view(self, bucket: Bucket, of: MediaFile | None = None, on: MediaFile | None = None) -> View:
        """The same without changes of colour; the view of a mask or control if it lies `on` the picture."""
        is_scaled = of is None or on is None or of.width * on.height == of.height * on.width
        return View(bucket.width, bucket.height, self.crop, self.flip, on=None if is_scaled else (on.width, on.height))


@dataclass(frozen=True, slots=True)
class Control:
    """A picture or clip that the model is conditioned on, and the size to which it is scaled."""

    media: MediaFile
    bucket: Bucket


@dataclass(frozen=True, slots=True)
class Mask:
    """The weight of a sample's pixels, or how far a model makes them anew: the brightness of a mask picture or clip, or
    the opacity of the sample's own picture. `mean` is that of the whole file, in [0, 1]."""

    media: MediaFile
    is_alpha: bool
    mean: float = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample.

    `id` names its draws and is unique within a list of samples. `takes` and `captions` are its cached versions. `fps`
    belongs to the trained clip, 0 for a still. `rules` are the keys of its directory. `turn`, in [0, 1), is its
    position among the samples with which it takes turns if it is used a fraction of a time; None for a random one.
    """

    id: str
    media: MediaFile
    bucket: Bucket
    takes: tuple[Take, ...]
    captions: tuple[str, ...]
    controls: tuple[Control, ...]
    mask: Mask | None
    fps: float
    repeats: float
    rules: DirectorySettings
    turn: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # For processes that hand a million of them on: what a dataclass does by itself takes five times as long.
        return Sample, _of_sample(self)

    @property
    def shape(self) -> tuple[Bucket, ...]:
        """What samples of one batch have in common: the sizes of the target and of the controls."""
        return (self.bucket, *(control.bucket for control in self.controls))


_of_media, _of_sample = (attrgetter(*(one.name for one in fields(cls))) for cls in (MediaFile, Sample))


def files_of(sample: Sample) -> list[MediaFile]:
    """All files that a sample is made of: its own, those of its control images, and its mask."""
    masks = [sample.mask.media] if sample.mask else []
    return [sample.media, *(control.media for control in sample.controls), *masks]


@dataclass(frozen=True, slots=True)
class SampleVersion:
    """A version of a sample, as it is used once.

    `draw` names its random draws: noise, timestep. `unconditional` are the encoders whose caption is dropped.
    """

    sample: Sample
    take: Take
    caption: str
    draw: str
    unconditional: frozenset[str] = frozenset()

    @property
    def mask_view(self) -> View:
        """The part of the mask that lies on what is seen of the picture."""
        return self.take.plain_view(self.sample.bucket, self.sample.mask.media, self.sample.media)

    def control_view(self, control: Control) -> View:
        """The part of a control image that is used: what lies on what is seen of the picture, or what `control_fit`
        says."""
        bucket, take, fit = control.bucket, self.take, self.sample.rules.control_fit
        if fit is None:
            return take.plain_view(bucket, control.media, self.sample.media)
        own = ("center" if take.crop == "none" else take.crop) if fit == "crop" else _FITS[fit]
        return View(bucket.width, bucket.height, own, take.flip)

    def caption_for(self, encoder: str) -> str:
        """The caption that the encoder of this name is given."""
        return "" if encoder in self.unconditional else self.caption


def version_of_prompt(
    prompt: str,
    bucket: Bucket,
    pictures: Sequence[MediaFile] = (),
    clip_fps: float | None = None,
    *,
    mask: MediaFile | None = None,
    control_fps: float = 0.0,
    control_fit: ControlFit = None,
    control_frames: Callable[[MediaFile], int] = lambda control: 1,
) -> SampleVersion:
    """A prompt in the form of a sample that encoders can read.

    Args:
        bucket: the size of the picture or clip to draw, to which the control images are scaled too.
        pictures: control images; with `clip_fps` the first is instead the sample's own picture, repeated for all
            frames of the clip, and what follows it is for the clip's end.
        mask: what of the first of them is made anew; None for all of it.
        control_fps: the frames per second at which control clips and their masks are read.
        control_fit: how control images are brought to this size.
        control_frames: how many frames of a control are read.
    """
    rules = DirectorySettings(path=Path(), control_fit=control_fit)
    media = None if clip_fps is None else pictures[0]
    controls = tuple(
        Control(picture, replace(bucket, frames=control_frames(picture)))
        for picture in (pictures if media is None else pictures[1:])
    )
    region = None if mask is None else Mask(mask, is_alpha=False)
    sample = Sample(prompt, media, bucket, (Take(),), (prompt,), controls, region, clip_fps or control_fps, 1, rules)
    return evaluation_version(sample)


def evaluation_version(sample: Sample) -> SampleVersion:
    """The version of a sample that evaluation uses, the same every time."""
    return SampleVersion(sample, sample.takes[0], sample.captions[0], sample.id)


@dataclass(frozen=True)
class VersionPicker:
    """Picks the versions of samples in training: pure functions of the seed, the epoch (from 0), and the sample.

    Attributes:
        text_encoders: names of all encoders that read captions.
        fresh_captions: captions are encoded when they are needed, so each epoch makes a new version instead of picking
            a cached one.
    """

    seed: int
    text_encoders: Sequence[str]
    fresh_captions: bool = False

    def pick(self, sample: Sample, epoch: int, copy: int) -> SampleVersion:
        """The version for the `copy`-th use (from 0) of a sample in an epoch. Takes follow one another, so that all are
        used equally often; captions are drawn."""
        draw = sample.id if copy == 0 else f"{sample.id}#{copy}"
        turn = int(appearances_before(sample.repeats, repeat_phase(sample, self.seed), epoch)) + copy
        take = sample.takes[(turn + seeds.derive(self.seed, "take", sample.id)) % len(sample.takes)]
        caption = sample.captions[int(seeds.uniform(self.seed, "caption", epoch, draw) * len(sample.captions))]
        if self.fresh_captions:
            caption = caption_variant(caption, sample.rules, self.seed, draw, epoch)
        return SampleVersion(sample, take, caption, draw, self._unconditional(sample.rules, epoch, draw))

    def is_captioned(self, version: SampleVersion) -> bool:
        """Whether some encoder is given the sample's caption."""
        return bool(version.caption) and not version.unconditional >= set(self.text_encoders)

    def is_masked(self, version: SampleVersion, epoch: int) -> bool:
        """Whether the sample's mask is applied."""
        return seeds.uniform(self.seed, "mask", epoch, version.draw) < version.sample.rules.mask_probability

    def _unconditional(self, rules: DirectorySettings, epoch: int, draw: str) -> frozenset[str]:
        """The encoders whose caption is dropped."""

        def happens(probability: float, *name: str) -> bool:
            return probability > 0 and seeds.uniform(self.seed, "uncond", epoch, draw, *name) < probability

        every = rules.uncond_every_n_epochs
        if happens(rules.uncond_fraction) or (every is not None and (epoch + 1) % every == 0):
            return frozenset(self.text_encoders)
        return frozenset(name for name, share in rules.uncond_fraction_per_encoder.items() if happens(share, name))


def appearances_before(repeats: Numbers, phases: Numbers, epoch: int) -> Numbers:
    """How often a sample, or each of many samples, is used before an epoch (from 0). A fraction of a repeat is used in
    that fraction of the epochs: after n epochs the sum is n times `repeats`, rounded up or down."""
    return np.floor(repeats * epoch + phases)


def repeat_phase(sample: Sample, seed: int) -> float:
    """The fraction of a repeat, in [0, 1), at which the count of a sample's repeats begins, so that samples take
    turns."""
    if float(sample.repeats).is_integer():
        return 0.0
    if sample.turn is None:
        return seeds.uniform(seed, "repeats", sample.id)
    return (sample.turn + seeds.uniform(seed, "repeats")) % 1.0


def may_lack_caption(sample: Sample) -> bool:
    """Whether some draw uses the sample without its caption."""
    rules = sample.rules
    return bool(rules.uncond_fraction or rules.uncond_every_n_epochs or any(rules.uncond_fraction_per_encoder.values()))
