"""Decodes all files of a dataset without using them, to find those of which only the header is sound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from utils.dataset.encoding import Failure
from utils.dataset.samples import MediaFile, Sample, files_of
from utils.media.decode import decode_all
from utils.media.source import MediaError
from utils.progress_bar import progress_bar

READERS = 8


def undecodable(samples: Sequence[Sample], raise_if_stopping: Callable[[], None]) -> list[Failure]:
    """The files of the samples that cannot be decoded completely, each content once, in order of their reasons."""
    files = {media.digest: media for sample in samples for media in files_of(sample)}
    failures: list[Failure] = []
    with ThreadPoolExecutor(READERS) as pool, progress_bar(len(files), "decode", active=True) as bar:
        try:
            futures = [pool.submit(_failure, media) for media in files.values()]
            for future in as_completed(futures):
                if failure := future.result():
                    failures.append(failure)
                bar.update()
                raise_if_stopping()
        finally:
            pool.shutdown(cancel_futures=True)
    return sorted(failures, key=lambda failure: failure.reason)


def _failure(media: MediaFile) -> Failure | None:
    try:
        # Of a file with a fault only the first frame is used.
        decode_all(media.locator.source, first_alone=bool(media.fault))
    except MediaError as error:
        return Failure(media.digest, str(error))
    return None
