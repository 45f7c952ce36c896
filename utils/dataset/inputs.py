"""The inputs that encoders read of a sample: what identifies each of them, and how it is read.

Shapes: C channels, F frames, H height, W width. Pixels are float32 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from utils.dataset.captions import weighted, without_weights
from utils.dataset.samples import Bucket, Control, MediaFile, Sample, SampleVersion
from utils.media.decode import load_alpha, load_clip, load_image, load_mask, load_rgba
from utils.media.geometry import View
from utils.media.source import MediaError

TRANSFORM = "3"
"""Part of every key; to be changed when the same view of a file would give other pixels."""
ENDS, GUIDE, REGIONS = "ends", "guide", "regions"
CONTROL_RGBA, CONTROL_CLIP = "controlrgba", "controlclip"
HALF = 0.5
"""The brightness of a mask above which a region is made anew."""


class Unreadable(ValueError):
    """A file of a sample that cannot be decoded."""

    def __init__(self, media: MediaFile, reason: str) -> None:
        super().__init__(reason)
        self.media = media


def identity_of(version: SampleVersion, encoder: str, input_name: str) -> Any:
    """What JSON can say of everything that an input of the encoder of this name depends on.

    Raises:
        ValueError: it is a control image, and the sample has none.
    """
    return _READERS[input_name.partition("_")[0]].identity(version, encoder, input_name)


def read_input(version: SampleVersion, encoder: str, input_name: str) -> Any:
    """An input of the encoder of this name, as `Encoder.encode` takes it without the batch.

    Raises:
        Unreadable: a file cannot be decoded.
    """
    return _READERS[input_name.partition("_")[0]].read(version, encoder, input_name)


def bucket_read(input_name: str, sample: Sample) -> Bucket:
    """The size at which an encoder reads one of its inputs."""
    return _control(sample, input_name).bucket if _is_control(input_name) else sample.bucket


def file_read(input_name: str, sample: Sample) -> MediaFile:
    """The file of which an encoder reads one of its inputs."""
    if input_name in (GUIDE, REGIONS):
        return _control(sample, "control").media
    return _control(sample, input_name).media if _is_control(input_name) else sample.media


def control_names(count: int) -> tuple[str, ...]:
    """The inputs that are a sample's first control images, as many as `count`."""
    return tuple(f"control_{number}" if number > 1 else "control" for number in range(1, count + 1))


def with_opacity(control: str) -> str:
    """The input that is the control image "control", "control_2" ... with its opacity."""
    return control.replace("control", CONTROL_RGBA)


def as_clip(control: str) -> str:
    """The input that is the control "control", "control_2" ... with all frames that are read of it."""
    return control.replace("control", CONTROL_CLIP)


def _is_control(input_name: str) -> bool:
    return input_name.startswith("control")


def _control(sample: Sample, input_name: str) -> Control:
    """The control image that "control", "control_2" ... mean, also with opacity or as a clip."""
    number = int(input_name.partition("_")[2] or 1)
    if number > len(sample.controls):
        raise ValueError(
            f"{sample.media.locator}: this model reads {number} control image(s) and this file has "
            f"{len(sample.controls)}; set `control_path`"
        )
    return sample.controls[number - 1]


class _Reader(NamedTuple):
    """How one of the encoders' inputs is identified and read: functions of (version, encoder's name, input's name)."""

    identity: Callable[[SampleVersion, str, str], Any]
    read: Callable[[SampleVersion, str, str], Any]


def _load(media: MediaFile, load: Callable[..., torch.Tensor], *how: Any) -> torch.Tensor:
    try:
        return load(media.locator.source, *how)
    except MediaError as error:
        raise Unreadable(media, str(error)) from error


def _pixels_identity(version: SampleVersion, name: str, input_name: str) -> list[Any]:
    sample, take = version.sample, version.take
    time_ = [sample.bucket.frames, take.start, sample.fps] if sample.fps else []
    return [TRANSFORM, sample.media.digest, *take.view(sample.bucket).identity, *time_]


def _pixels(version: SampleVersion, name: str, input_name: str) -> torch.Tensor:
    sample, take = version.sample, version.take
    how = take.view(sample.bucket), take.start, sample.bucket.frames, sample.fps or 1.0
    return _load(sample.media, load_clip, *how)


def _size_and_crop_numbers(version: SampleVersion, name: str, input_name: str) -> list[int]:
    media, view = version.sample.media, version.take.plain_view(version.sample.bucket)
    left, top, right, _ = view.box(media.width, media.height)
    scale = view.width / (right - left)
    # In a mirrored picture the crop was on the other side.
    left = media.width - right if view.flip else left
    return [media.height, media.width, round(top * scale), round(left * scale), view.height, view.width]


def _size_and_crop(version: SampleVersion, name: str, input_name: str) -> torch.Tensor:
    return torch.tensor(_size_and_crop_numbers(version, name, input_name), dtype=torch.float32)


def _mask_identity(version: SampleVersion, name: str, input_name: str) -> list[Any]:
    sample, take, mask = version.sample, version.take, version.sample.mask
    time_ = [sample.bucket.frames, take.start, sample.fps] if sample.fps else []
    return [TRANSFORM, mask.media.digest, mask.is_alpha, *version.mask_view.identity, *time_]


def _mask(version: SampleVersion, name: str, input_name: str) -> torch.Tensor:
    sample, take, mask = version.sample, version.take, version.sample.mask
    how = version.mask_view, take.start, sample.bucket.frames, sample.fps or 1.0
    return _load(mask.media, load_alpha if mask.is_alpha else load_mask, *how)


def _control_identity(version: SampleVersion, name: str, input_name: str) -> list[Any]:
    control, how = _control(version.sample, input_name), input_name.partition("_")[0]
    frames = control.bucket.frames if how == CONTROL_CLIP else 1
    time_ = [frames, version.sample.fps] if frames > 1 else []
    kind = [how] if how == CONTROL_RGBA else []
    return [*kind, TRANSFORM, control.media.digest, *version.control_view(control).identity, *time_]


def _control_pixels(version: SampleVersion, name: str, input_name: str) -> torch.Tensor:
    control, how = _control(version.sample, input_name), input_name.partition("_")[0]
    view = version.control_view(control)
    if how == CONTROL_CLIP:
        return _load(control.media, load_clip, view, 0.0, control.bucket.frames, version.sample.fps or 1.0)
    return _load(control.media, load_rgba if how == CONTROL_RGBA else load_image, view)


def _ends_identity(version: SampleVersion, name: str, input_name: str) -> list[Any]:
    lasts = (control.media.digest for control in version.sample.controls)
    return [ENDS, *_pixels_identity(version, name, input_name), *lasts]


def _ends(version: SampleVersion, name: str, input_name: str) -> torch.Tensor:
    pixels_CFHW = _pixels(version, name, input_name)
    for control in version.sample.controls:
        # In its own shape, cropped to that of the clip as the first picture is.
        pixels_CFHW[:, -1:] = _load(control.media, load_image, version.take.view(control.bucket))
    return pixels_CFHW


def _guide_view(version: SampleVersion) -> View:
    """Where the sample's clip is cropped, whatever is done to other control images."""
    control = _control(version.sample, "control")
    return version.take.plain_view(control.bucket, control.media, version.sample.media)


def _guide_identity(version: SampleVersion, name: str, input_name: str) -> list[Any]:
    sample, digest = version.sample, _control(version.sample, "control").media.digest
    time_ = [sample.bucket.frames, version.take.start, sample.fps] if sample.fps else []
    return [TRANSFORM, GUIDE, digest, *_guide_view(version).identity, *time_]


def _guide(version: SampleVersion, name: str, input_name: str) -> torch.Tensor:
    sample, media = version.sample, _control(version.sample, "control").media
    return _load(media, load_clip, _guide_view(version), version.take.start, sample.bucket.frames, sample.fps or 1.0)


def regions_of(version: SampleVersion) -> torch.Tensor:
    """The clip that a sample follows, `regions_4FHW`, the fourth channel of which is 1 where it is made anew: where the
    mask is brighter than grey, or everywhere if there is none; elsewhere it is 0, and kept.

    Raises:
        Unreadable: a file cannot be decoded.
    """
    return _regions(version, REGIONS, REGIONS)


def _follows_itself(sample: Sample) -> bool:
    """Whether what is followed is the sample's own file, which shows what is to be made anew."""
    return sample.media is not None and _control(sample, "control").media.digest == sample.media.digest


def _regions_identity(version: SampleVersion, name: str, input_name: str) -> list[Any]:
    mask = _mask_identity(version, name, input_name) if version.sample.mask else []
    return [REGIONS, *_guide_identity(version, name, input_name), _follows_itself(version.sample), *mask]


def _regions(version: SampleVersion, name: str, input_name: str) -> torch.Tensor:
    guide_CFHW = _guide(version, name, input_name)
    region_1FHW = torch.ones_like(guide_CFHW[:1])
    if version.sample.mask is not None:
        region_1FHW = (_mask(version, name, input_name) > HALF).float()
    if _follows_itself(version.sample):
        # Grey, as in inference, which has nothing to show there.
        guide_CFHW = guide_CFHW * (1 - region_1FHW)
    return torch.cat([guide_CFHW, region_1FHW])


def _rgba_identity(version: SampleVersion, name: str, input_name: str) -> list[Any]:
    return [TRANSFORM, "rgba", version.sample.media.digest, *version.take.view(version.sample.bucket).identity]


def _rgba(version: SampleVersion, name: str, input_name: str) -> torch.Tensor:
    return _load(version.sample.media, load_rgba, version.take.view(version.sample.bucket))


def _layers_identity(version: SampleVersion, name: str, input_name: str) -> list[Any]:
    return [*_rgba_identity(version, name, input_name), *(control.media.digest for control in version.sample.controls)]


def _layers(version: SampleVersion, name: str, input_name: str) -> torch.Tensor:
    # Colours change as in the picture, since the layers have to add up to it.
    view = version.take.view(version.sample.bucket)
    files = [version.sample.media, *(control.media for control in version.sample.controls)]
    return torch.cat([_load(file, load_rgba, view) for file in files], dim=1)


def _caption(version: SampleVersion, name: str, input_name: str) -> str:
    caption = version.caption_for(name)
    return without_weights(caption) if version.sample.rules.weighted_tags else caption


def _weighted_caption(version: SampleVersion, name: str, input_name: str) -> list[tuple[str, float]]:
    caption = version.caption_for(name)
    return weighted(caption) if version.sample.rules.weighted_tags else [(caption, 1.0)]


def _weights_identity(version: SampleVersion, name: str, input_name: str) -> str | list[tuple[str, float]]:
    pieces = _weighted_caption(version, name, input_name)
    # A caption without weights has the identity that it has for an encoder of plain captions.
    return pieces[0][0] if len(pieces) == 1 and pieces[0][1] == 1 else pieces


TEXT = frozenset({"caption", "weighted_caption"})
_READERS: dict[str, _Reader] = {
    "pixels": _Reader(_pixels_identity, _pixels),
    ENDS: _Reader(_ends_identity, _ends),
    GUIDE: _Reader(_guide_identity, _guide),
    REGIONS: _Reader(_regions_identity, _regions),
    "rgba": _Reader(_rgba_identity, _rgba),
    "layers": _Reader(_layers_identity, _layers),
    "size": _Reader(_size_and_crop_numbers, _size_and_crop),
    "mask": _Reader(_mask_identity, _mask),
    **dict.fromkeys(("control", CONTROL_RGBA, CONTROL_CLIP), _Reader(_control_identity, _control_pixels)),
    "caption": _Reader(_caption, _caption),
    "weighted": _Reader(_weights_identity, _weighted_caption),
}
