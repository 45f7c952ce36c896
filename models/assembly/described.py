"""What the page of a run tells of its data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from utils.dataset.collection import Collection, shortfalls


def described(collections: Sequence[Collection]) -> list[dict[str, Any]]:
    """For each dataset: how many samples and files it has, by directory and by size; how many files are left out, by
    kind; and why, in lines of text."""
    return [_described(collection) for collection in collections]


def _described(collection: Collection) -> dict[str, Any]:
    source, samples = collection.source, collection.samples
    counts, shown, sizes = Counter[str](), Counter[str](), Counter[str]()
    for sample in samples:
        directory, bucket = str(sample.rules.path), sample.bucket
        counts[directory] += 1
        shown[directory] += sample.repeats
        frames = f" x {bucket.frames} frames" if bucket.frames > 1 else ""
        sizes[f"{bucket.width} x {bucket.height}{frames}"] += 1
    return {
        "name": source.name,
        "file": str(source.file),
        "samples": len(samples),
        "files": collection.files,
        "rejected": dict(Counter(fault.kind for fault in collection.rejected)),
        "directories": {path: [counts[path], f"{shown[path]:g}"] for path in counts},
        "buckets": dict(sizes),
        "told": shortfalls([collection]),
    }
