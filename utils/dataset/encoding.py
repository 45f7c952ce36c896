"""Fills the cache: what each encoder makes of each sample, computed once and kept by what it was made from.

Shapes: B batch, C channels, F frames, H height, W width. Pixels are float32 in [-1, 1].
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from utils.dataset.buckets import Bucket, Sample
from utils.dataset.manifest import MediaFile
from utils.dataset.tensor_store import TensorStore
from utils.media.decode import MediaError, load_image
from utils.progress_bar import progress_bar
from utils.ranks import Ranks, share

logger = logging.getLogger(__name__)

# Part of every key: change it when the same file would be decoded to other pixels.
TRANSFORM = "cover, lanczos, 1"
DECODERS = 4
BATCHES_AHEAD = 2


class Encoder(Protocol):
    """A model's VAE or text encoder, as the cache sees it."""

    name: str
    """Its store's folder."""
    reads: tuple[str, ...]
    """What `encode` takes, of "pixels", "caption" and "control"."""
    fingerprint: str
    """Changes whenever its output would."""

    def load(self, device: torch.device) -> None:
        """Brings the weights to the device."""

    def unload(self) -> None:
        """Frees them."""

    def encode(self, **inputs: Any) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """Features of a batch under names that no other encoder of the model uses, each a tensor batched in dimension
        0 or a list of B tensors of different lengths. Pixels and control come as BCFHW on the CPU, captions as a list
        of B strings."""

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape, without the batch, and type of each feature of a sample; nothing is loaded for it."""


@dataclass(frozen=True)
class Failure:
    """An item that could not be made, by its key, and why; the reason names the file."""

    key: str
    reason: str


@dataclass(frozen=True)
class CacheReport:
    """What was done for one encoder, over all ranks: items wanted = reused + encoded + failed."""

    encoder: str
    wanted: int
    reused: int
    encoded: int
    failed: int
    failures: tuple[Failure, ...] = ()


def item_key(encoder: Encoder, sample: Sample) -> str:
    """The name of what the encoder makes of the sample: a hash of all that it is made from.

    Raises:
        ValueError: the encoder reads a control image and the sample has none.
    """
    parts = [encoder.name, encoder.fingerprint] + [_IDENTITIES[thing](sample) for thing in encoder.reads]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


def fill(
    encoders: Sequence[Encoder],
    samples: Sequence[Sample],
    cache_dir: Path,
    ranks: Ranks,
    batch_size: int,
    device: torch.device,
    *,
    regenerate: bool = False,
    tag: str = "cache",
    heed: Callable[[], None] = lambda: None,
) -> list[CacheReport]:
    """Encodes what the cache lacks, one encoder after the other, the work shared by all ranks; waits for all
    of them.

    Files that cannot be decoded are reported and do not stop the rest: what to do about them is the caller's
    choice.

    Args:
        regenerate: encode everything anew.
        tag: new at each call of a run, the same on all ranks.
        heed: called between two batches; what it raises ends the work, with all that is encoded kept.
    """
    reports = []
    for encoder in encoders:
        own = _fill_one(encoder, samples, cache_dir, ranks, batch_size, device, regenerate, heed)
        shared = share(ranks, f"{tag}/{encoder.name}", asdict(own), heed=heed)
        report = _total([_report(**data) for data in shared])
        if ranks.is_main:
            counts = f"reused={report.reused} encoded={report.encoded} failed={report.failed}"
            logger.info("%s %s: wanted=%d %s", tag, encoder.name, report.wanted, counts)
        reports.append(report)
    return reports


def _fill_one(
    encoder: Encoder,
    samples: Sequence[Sample],
    cache_dir: Path,
    ranks: Ranks,
    batch_size: int,
    device: torch.device,
    regenerate: bool,
    heed: Callable[[], None],
) -> CacheReport:
    """This rank's share of one encoder's work."""
    wanted = {item_key(encoder, sample): sample for sample in samples}
    # Shared by position among all that is wanted, and not among what is missing: every rank knows its share
    # without asking, whenever it looks and whatever others have already written.
    ordered = sorted(wanted, key=lambda key: _shape(encoder, wanted[key]) or ())
    mine = ordered[ranks.rank :: ranks.world_size]
    with TensorStore(cache_dir / encoder.name, f"rank{ranks.rank}") as store:
        # What is made anew replaces the old item, which another run may be reading until then.
        missing = mine if regenerate else store.missing(mine)
        failures: list[Failure] = []
        if missing:
            encoder.load(device)
            try:
                items = {key: wanted[key] for key in missing}
                failures = _encode(items, encoder, store, batch_size, ranks.is_main, heed)
            finally:
                encoder.unload()
                if device.type == "cuda":
                    # What torch keeps for itself is not there for NCCL, nor for the processes beside this one.
                    torch.cuda.empty_cache()
    reused, encoded = len(mine) - len(missing), len(missing) - len(failures)
    return CacheReport(encoder.name, len(mine), reused, encoded, len(failures), tuple(failures))


def _encode(
    items: dict[str, Sample],
    encoder: Encoder,
    store: TensorStore,
    batch_size: int,
    progress: bool,
    heed: Callable[[], None],
) -> list[Failure]:
    """Encodes the items into the store; returns what could not be decoded."""
    failures = []
    batches = list(_batches(items, encoder, batch_size))
    with (
        ThreadPoolExecutor(DECODERS) as pool,
        progress_bar(len(items), f"cache {encoder.name}", active=progress) as bar,
        torch.no_grad(),
    ):
        for batch in _decoded(batches, lambda key: _inputs(encoder, items[key]), pool):
            broken = {key: future.exception() for key, future in batch.items() if future.exception()}
            for key, error in broken.items():
                if not isinstance(error, MediaError):
                    raise error
                failures.append(Failure(key, str(error)))
            inputs = {key: future.result() for key, future in batch.items() if key not in broken}
            if inputs:
                _encode_batch(inputs, encoder, store)
            bar.update(len(batch))
            heed()
    return failures


def _encode_batch(inputs: dict[str, dict[str, Any]], encoder: Encoder, store: TensorStore) -> None:
    columns = {thing: [item[thing] for item in inputs.values()] for thing in encoder.reads}
    stacked = {thing: torch.stack(column) if thing in _MEDIA else column for thing, column in columns.items()}
    features = encoder.encode(**stacked)
    for position, key in enumerate(inputs):
        store.put(key, {name: tensors[position].cpu() for name, tensors in features.items()})


def _batches(items: dict[str, Sample], encoder: Encoder, batch_size: int) -> Iterator[list[str]]:
    """The items' keys in batches of one shape."""
    groups = defaultdict(list)
    for key, sample in items.items():
        groups[_shape(encoder, sample)].append(key)
    for keys in groups.values():
        yield from (keys[start : start + batch_size] for start in range(0, len(keys), batch_size))


def _decoded(
    batches: Iterable[list[str]], decode: Callable[[str], dict[str, Any]], pool: ThreadPoolExecutor
) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """The batches' inputs, decoded a few batches ahead of their use."""
    ahead: deque[dict[str, Future[dict[str, Any]]]] = deque()
    for batch in batches:
        ahead.append({key: pool.submit(decode, key) for key in batch})
        if len(ahead) > BATCHES_AHEAD:
            yield ahead.popleft()
    yield from ahead


def _shape(encoder: Encoder, sample: Sample) -> Bucket | None:
    """What samples must share to be encoded in one batch; captions can always be."""
    return sample.bucket if _MEDIA & set(encoder.reads) else None


def _inputs(encoder: Encoder, sample: Sample) -> dict[str, Any]:
    return {thing: _INPUTS[thing](sample) for thing in encoder.reads}


def _load(media: MediaFile, bucket: Bucket) -> torch.Tensor:
    return load_image(media.path, bucket.width, bucket.height)


def _identity(media: MediaFile, bucket: Bucket) -> list[Any]:
    return [TRANSFORM, media.digest, bucket.width, bucket.height, bucket.frames]


def _control(sample: Sample) -> MediaFile:
    if sample.control is None:
        raise ValueError(
            f"{sample.media.path}: this model reads control images and this file has none; set `control_path`"
        )
    return sample.control


_MEDIA = frozenset({"pixels", "control"})
_IDENTITIES: dict[str, Callable[[Sample], Any]] = {
    "pixels": lambda sample: _identity(sample.media, sample.bucket),
    "caption": lambda sample: sample.caption,
    "control": lambda sample: _identity(_control(sample), sample.bucket),
}
_INPUTS: dict[str, Callable[[Sample], Any]] = {
    "pixels": lambda sample: _load(sample.media, sample.bucket),
    "caption": lambda sample: sample.caption,
    "control": lambda sample: _load(_control(sample), sample.bucket),
}


def _report(failures: list[dict[str, str]], **counts: Any) -> CacheReport:
    """A report that went through JSON."""
    return CacheReport(**counts, failures=tuple(Failure(**failure) for failure in failures))


def _total(reports: Sequence[CacheReport]) -> CacheReport:
    sums = {
        name: sum(getattr(report, name) for report in reports) for name in ("wanted", "reused", "encoded", "failed")
    }
    failures = sorted((failure for report in reports for failure in report.failures), key=lambda f: f.reason)
    return CacheReport(reports[0].encoder, **sums, failures=tuple(failures))
