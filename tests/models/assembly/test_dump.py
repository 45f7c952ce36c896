"""`--dump_dataset` of clips, with encoders whose features are the pixels themselves; of pictures: test_train_data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from models.assembly.data import Data
from models.assembly.dump import _weight, dump, prepare_folder
from models.flux import FluxPipeline
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from tests.utils.dataset.conftest import CLIP_FACTS, LengthEncoder, PixelEncoder, draw_pictures, filled
from tests.utils.media.clips import write_video
from utils.dataset.collection import Source, collect
from utils.dataset.manifest import Scan
from utils.dataset.masks import MaskEncoder
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.signals import StopRequested
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings


class Autoencoder(PixelEncoder):
    """A VAE of pictures and clips that loses nothing."""

    def decode(self, latents):
        return latents if latents.dim() == 5 else latents[:, :, None]


class Captions(LengthEncoder):
    """A text encoder of letters, of which it reads eight."""

    token_limit = 8

    def token_count(self, caption: str) -> int:
        return len(caption)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clip of 20 frames and a picture, both with a mask; the left half of the clip's counts."""
    draw_pictures(tmp_path / "data", 1, size=(64, 48))
    write_video(tmp_path / "data" / "clip.mp4", frames=20, fps=16)
    (tmp_path / "data" / "clip.txt").write_text("moving")
    (tmp_path / "masks").mkdir()
    Image.new("L", (64, 48), 255).save(tmp_path / "masks" / "000.png")
    half = Image.new("L", (64, 48), 0)
    half.paste(255, (0, 0, 32, 48))
    half.save(tmp_path / "masks" / "clip.png")
    return tmp_path


def data_of(folder: Path, **keys: Any) -> Data:
    keys = keys or {"unmasked_weight": 0.5}
    directory = DirectorySettings(path=folder / "data", mask_path=folder / "masks", **keys)
    of_all = {"resolutions": [(64, 48)], "frame_buckets": [9], "video_clip_mode": "chunks"}
    source = Source("train", folder / "train.toml", DatasetSettings(**of_all, directory=[directory]))
    cache = folder / "cache"
    (training,) = collect([source], CLIP_FACTS, Scan(cache / "files.sqlite"))
    encoders = [Autoencoder(), Captions(), MaskEncoder(lambda width, height, frames: (3, frames, height, width))]
    # The stand-in keeps every frame: so must the mask.
    for encoder in encoders:
        filled(encoder, training.samples, cache)
    return Data(training, [], encoders, [], cache, None)


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def stop():
    raise StopRequested


def test_clips_are_shown_as_clips(folder):
    pipeline = tiny_flux.pipeline(tiny_flux.MINI_FLUX)
    dumped = settings_of(pipeline), pipeline, data_of(folder), Ranks(), folder / "shown"
    with pytest.raises(StopRequested):
        dump(*dumped, raise_if_stopping=stop)
    page = dump(*dumped, raise_if_stopping=lambda: None)
    samples = page.read_text().split('<div class="sample">')[1:]
    assert len(samples) == 3
    picture, first, second = samples
    assert '<video src="' not in picture and "64x48x1" in picture and "11, cut off after 8" in picture
    for number, (sample, start) in enumerate(((first, "0.00"), (second, "0.56")), start=1):
        assert f"16 fps from {start} s" in sample and "6 of 8" in sample
        shown = {
            what: frames_of(folder / "shown" / file)
            for file, what in re.findall(r'<video src="([^"]+)".*?<figcaption>([^<]*)', sample)
        }
        (said,) = shown.keys() - {"source", "decoded"}
        assert said.startswith("weight of the loss: white is 1, mean ") and said.endswith("largest 1")
        assert all(len(frames) == 9 for frames in shown.values())
        original = frames_of(folder / "data" / "clip.mp4")[9 * (number - 1) :][:9]
        for what in ("source", "decoded"):
            assert np.abs(shown[what].astype(int) - original).mean() < 4
        weight = shown[said]
        assert weight[:, :, :30].min() > 250 and abs(int(np.median(weight[:, :, 34:])) - 128) <= 2


class Keeping(FluxPipeline):
    """A model whose masks say what is kept of the clip that it follows."""

    masks_weigh = False


def test_what_is_kept_is_shown_as_the_model_sees_it(folder):
    """Of clips that follow themselves, grey where they are made anew."""
    pipeline = Keeping(tiny_flux.pipeline(tiny_flux.MINI_FLUX).options)
    data = data_of(folder, control_path=folder / "data")
    page = dump(settings_of(pipeline), pipeline, data, Ranks(), folder / "shown", raise_if_stopping=lambda: None)
    _, picture, *clips = page.read_text().split('<div class="sample">')
    assert "control1.png" in picture and "white is made anew, 100%; black is kept" in picture
    assert all("white is made anew, 50%; black is kept" in sample for sample in clips)
    original = frames_of(folder / "data" / "clip.mp4")[9:18].astype(int)
    control, mask = (frames_of(folder / "shown" / "train" / f"000002_{name}.mp4") for name in ("control1", "mask"))
    assert mask[:, :, :30].min() > 250 and mask[:, :, 34:].max() < 5
    assert np.abs(control[:, :, 34:] - original[:, :, 34:]).mean() < 4
    assert np.abs(control[:, :, :30].astype(int) - 127).max() <= 4


def test_a_folder_that_cannot_be_written_to_is_told(folder):
    (folder / "file").write_text("")
    with pytest.raises(UserError, match="--dump_dataset: .*file cannot be made or written to"):
        prepare_folder(folder / "file")


@pytest.mark.parametrize(("weight", "grey"), [(0.0, -1.0), (1 / 255, 2 / 255 - 1), (0.5, 0.0), (1.0, 1.0), (3.0, 1.0)])
def test_weights_are_shown_as_they_are(weight: float, grey: float):
    shown = _weight(torch.full((1, 4, 4), weight), torch.zeros(3, 1, 32, 32))
    assert shown.shape == (3, 1, 32, 32) and torch.allclose(shown, torch.tensor(grey))
