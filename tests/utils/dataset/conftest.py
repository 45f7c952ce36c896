"""Folders of pictures, and encoders small enough to be checked by hand."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from utils.dataset.buckets import MediaFacts, assign
from utils.dataset.manifest import scan
from utils.settings.schema import DatasetSettings, DirectorySettings

FACTS = MediaFacts(spatial=16)


def draw_pictures(folder: Path, count: int, size=(48, 32), captions=True, seed=0) -> list[Path]:
    """Writes pictures of one random colour each, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    paths = [folder / f"{index:03d}.png" for index in range(count)]
    for path in paths:
        Image.new("RGB", size, tuple(draw.randrange(256) for _ in range(3))).save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"picture {path.stem}\n")
    return paths


def dataset_of(*folders: Path, **keys) -> DatasetSettings:
    """A dataset file's settings; `keys` are those of the file."""
    directories = [DirectorySettings(path=folder) for folder in folders]
    return DatasetSettings(**{"resolutions": [32], **keys}, directory=directories)


def samples_of(dataset: DatasetSettings, index: Path):
    """What the dataset gives to train on, all of it usable."""
    manifest = scan(dataset, index, "dataset.toml")
    assert not manifest.problems
    return assign(manifest, dataset, FACTS)


class MeanEncoder:
    """A true encoder of a kind: the mean colour of a picture, as its VAE; it counts what it is asked for."""

    name = "vae"
    reads = ("pixels",)

    def __init__(self, fingerprint: str = "mean-1") -> None:
        self.fingerprint = fingerprint
        self.loads, self.unloads, self.batches = 0, 0, []

    def load(self, device: torch.device) -> None:
        self.loads += 1

    def unload(self) -> None:
        self.unloads += 1

    def encode(self, *, pixels):
        assert self.loads == self.unloads + 1
        self.batches.append(tuple(pixels.shape))
        return {"mean_BC": pixels.mean(dim=(2, 3, 4)), "size_B": torch.full((len(pixels),), pixels.shape[-1])}

    def item_bytes(self, bucket) -> int:
        return 24


class LengthEncoder(MeanEncoder):
    """The lengths of captions, as their text encoder."""

    name = "text"
    reads = ("caption",)

    def encode(self, *, caption):
        self.batches.append((len(caption),))
        return {"length_B": torch.tensor([len(text) for text in caption])}


class DifferenceEncoder(MeanEncoder):
    """The mean difference of a picture and its control image."""

    name = "edit"
    reads = ("pixels", "control")

    def encode(self, *, pixels, control):
        return {"difference_BC": (pixels - control).mean(dim=(2, 3, 4))}


@pytest.fixture
def pictures(tmp_path):
    """A folder of six captioned pictures."""
    draw_pictures(tmp_path / "pictures", 6)
    return tmp_path / "pictures"
