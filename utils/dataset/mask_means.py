"""What masks are on average, so that those that mean nothing can be told."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from utils.dataset.file_index import Scan, opened_index
from utils.dataset.samples import Mask
from utils.media.decode import load_alpha, load_mask
from utils.media.geometry import View
from utils.media.source import MediaError
from utils.progress_bar import progress_bar

READERS = 8
SIDE = 64
FRAMES = 8
"""Frames of a clip that are looked at, evenly spread."""
SOUND = "typeof(digest) = 'text' AND typeof(mean) = 'real' AND mean BETWEEN 0 AND 1"
"""Rows that nothing has damaged."""


def mask_means(masks: Sequence[Mask], how: Scan) -> dict[tuple[str, bool], float | MediaError]:
    """The mean of each mask in [0, 1], by the digest of its file and whether its opacity is meant; or why it cannot be
    decoded. Each file is decoded once, and its mean is stored in the index.

    Raises:
        Exception: what `how.raise_if_stopping` raises; what was found until then is stored.
    """
    wanted = {(mask.media.digest, mask.is_alpha): mask for mask in masks}
    if not wanted:
        return {}
    found: dict[tuple[str, bool], float | MediaError] = {}
    with opened_index(how.index) as index, ThreadPoolExecutor(READERS) as pool:
        for digest, is_alpha, mean in index.execute(f"SELECT digest, is_alpha, mean FROM masks WHERE {SOUND}"):
            if (digest, bool(is_alpha)) in wanted:
                found[digest, bool(is_alpha)] = mean
        missing = [key for key in wanted if key not in found]
        new: list[tuple[str, bool, float]] = []
        try:
            with progress_bar(len(missing), "masks", active=how.progress and bool(missing)) as bar:
                futures = {pool.submit(_mean, wanted[key]): key for key in missing}
                for future in as_completed(futures):
                    mean = found[futures[future]] = future.result()
                    if not isinstance(mean, MediaError):
                        new.append((*futures[future], mean))
                    bar.update()
                    how.raise_if_stopping()
        finally:
            pool.shutdown(cancel_futures=True)
            index.executemany("INSERT OR REPLACE INTO masks (digest, is_alpha, mean) VALUES (?, ?, ?)", new)
            index.commit()
    return found


def _mean(mask: Mask) -> float | MediaError:
    media = mask.media
    frames = min(FRAMES, media.frames)
    # Never beyond the end, whose time is known only up to rounding.
    fps = frames / (media.frames / media.fps) if media.fps else 1.0
    view = View(min(SIDE, media.width), min(SIDE, media.height), "none")
    try:
        return (load_alpha if mask.is_alpha else load_mask)(media.locator.source, view, 0.0, frames, fps).mean().item()
    except MediaError as error:
        return error
