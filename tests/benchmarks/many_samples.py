"""Starts with very many pictures whose cache is filled: what each phase costs up to the first batch, when the files are
looked at one by one, and when it is remembered what they came to.

No picture is drawn and nothing is encoded. Files are hard links to a few; the index of the files and the stores are
written as a run with an encoder of pictures and two of captions would have left them.
"""

from __future__ import annotations

import hashlib
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from utils.dataset.batches import SampleReader, TrainingBatches
from utils.dataset.buckets import MediaFacts
from utils.dataset.collecting import collect_together
from utils.dataset.collection import Source
from utils.dataset.encoders import item_key, versions
from utils.dataset.encoding import CacheJob, fill, reclaim_unwanted
from utils.dataset.epochs import Epochs
from utils.dataset.file_index import opened_index
from utils.dataset.found_before import SETTLED_SECONDS
from utils.dataset.manifest import COLUMNS, PLACES, Scan
from utils.dataset.samples import Bucket, VersionPicker
from utils.dataset.store_index import Extent
from utils.dataset.tensor_store import TensorStore
from utils.ranks import Ranks
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings

FILES = int(os.environ.get("FILES", "100000"))
SHARED = 50
"""So many files have all the names; a file can have some ten thousand."""
SIZES = [(1600, 1200), (1200, 1600), (1024, 1024), (1920, 1080), (832, 1216), (1500, 700)]
PHASES = ("files and samples", "cache, three encoders", "what no run wants", "epochs", "first batch")


class Encoder:
    """An encoder that has nothing to do."""

    fingerprint = "1"

    def __init__(self, name: str, reads: str) -> None:
        self.name, self.reads = name, (reads,)

    def load(self, device: torch.device) -> None: ...

    def unload(self) -> None: ...

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        raise AssertionError("everything is in the cache")

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {self.name: ((1,), torch.float32)}


ENCODERS = [Encoder("vae", "pixels"), Encoder("clip", "caption"), Encoder("t5", "caption")]


def measure() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = _files(folder)
        _stores(folder, data)
        time.sleep(2 * SETTLED_SECONDS)
        for start in ("first", "second"):
            seconds = _start(folder, data)
            yield from (f"{start} start, {phase}: {took:.2f} s" for phase, took in zip(PHASES, seconds, strict=True))
            total = sum(seconds)
            yield f"{start} start: {total:.1f} s for {FILES:,} samples, {1e6 * total / FILES:.1f} s for a million"
    yield f"the whole process at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"


def _start(folder: Path, data: DatasetSettings) -> list[float]:
    """The seconds of processor time of each phase."""
    times = [time.process_time()]
    (collection,) = _collect(folder, data)
    times.append(time.process_time())
    job = CacheJob(folder / "cache", folder / "run.toml", Ranks())
    for encoder in ENCODERS:
        report = fill(encoder, collection.samples, job, identity=collection.identity)
        assert report.reused == report.wanted and report.wanted, report
    times.append(time.process_time())
    reclaim_unwanted([encoder.name for encoder in ENCODERS], job)
    times.append(time.process_time())
    epochs = Epochs(collection.samples, lambda bucket: 4, 1, 1, 0)
    epochs.table()
    times.append(time.process_time())
    with SampleReader(ENCODERS, folder / "cache") as reader:
        picker = VersionPicker(0, ["clip", "t5"])
        batches = TrainingBatches(epochs, reader, picker, lambda batch, epoch: batch, 0)
        assert len(batches.step(0, 0)[0].draws) == 4
    times.append(time.process_time())
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def _collect(folder: Path, data: DatasetSettings) -> list:
    source = Source("train", folder / "data.toml", data)
    return collect_together(Ranks(), [source], MediaFacts(16), Scan(folder / "cache" / "files.sqlite"))


def _files(folder: Path) -> DatasetSettings:
    """Pictures with captions beside them, which the index of the files knows."""
    shared, many = folder / "shared", folder / "pictures"
    for path in (shared, many, folder / "cache"):
        path.mkdir()
    (folder / "run.toml").touch()
    for number in range(SHARED):
        Image.new("RGB", (8, 8)).save(shared / f"{number}.png")
    stamps = [(shared / f"{number}.png").stat() for number in range(SHARED)]
    rows = []
    for number in range(FILES):
        picture, stamp = many / f"{number}.png", stamps[number % SHARED]
        os.link(shared / f"{number % SHARED}.png", picture)
        (many / f"{number}.txt").write_text(f"picture number {number} of many, which a sentence or two describe")
        digest = hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()
        known = stamp.st_size, stamp.st_mtime_ns, digest, *SIZES[number % len(SIZES)], 1, 0.0, "", ""
        rows.append((str(picture), "", *known))
    with opened_index(folder / "cache" / "files.sqlite") as index:
        index.executemany(f"INSERT INTO media ({COLUMNS}) VALUES ({PLACES})", rows)
        index.commit()
    return DatasetSettings(resolutions=[512], directory=[DirectorySettings(path=many)])


def _stores(folder: Path, data: DatasetSettings) -> None:
    """An item for everything that the samples want, all of them one item on disk."""
    (collection,) = _collect(folder, data)
    for encoder in ENCODERS:
        keys = {item_key(encoder, version) for sample in collection.samples for version in versions(encoder, sample)}
        with TensorStore(folder / "cache" / encoder.name, "writer") as store:
            store.put("one", {encoder.name: torch.zeros(1)})
            store.flush()
            place = store._index.extent("one")
            store._index.add(dict.fromkeys(keys, Extent(*place)))
            store.delete(["one"])
