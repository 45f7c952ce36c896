"""`--dump_dataset`: shows what the trainer will see: decoded latents, masks, controls, captions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch.nn import functional

from models.assembly.data import Data, reader_of
from models.assembly.noising import clean_latents
from models.base import BasePipeline
from utils.dataset.batches import SampleReader
from utils.dataset.collection import Collection
from utils.dataset.encoders import Encoder, reads_text, text_of
from utils.dataset.inputs import TEXT, regions_of
from utils.dataset.samples import (
    MediaFile,
    SampleVersion,
    VersionPicker,
    appearances_before,
    evaluation_version,
    repeat_phase,
)
from utils.errors import UserError
from utils.media.decode import load_clip
from utils.media.geometry import View
from utils.media.writing import tensor_to_image, write_clip
from utils.progress_bar import progress_bar
from utils.ranks import Ranks
from utils.run.dataset_page import PAGE_NAME, PageEntry, write_page
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

SOURCE_SIDE = 512


def dump(
    settings: Settings,
    pipeline: BasePipeline,
    data: Data,
    ranks: Ranks,
    folder: Path,
    raise_if_stopping: Callable[[], None],
) -> Path:
    """Writes the first epoch of the training set, and the evaluation sets, into `folder`, which `prepare_folder` has
    made. Returns the page to open. `raise_if_stopping` is called before each sample; an exception ends the work.

    The model's own VAE decodes the latents, so the pictures show its losses too.
    """
    names = [encoder.name for encoder in data.encoders if reads_text(encoder)]
    picker = VersionPicker(settings.seed, names, fresh_captions=bool(data.live))
    autoencoder = data.encoders[0]
    version = [
        (collection.source.name, one)
        for collection in (data.training, *data.evaluation)
        for one in _first_epoch(collection, picker, is_training=collection is data.training)
    ]
    seen = []
    autoencoder.load(ranks.device)
    with reader_of(data, ranks) as reader, progress_bar(len(version), "dump", active=True) as bar:
        for number, (name, one) in enumerate(version):
            raise_if_stopping()
            pictures = _pictures(one, f"{name}/{number:06d}", pipeline, reader, autoencoder, folder)
            seen.append(PageEntry(one.caption, pictures, _facts(one, name, data.encoders)))
            bar.update()
    autoencoder.unload()
    page = write_page(folder, f"{settings.dataset.stem}, as {settings.model.type} sees it", _summary(data), seen)
    logger.info("dataset: %s", page)
    return page


def prepare_folder(folder: Path) -> None:
    """Makes the folder of a dump, before the hours that caching may take.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The page of an earlier dump must not be mistaken for a part of this one.
        (folder / PAGE_NAME).unlink(missing_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"{folder} cannot be made or written to ({error.strerror}); name another folder"
        raise UserError.of(what, where="--dump_dataset") from error


def _first_epoch(collection: Collection, picker: VersionPicker, *, is_training: bool) -> Iterator[SampleVersion]:
    """Every sample as often as the first epoch uses it, and once if the first epoch does not use it."""
    for sample in collection.samples:
        if not is_training:
            yield evaluation_version(sample)
            continue
        times = int(appearances_before(sample.repeats, repeat_phase(sample, picker.seed), epoch=1))
        yield from (picker.pick(sample, 0, copy) for copy in range(max(1, times)))


def _pictures(
    version: SampleVersion, name: str, pipeline: BasePipeline, reader: SampleReader, autoencoder: Encoder, folder: Path
) -> dict[str, str]:
    """Writes the pictures of a sample; returns their files by role."""
    sample = version.sample
    batch = reader.batch([version])
    latents = clean_latents(batch.features, torch.zeros)
    decoded_CFHW = autoencoder.decode(latents.to(pipeline.dtype))[0].float().cpu()
    pictures = {
        "source": _written(
            _source(sample.media, version.take.start, sample.fps, sample.bucket.frames),
            sample.fps,
            folder,
            f"{name}_source",
        ),
        "decoded": _written(decoded_CFHW, sample.fps, folder, name),
    }
    for index, control in enumerate(sample.controls):
        if index == 0 and not pipeline.masks_weigh:
            guide_CFHW, region_1FHW = regions_of(version).split([3, 1])
            pictures["control 1"] = _written(guide_CFHW, sample.fps, folder, f"{name}_control1")
            said = f"white is made anew, {region_1FHW.mean():.0%}; black is kept"
            pictures[said] = _written(_grey(region_1FHW), sample.fps, folder, f"{name}_mask")
            continue
        pixels = load_clip(control.media.locator.source, version.control_view(control), 0.0, 1, 1.0)
        pictures[f"control {index + 1}"] = _written(pixels, 0.0, folder, f"{name}_control{index + 1}")
    if sample.mask and pipeline.masks_weigh:
        weight = batch.weight[0]
        said = f"weight of the loss: white is 1, mean {weight.mean():.3g}, largest {weight.max():.3g}"
        pictures[said] = _written(_weight(weight, decoded_CFHW), sample.fps, folder, f"{name}_mask")
    return pictures


def _source(media: MediaFile, start: float, fps: float, frames: int) -> torch.Tensor:
    """The file scaled down, with all of each frame."""
    scale = min(1.0, SOURCE_SIDE / max(media.width, media.height))
    view = View(max(2, round(media.width * scale)), max(2, round(media.height * scale)), "none")
    return load_clip(media.locator.source, view, start, frames, fps or 1.0)


def _weight(weight: torch.Tensor, like_CFHW: torch.Tensor) -> torch.Tensor:
    """The loss weight (1, h, w) or (1, f, h, w) as grey pixels, white where it is 1 or more."""
    # Scaled by its largest value, a mask that trains next to nothing would look like a sound one.
    weight_FHW = weight.reshape(-1, *weight.shape[-2:]).clamp(0, 1)
    grown = functional.interpolate(weight_FHW[None, None], size=like_CFHW.shape[1:], mode="nearest")[0]
    return _grey(grown)


def _grey(levels_1FHW: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1] as grey pixels."""
    return (2 * levels_1FHW - 1).expand(3, -1, -1, -1)


def _written(pixels_CFHW: torch.Tensor, fps: float, folder: Path, name: str) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if pixels_CFHW.shape[1] > 1:
        write_clip(pixels_CFHW, fps, folder / f"{name}.mp4")
        return f"{name}.mp4"
    tensor_to_image(pixels_CFHW).save(folder / f"{name}.png")
    return f"{name}.png"


def _facts(version: SampleVersion, name: str, encoders: Sequence[Encoder]) -> dict[str, str]:
    sample = version.sample
    facts = {"set": name, "file": str(sample.media.locator), "bucket": str(sample.bucket)}
    if sample.fps:
        facts["clip"] = f"{sample.fps:g} fps from {version.take.start:.2f} s"
    if version.take.flip:
        facts["flipped"] = ""
    for encoder in encoders:
        if reads_text(encoder) and hasattr(encoder, "token_count"):
            input_name = next(input_name for input_name in encoder.reads if input_name in TEXT)
            left_out = " (caption left out)" if encoder.name in version.unconditional else ""
            count, limit = encoder.token_count(text_of(version, encoder, input_name)), encoder.token_limit
            cut = f", cut off after {limit}" if count > limit else f" of {limit}"
            facts[f"{encoder.name} tokens"] = f"{count}{cut}{left_out}"
    if sample.rules.loss_weight != 1:
        facts["loss weight"] = f"{sample.rules.loss_weight:g}"
    return facts


def _summary(data: Data) -> str:
    sets = ", ".join(f"{len(c.samples)} samples of '{c.source.name}'" for c in (data.training, *data.evaluation))
    return f"{sets}. Left: the file; beside it what the VAE makes of the cached latents, which is what is trained on."
