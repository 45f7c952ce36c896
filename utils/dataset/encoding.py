"""Fills the cache: each encoder's output for each sample is computed once, and stored under a key of its inputs.

Shapes: B batch, C channels, F frames, H height, W width. Pixels are float32 in [-1, 1].
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from utils.collector import without_collector
from utils.dataset import references
from utils.dataset.cache_lock import CacheBusy, CacheLock, unread
from utils.dataset.encoders import Encoder, decoded_bytes, inputs_of, reads_media, shape_of, wanted_by
from utils.dataset.inputs import TEXT, Unreadable
from utils.dataset.known import Known
from utils.dataset.samples import Bucket, Sample, SampleVersion
from utils.dataset.tensor_store import TensorStore
from utils.device_memory import lacking, lacks_memory, size_text
from utils.errors import UserError
from utils.media.memory import decoding_budget
from utils.progress_bar import progress_bar
from utils.ranks import PATIENCE, LaunchError, Ranks, gather, sign_of_life

logger = logging.getLogger(__name__)

DECODERS = 8
BATCHES_AHEAD = 16
BATCHES_TO_WRITE = 4
VERIFIED_AT_ONCE = 4096
SECONDS_BETWEEN_TRIES = 1.0
FOREVER = timedelta(days=365)


@dataclass(frozen=True)
class Failure:
    """A file that could not be encoded, by the hash of its content, and the reason, which names the file."""

    digest: str
    reason: str


@dataclass(frozen=True)
class CacheReport:
    """What was done for one encoder, over all ranks: items wanted = reused + encoded + failed.

    `busy` is the fraction of the time spent on encoding and not on waiting for decoded files, as the mean over the
    ranks that encoded something. `truncated` captions were longer than the encoder reads.
    """

    encoder: str
    wanted: int
    reused: int
    encoded: int
    failed: int
    busy: float = 1.0
    truncated: int = 0
    failures: tuple[Failure, ...] = ()

    def __str__(self) -> str:
        counts = f"wanted={self.wanted} reused={self.reused} encoded={self.encoded} failed={self.failed}"
        told = f" (encoding {self.busy:.0%} of the time, else waiting for files)" if self.encoded else ""
        return f"{self.encoder}: {counts}{told}" + (f", {self.truncated} captions truncated" if self.truncated else "")


@dataclass(frozen=True)
class CacheJob:
    """How the cache is filled.

    Attributes:
        cache_dir: the folder in which every encoder has its store.
        owner: the run's settings file, on whose behalf the items are wanted.
        batch_size: number of samples that an encoder takes at once.
        regenerate: encode everything again.
        verify: read all existing items, and encode damaged ones again.
        raise_if_stopping: called between two batches; an exception ends the work, and all encoded items are kept.
        patience: how long to wait for a rank that gives no sign of life.
        keep: what stays of what no run wants any more, over all stores.
        before_encoding: called on all ranks before an encoder is loaded, if something may have to be encoded.
    """

    cache_dir: Path
    owner: Path
    ranks: Ranks
    batch_size: int = 1
    regenerate: bool = False
    verify: bool = False
    raise_if_stopping: Callable[[], None] = lambda: None
    patience: timedelta = PATIENCE
    keep: references.Keep = references.Keep()
    before_encoding: Callable[[], None] = lambda: None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which no other run fills this cache: the main rank waits for the lock, the other ranks wait for
        it.

        Raises:
            LaunchError: on the other ranks, if the main rank has ended in the meantime.
        """
        # Each holder is reported once, although the lock is requested again and again.
        told = lru_cache(partial(logger.warning, "another run fills this cache, and is waited for: %s"))
        with CacheLock(self.cache_dir) as lock:
            while self.ranks.is_main:
                try:
                    lock.acquire(SECONDS_BETWEEN_TRIES, told)
                    break
                except CacheBusy:
                    self.raise_if_stopping()
            try:
                gather(self.ranks, "cache lock", None, patience=FOREVER, raise_if_stopping=self.raise_if_stopping)
                yield
            except dist.DistError as error:
                # For example because its disk is full. The main rank says why; here it is only known to be gone.
                raise LaunchError("the main process of this run has ended; what it tells is why") from error


def fill(
    encoder: Encoder, samples: Sequence[Sample], job: CacheJob, *, further: Sequence[Sample] = (), identity: str = ""
) -> CacheReport:
    """Encodes the samples that the cache lacks. All ranks share the work, and each waits for all others. Called once
    for each encoder. If the cache lacks nothing, the main rank alone computes the keys by which that is known, and not
    even that one if it was known before.

    Files that cannot be decoded are reported and do not stop the rest; the caller decides what to do about them.

    Args:
        further: a few more samples, such as prompts.
        identity: the same whenever `samples` are the same; "" if nothing is known of them.
    """
    ranks, tag = job.ranks, f"cache/{encoder.name}"
    everything = job.regenerate or job.verify
    known = Known.of(encoder, further, identity, job.cache_dir, job.owner) if ranks.is_main and not everything else None
    number = known.number() if known else None
    wanted = None
    if ranks.is_main and number is None:
        with without_collector():
            wanted = wanted_by(encoder, [*samples, *further])
        references.remember(job.cache_dir, encoder.name, job.owner, wanted)
    # To be complete is no answer where everything is to be made or read again.
    if not everything and _is_complete(wanted, number, encoder, job, tag):
        number = len(wanted or ()) if number is None else number
        own = CacheReport(encoder.name, number, number, 0, 0)
    else:
        job.before_encoding()
        own = _fill_one(encoder, wanted_by(encoder, [*samples, *further]) if wanted is None else wanted, job, tag)
    shared = gather(ranks, tag, asdict(own), job.patience, job.raise_if_stopping)
    report = _total([_report(**data) for data in shared])
    if ranks.is_main:
        logger.info("cache %s", report)
    if known and not report.failed:
        known.note(report.wanted)
    return report


def lacks(encoder: Encoder, samples: Sequence[Sample], job: CacheJob) -> bool:
    """Whether the encoder has something to encode, as far as is known without reading the cache's items."""
    return job.regenerate or not _has_all(wanted_by(encoder, samples), encoder, job)


def reclaim_unwanted(filled: Collection[str], job: CacheJob) -> None:
    """Deletes items that no run wants any more, in the stores that were `filled` and in those that this run used
    earlier and does not use now. Logs what the cache takes on disk
    then. To be called by the main rank, when all ranks have filled the cache.

    While another run reads the cache, everything is kept: that run may have been started from an earlier version of
    this run's settings file, or from a file on another machine.
    """
    dropped = references.stores_of(job.cache_dir, job.owner) - set(filled)
    for name in dropped:
        references.remember(job.cache_dir, name, job.owner, [])
    taken, keep = 0, job.keep
    with unread(job.cache_dir) as deleting:
        for name in [*filled, *sorted(dropped)]:
            with TensorStore(job.cache_dir / name, "compaction") as store:
                if deleting:
                    kept = references.delete_unwanted(job.cache_dir, store, all_of_it=job.regenerate, keep=keep)
                    keep = replace(keep, bytes=keep.bytes - kept)
                freed = store.compact()
                taken += store.bytes
            if freed:
                logger.info("cache %s: freed %s that nothing refers to", name, size_text(freed))
    logger.info("cache: %s on disk in %s", size_text(taken), job.cache_dir)


def _is_complete(wanted: Collection[str] | None, number: int | None, encoder: Encoder, job: CacheJob, tag: str) -> bool:
    """Whether the cache has all items, which the main rank knows and tells the others, whose `wanted` is None."""
    complete = number is not None or (wanted is not None and _has_all(wanted, encoder, job))
    return gather(job.ranks, f"{tag}/complete", complete, job.patience, job.raise_if_stopping)[0]


def _has_all(wanted: Collection[str], encoder: Encoder, job: CacheJob) -> bool:
    with TensorStore(job.cache_dir / encoder.name) as store:
        return not store.lost(wanted) and not store.missing(wanted)


def _fill_one(encoder: Encoder, wanted: dict[str, SampleVersion], job: CacheJob, tag: str) -> CacheReport:
    """This rank's share of one encoder's work."""
    ranks = job.ranks
    # Shared by position among all that is wanted, and not among what is missing: every rank knows its share
    # without asking, whenever it looks and whatever others have already written.
    mine = _by_shape(encoder, wanted)[ranks.rank :: ranks.world_size]
    with TensorStore(job.cache_dir / encoder.name, f"rank{ranks.rank}") as store:
        _forget_damaged(store, mine, job, tag)
        # A new item replaces the old one, which another run may be reading until then.
        missing = mine if job.regenerate else store.missing(mine)
        failures, busy, truncated = [], 1.0, 0
        if missing:
            try:
                encoder.load(ranks.device)
                failures, busy = _encode({key: wanted[key] for key in missing}, encoder, job, store, tag)
                truncated = getattr(encoder, "truncated", 0)
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
                raise _without_room(error, encoder, job) from error
            finally:
                encoder.unload()
                if ranks.device.type == "cuda":
                    # Memory that torch's allocator keeps is not available to NCCL or to other processes.
                    torch.cuda.empty_cache()
    counts = len(mine), len(mine) - len(missing), len(missing) - len(failures), len(failures)
    return CacheReport(encoder.name, *counts, busy, truncated, tuple(dict.fromkeys(failures)))


def _without_room(error: RuntimeError, encoder: Encoder, job: CacheJob) -> UserError:
    """The error of a GPU whose memory does not suffice for an encoder, with what to set."""
    said = ". ".join(str(error).split(". ")[:2])
    ways = ["caching_batch_size = 1"] if job.batch_size > 1 else []
    if formats := getattr(encoder, "smaller_formats", ()):
        ways.append("[model] text_encoder_dtype = " + " or ".join(f'"{name}"' for name in formats))
    if reads_media(encoder):
        ways.append("smaller `resolutions` or shorter clips in the dataset's file")
    advice = f"Set {', '.join(ways)}, or fill" if ways else "Fill"
    return UserError.of(
        f"{lacking(error)} does not suffice ({said}). What is encoded stays. {advice} the cache "
        "on a larger GPU, by --cache_only",
        where=f"caching, {encoder.name}",
    )


def _by_shape(encoder: Encoder, wanted: Mapping[str, SampleVersion]) -> list[str]:
    """The keys by the shapes of what is encoded, else in their order."""
    if not reads_media(encoder):
        return list(wanted)
    groups: dict[tuple[Bucket, ...], list[str]] = defaultdict(list)
    for key, version in wanted.items():
        groups[shape_of(encoder, version)].append(key)
    return [key for shape in sorted(groups) for key in groups[shape]]


def _forget_damaged(store: TensorStore, keys: Sequence[str], job: CacheJob, tag: str) -> None:
    """Removes items from the index that their shard no longer has, and with `verify` all damaged ones."""
    damaged = store.lost(keys)
    for start in range(0, len(keys) if job.verify else 0, VERIFIED_AT_ONCE):
        damaged += store.verify(keys[start : start + VERIFIED_AT_ONCE])
        sign_of_life(job.ranks, tag)
        job.raise_if_stopping()
    damaged = list(dict.fromkeys(damaged))
    if damaged:
        # Logged as an error, since ranks other than the main one show nothing below that level.
        shards = ", ".join(store.shards_of(damaged))
        logger.error("%s: damaged: %d items, which are encoded again; in %s", store.folder, len(damaged), shards)
        store.delete(damaged)


def _encode(
    items: dict[str, SampleVersion], encoder: Encoder, job: CacheJob, store: TensorStore, tag: str
) -> tuple[list[Failure], float]:
    """Encodes the items into the store. Returns one entry for each item that could not be decoded, and the fraction of
    the time that was spent on encoding."""
    ranks, neighbours = job.ranks, job.ranks.local_size
    failures: list[Failure] = []
    batches = list(_batches(items, encoder, job.batch_size))
    decoders = max(1, min(DECODERS, len(os.sched_getaffinity(0)) // neighbours))
    started, waited = time.monotonic(), 0.0
    with (
        _decoders(decoders) as pool,
        ThreadPoolExecutor(1) as writer,
        progress_bar(len(items), f"cache {encoder.name}", active=ranks.is_main) as bar,
        torch.no_grad(),
    ):
        written: deque[Future[None]] = deque()
        for batch in _decoded(batches, items, encoder, decoding_budget(neighbours), pool):
            before, count = time.monotonic(), len(batch)
            inputs, broken = _results(batch)
            failures += broken
            waited += time.monotonic() - before
            if inputs:
                # On a thread of its own, so that the next batch is encoded while the disk is busy.
                written.append(writer.submit(_write, store, features_of(inputs, encoder)))
            # None of it may stay in memory while others are decoded.
            inputs.clear()
            while len(written) > BATCHES_TO_WRITE or (written and written[0].done()):
                written.popleft().result()
            bar.update(count)
            sign_of_life(ranks, tag)
            job.raise_if_stopping()
        for future in written:
            future.result()
    return failures, 1 - waited / max(time.monotonic() - started, 1e-9)


@contextmanager
def _decoders(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that skip all tasks that they have not begun when the work ends early."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _results(batch: dict[str, Future[dict[str, Any]]]) -> tuple[dict[str, dict[str, Any]], list[Failure]]:
    """The decoded inputs of a batch, which is emptied, and the failures."""
    inputs, failures = {}, []
    for key in list(batch):
        try:
            inputs[key] = batch.pop(key).result()
        except Unreadable as error:
            failures.append(Failure(error.media.digest, str(error)))
    return inputs, failures


def features_of(inputs: dict[str, dict[str, Any]], encoder: Encoder) -> dict[str, dict[str, torch.Tensor]]:
    """The encoder's output for a batch, by item."""
    columns = {input_name: [item[input_name] for item in inputs.values()] for input_name in encoder.reads}
    stacked = {
        input_name: column if input_name in TEXT else torch.stack(column) for input_name, column in columns.items()
    }
    features = encoder.encode(**stacked)
    return {
        key: {name: tensors[position].cpu() for name, tensors in features.items()}
        for position, key in enumerate(inputs)
    }


def _write(store: TensorStore, items: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    for key, tensors in items.items():
        store.put(key, tensors)


def _batches(items: dict[str, SampleVersion], encoder: Encoder, batch_size: int) -> Iterator[list[str]]:
    """The items' keys in batches of one shape."""
    groups = defaultdict(list)
    for key, version in items.items():
        groups[shape_of(encoder, version)].append(key)
    for keys in groups.values():
        yield from (keys[start : start + batch_size] for start in range(0, len(keys), batch_size))


def _decoded(
    batches: Iterable[list[str]],
    items: dict[str, SampleVersion],
    encoder: Encoder,
    budget: int,
    pool: ThreadPoolExecutor,
) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """The batches' inputs, decoded as far ahead of their use as `budget` bytes of memory allow."""
    ahead: deque[tuple[int, dict[str, Future[dict[str, Any]]]]] = deque()
    held = 0
    for batch in batches:
        size = sum(decoded_bytes(encoder, items[key]) for key in batch)
        while ahead and (held + size > budget or len(ahead) >= BATCHES_AHEAD):
            freed, oldest = ahead.popleft()
            yield oldest
            held -= freed
        ahead.append((size, {key: pool.submit(inputs_of, encoder, items[key]) for key in batch}))
        held += size
    yield from (batch for _, batch in ahead)


def _report(failures: list[dict[str, str]], **counts: Any) -> CacheReport:
    """A report that went through JSON."""
    return CacheReport(**counts, failures=tuple(Failure(**failure) for failure in failures))


def _total(reports: Sequence[CacheReport]) -> CacheReport:
    counts = ("wanted", "reused", "encoded", "failed", "truncated")
    sums = {name: sum(getattr(report, name) for report in reports) for name in counts}
    busy = [report.busy for report in reports if report.encoded] or [1.0]
    failures = {failure: None for report in reports for failure in report.failures}
    ordered = tuple(sorted(failures, key=lambda failure: failure.reason))
    return CacheReport(reports[0].encoder, **sums, busy=sum(busy) / len(busy), failures=ordered)
