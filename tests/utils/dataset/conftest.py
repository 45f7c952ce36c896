"""Folders of pictures, and encoders small enough to be checked by hand."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from utils.dataset.buckets import MediaFacts, assign
from utils.dataset.encoders import item_key
from utils.dataset.encoding import CacheJob, fill
from utils.dataset.manifest import Scan, scan
from utils.dataset.samples import Bucket, MediaFile, Sample, Take
from utils.dataset.sources import Locator
from utils.dataset.tensor_store import TensorStore
from utils.ranks import Ranks
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings

FACTS = MediaFacts(spatial=16)
SQUARE = Bucket(64, 64, 1)
CLIP_FACTS = MediaFacts(spatial=16, temporal=4, max_frames=81, fps=16.0)


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


def scanned(dataset: DatasetSettings, cache: Path, **how):
    return scan(dataset, "dataset.toml", Scan(cache / "files.sqlite", **how))


def samples_of(dataset: DatasetSettings, cache: Path, facts: MediaFacts = FACTS) -> list[Sample]:
    """What the dataset gives to train on, all of it usable."""
    manifest = scanned(dataset, cache)
    assert manifest.problems == [] and manifest.rejected == []
    chosen = assign(manifest.rows, dataset, facts)
    assert chosen.left_out == []
    return chosen.samples


def plain_sample(name: str = "a", bucket: Bucket = SQUARE, repeats: float = 1.0, **parts) -> Sample:
    """A sample of a file that is not there; keys that no sample has are its directory's."""
    own = {key: parts.pop(key) for key in ("takes", "captions", "controls", "mask", "fps") if key in parts}
    media = MediaFile(Locator(f"/data/{name}.png"), f"{name:0<32}"[:32], 64, 64, bucket.frames)
    defaults = {"takes": (Take(),), "captions": (f"caption {name}",), "controls": (), "mask": None, "fps": 0.0}
    rules = DirectorySettings(path=Path("/data"), **parts)
    return Sample(id=name, media=media, bucket=bucket, repeats=repeats, rules=rules, **{**defaults, **own})


class MeanEncoder:
    """A true encoder of a kind: the mean colour of a picture or clip, as its VAE; it counts what it is asked for."""

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

    def feature_shapes(self, bucket: Bucket):
        return {"mean_BC": ((3,), torch.float32), "size_B": ((), torch.int64)}


class PixelEncoder(MeanEncoder):
    """The pixels themselves, as `latents`; of stills without frames, as VAEs of pictures have them."""

    def encode(self, *, pixels):
        return {"latents": pixels.squeeze(2) if pixels.shape[2] == 1 else pixels}


class LengthEncoder(MeanEncoder):
    """The lengths of captions, as their text encoder."""

    name = "text"
    reads = ("caption",)

    def encode(self, *, caption):
        self.batches.append((len(caption),))
        return {"length_B": torch.tensor([len(text) for text in caption])}


class WordsEncoder(LengthEncoder):
    """A row for each word, of its letters, and a mask of ones: features that are as long as their caption."""

    name = "words"

    def encode(self, *, caption):
        self.batches.append((len(caption),))
        lengths = [torch.tensor([float(len(word)) for word in text.split()]) for text in caption]
        return {
            "words_BLD": [length[:, None].expand(-1, 3) for length in lengths],
            "mask_BL": [torch.ones(len(length), dtype=torch.bool) for length in lengths],
        }


class WeightEncoder(LengthEncoder):
    """The sum of the weights of a caption's letters."""

    name = "weights"
    reads = ("weighted_caption",)

    def encode(self, *, weighted_caption):
        return {"weight_B": torch.tensor([sum(len(t) * w for t, w in pieces) for pieces in weighted_caption])}


class DifferenceEncoder(MeanEncoder):
    """The mean difference of a picture and its control image."""

    name = "edit"
    reads = ("pixels", "control")

    def encode(self, *, pixels, control):
        return {"difference_BC": (pixels - control).mean(dim=(2, 3, 4))}


class InstructionEncoder(MeanEncoder):
    """A text encoder that sees the control image too."""

    name = "instruction"
    reads = ("control", "caption")

    def encode(self, *, control, caption):
        lengths = torch.tensor([float(len(text)) for text in caption])
        return {"instruction_BC": control.mean(dim=(2, 3, 4)) + lengths[:, None]}


@pytest.fixture
def pictures(tmp_path):
    """A folder of six captioned pictures."""
    draw_pictures(tmp_path / "pictures", 6)
    return tmp_path / "pictures"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def filled(encoder, samples, cache: Path, batch_size=4, **how):
    """The report of filling the cache with what one encoder makes, by a single process."""
    cache.mkdir(exist_ok=True)
    return fill(encoder, samples, CacheJob(cache, cache / "run.toml", Ranks(), batch_size, **how))


def counts(report) -> tuple[int, int, int, int]:
    return report.wanted, report.reused, report.encoded, report.failed


def item(cache: Path, encoder, version) -> dict[str, torch.Tensor]:
    """What the cache has of an encoder."""
    with TensorStore(cache / encoder.name) as store:
        return store.get(item_key(encoder, version))


def truncate(path: Path) -> None:
    """Leaves of a picture so much that its size can be read, and its pixels cannot."""
    path.write_bytes(path.read_bytes()[:60])
