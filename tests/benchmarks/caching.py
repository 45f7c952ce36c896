"""The cache's filling: scans of many files, how busy the encoder is kept, and text at its true length.

Files are hard links to a few pictures, so that the first scan reads each from memory: on a disk the second scan, which
reads none, gains more. The encoder is a stand-in that takes the time of a GPU and none of the CPU.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.dataset.buckets import MediaFacts, assign
from utils.dataset.encoding import CacheJob, fill
from utils.dataset.manifest import Scan, scan
from utils.dataset.samples import Bucket
from utils.dataset.tensor_store import TensorStore
from utils.media.writing import write_clip
from utils.ranks import Ranks
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings

FILES = 100_000
MODELS = 50
PICTURES, CLIPS = 96, 24
SECONDS_PER_MEGAPIXEL = 0.045
"""An H200 takes about so long for a megapixel with Flux's VAE in bfloat16."""
CAPTIONS = 1000
UMT5_SHAPE_LD = (512, 4096)
MEAN_TOKENS, SPREAD = 75, 0.6
"""Captions as language models write them: 75 tokens in the middle, log-normal, most between 30 and 200."""


class StandIn:
    """An encoder that is busy as long as a GPU would be."""

    name, reads, fingerprint = "stand-in", ("pixels",), "1"

    def load(self, device: torch.device) -> None: ...

    def unload(self) -> None: ...

    def encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, _, frames, height, width = pixels.shape
        time.sleep(SECONDS_PER_MEGAPIXEL * batch * frames * height * width / 1e6)
        return {"latents": torch.zeros(batch, 16, frames, height // 8, width // 8, dtype=torch.bfloat16)}

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"latents": ((16, bucket.frames, bucket.height // 8, bucket.width // 8), torch.bfloat16)}


def measure() -> Iterator[str]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from _scans(folder)
        yield from _busy(folder)
        yield from _texts(folder)


def _scans(folder: Path) -> Iterator[str]:
    models, many = folder / "models", folder / "many"
    many.mkdir()
    _draw(models, MODELS, (1600, 1200))
    for number in range(FILES):
        os.link(models / f"{number % MODELS}.jpg", many / f"{number}.jpg")
        os.link(models / f"{number % MODELS}.txt", many / f"{number}.txt")
    data = DatasetSettings(resolutions=[512], directory=[DirectorySettings(path=many)])
    seconds = []
    for trust in (False, False, True):
        started = time.perf_counter()
        manifest = scan(data, "data.toml", Scan(folder / "files.sqlite", trust=trust))
        seconds.append(time.perf_counter() - started)
        assert len(manifest.rows) == FILES
    first, second, trusting = seconds
    yield (
        f"scan of {FILES:,} files: first {first:.1f} s, unchanged {second:.1f} s ({second / first:.3f} of it), "
        f"--trust_cache {trusting:.1f} s"
    )


def _busy(folder: Path) -> Iterator[str]:
    pictures, clips = folder / "pictures", folder / "clips"
    _draw(pictures, PICTURES, (1600, 1200))
    clips.mkdir()
    moving = torch.rand(3, 48, 360, 640, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for number in range(CLIPS):
        write_clip(moving.roll(number, -1), 24, clips / f"{number}.mp4")
        (clips / f"{number}.txt").write_text("a clip")
    cases = {
        "pictures of 1600x1200 at 1024": (pictures, DatasetSettings(resolutions=[1024], directory=[_of(pictures)])),
        "clips of 640x360 at 256, 33 frames": (
            clips,
            DatasetSettings(resolutions=[256], frame_buckets=[33], directory=[_of(clips)]),
        ),
    }
    for name, (source, data) in cases.items():
        manifest = scan(data, "data.toml", Scan(source / "files.sqlite"))
        samples = assign(manifest.rows, data, MediaFacts(16, 4, 81, 16.0)).samples
        report = fill(StandIn(), samples, CacheJob(source / "cache", source, Ranks(), batch_size=4))
        yield f"{name}, {len(os.sched_getaffinity(0))} cores: encoder busy {report.busy:.0%}"


def _texts(folder: Path) -> Iterator[str]:
    draw = random.Random(0)
    longest, width = UMT5_SHAPE_LD
    lengths = [max(8, min(longest, round(draw.lognormvariate(np.log(MEAN_TOKENS), SPREAD)))) for _ in range(CAPTIONS)]
    with TensorStore(folder / "true", "a") as store:
        for number, length in enumerate(lengths):
            store.put(str(number), {"umt5": torch.zeros(length, width, dtype=torch.bfloat16)})
        store.flush()
        true = store.stats().bytes
    with TensorStore(folder / "padded", "a") as store:
        store.put("0", {"umt5": torch.zeros(longest, width, dtype=torch.bfloat16)})
        store.flush()
        padded = store.stats().bytes * CAPTIONS
    yield (
        f"{CAPTIONS} captions (median {statistics.median(lengths):.0f} tokens) of a UMT5 of {width} x {longest}: "
        f"{true / 1e6:.0f} MB at true length, {padded / 1e6:.0f} MB padded ({true / padded:.3f} of it)"
    )


def _of(folder: Path) -> DirectorySettings:
    return DirectorySettings(path=folder)


def _draw(folder: Path, count: int, size: tuple[int, int]) -> None:
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=92)
        (folder / f"{number}.txt").write_text(f"picture number {number}")
