"""A part of the training data that is evaluated and not trained."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from utils.dataset.samples import Sample
from utils.dataset.sources import Remark

NUMBERS = 2.0**64


def place_of(digest: str) -> float:
    """A number in [0, 1) that follows from a file's content alone."""
    mixed = hashlib.blake2b(f"held out {digest}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "big") / NUMBERS


def held_out(samples: Sequence[Sample], begin: float, fraction: float) -> list[Sample]:
    """The pictures and clips whose places are from `begin` to `begin + fraction`, or the first one after `begin` if
    there is none: one sample of each, whichever of its sizes follows from its content too, in one version.
    Regularisation data is trained alone.
    """
    by_digest: dict[str, list[Sample]] = {}
    for sample in samples:
        if not sample.rules.is_regularisation_data and place_of(sample.media.digest) >= begin:
            by_digest.setdefault(sample.media.digest, []).append(sample)
    chosen = {digest for digest in by_digest if place_of(digest) < begin + fraction}
    chosen = chosen or set(sorted(by_digest, key=place_of)[:1])
    return [_evaluated(own) for digest, own in by_digest.items() if digest in chosen]


def _evaluated(versions: Sequence[Sample]) -> Sample:
    sample = versions[int(versions[0].media.digest, 16) % len(versions)]
    return replace(sample, takes=sample.takes[:1], captions=sample.captions[:1], repeats=1.0, turn=None)


def without(samples: Sequence[Sample], taken: Sequence[Sample]) -> list[Sample]:
    """The samples of other pictures than those that are taken."""
    digests = {sample.media.digest for sample in taken}
    return [sample for sample in samples if sample.media.digest not in digests]


def emptied(before: Sequence[Sample], left: Sequence[Sample], name: str) -> list[Remark]:
    """A remark on each size of which nothing is left to train."""
    sizes, trained = Counter(sample.bucket for sample in before), {sample.bucket for sample in left}
    return [
        Remark("size held out", str(bucket), f"all {count} samples of this size are in '{name}'; none is trained")
        for bucket, count in sorted(sizes.items())
        if bucket not in trained
    ]
