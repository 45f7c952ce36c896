"""Are the data of the files whole from which a run begins? Headers say nothing of them: a disk's or a download's damage
is numbers that train to nothing.

A file is compared with the SHA-256 that its publisher gave, where the download left it, and with what it was when it
was read last; and its tensors are looked through for values that are no numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch

from models.base import BasePipeline
from models.foundation.checkpoints.gguf_files import is_gguf
from models.foundation.checkpoints.headers import SUFFIXES, opened, read_header
from utils.errors import Problem, UserError
from utils.json_files import is_of, parsed_json
from utils.ranks import Ranks, gather, sign_of_life
from utils.run.durable import replace_text
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

RECORD = "base_files.json"
KEY = "[model] verify_files"
TAG = "base files"
BLOCK = 16 * 2**20
ELEMENTS = 2**24
"""So many numbers of 8 bits are looked at together."""
SHA_256 = re.compile(r"[0-9a-f]{64}")
DOWNLOADS = Path(".cache") / "huggingface" / "download"
"""Where `hf download --local-dir` notes what it has brought: a file of three lines, of which the second is the sum."""
KNOWN = dict[str, list[Annotated[int, 0] | str]]
"""The file -> its size, time of change in nanoseconds, and checksum."""


def verify(
    settings: Settings, pipeline: BasePipeline, cache: Path, ranks: Ranks, raise_if_stopping: Callable[[], None]
) -> None:
    """Reads the data of the base files, if `[model] verify_files` asks for it. The ranks, which all call it, share the
    files.

    Args:
        cache: the folder that remembers which files were read, and their sums.

    Raises:
        UserError: names the files that are damaged.
    """
    how = settings.model.verify_files
    if how == "never":
        return

    def heed() -> None:
        raise_if_stopping()
        sign_of_life(ranks, TAG)

    known, started, size = _remembered(cache / RECORD), time.monotonic(), 0
    found: dict[str, list[Any]] = {}
    problems: list[list[str]] = []
    for file in files_of(settings, pipeline)[ranks.rank :: ranks.world_size]:
        stamp = _stamp(file)
        if how == "once" and known.get(str(file), [])[:2] == stamp:
            continue
        told, sum_ = _damage(file, stamp, known.get(str(file)), heed)
        problems += [[str(file), text] for text in told]
        size += stamp[0]
        if not told:
            found[str(file)] = [*stamp, sum_]
    shared = gather(ranks, TAG, [found, problems, size], raise_if_stopping=raise_if_stopping)
    if ranks.is_main and any(one for one, _, _ in shared):
        cache.mkdir(parents=True, exist_ok=True)
        known |= {file: entry for one, _, _ in shared for file, entry in one.items()}
        replace_text(cache / RECORD, json.dumps(known, indent=1))
    if damaged := [Problem(file, KEY, text) for _, told, _ in shared for file, text in told]:
        raise UserError(damaged)
    seconds, total = time.monotonic() - started, sum(size for _, _, size in shared)
    if total:
        count = sum(len(one) for one, _, _ in shared)
        logger.info("%d base files are whole: %.2f GiB read in %.1f s", count, total / 2**30, seconds)


def files_of(settings: Settings, pipeline: BasePipeline) -> list[Path]:
    """The files of weights that the run begins with: those that the options name, and those of the parts of the
    diffusers folder that no option replaces."""
    options = pipeline.options
    named = [value for value in vars(options).values() if isinstance(value, Path)]
    named += [entry.path for entry in (*options.text_encoders, *options.preset_adapters)]
    if settings.adapter and settings.adapter.init_from_existing:
        named.append(settings.adapter.init_from_existing)
    replaced = {part.folder for part in pipeline.text_parts if part.override(options)}
    replaced |= {"vae"} if options.vae_path else set()
    replaced |= {pipeline.denoiser_folder} if options.transformer_path or options.from_scratch else set()
    files: dict[Path, None] = {}
    for place in named:
        for folder in [place, *sorted(place.iterdir())] if place.is_dir() else [place]:
            is_replaced = folder.parent == options.diffusers_path and folder.name in replaced
            if not is_replaced and (folder.is_file() or any(folder.glob("*.safetensors"))):
                files |= dict.fromkeys(_weights(folder))
    return [Path(os.path.abspath(file)) for file in files]


def _weights(place: Path) -> list[Path]:
    if place.is_dir():
        return read_header(place).paths
    return [place] if place.suffix in (*SUFFIXES, ".gguf") else []


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _damage(
    file: Path, stamp: Sequence[int], before: Sequence[Any] | None, heed: Callable[[], None]
) -> tuple[list[str], str]:
    """What is wrong with a file, and its checksum."""
    published = published_sum(file)
    digest = hashlib.sha256() if published else Crc32()
    try:
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                heed()
                digest.update(block)
    except OSError as error:
        return [f"cannot be read ({error.strerror}); download it again"], ""
    sum_ = digest.hexdigest()
    if published and sum_ != published:
        said = f"has the SHA-256 {sum_}, and its publisher's is {published}: it is damaged, or was changed; download it"
        return [f'{said} again, or set verify_files = "never" if you changed it'], sum_
    if before and [*before[:2]] == [*stamp] and before[2] != sum_:
        return [
            "has other data than when it was read last, though nobody wrote to it: download it again, and look at "
            "the disk"
        ], sum_
    return [*_no_numbers(file, heed)], sum_


class Crc32:
    """CRC-32 in the form of `hashlib`: where nobody gave another sum, one that takes an eighth of the time will do."""

    def __init__(self) -> None:
        self.sum = 0

    def update(self, block: bytes) -> None:
        self.sum = zlib.crc32(block, self.sum)

    def hexdigest(self) -> str:
        return f"{self.sum:08x}"


def published_sum(file: Path) -> str | None:
    """The SHA-256 of a file that a download from Hugging Face has left: as the name of what a link in its cache leads
    to, or in a note beside it. None if there is none."""
    own = file.resolve().name
    if file.is_symlink() and SHA_256.fullmatch(own):
        return own
    for folder in list(file.parents)[:4]:
        note = folder / DOWNLOADS / f"{file.relative_to(folder)}.metadata"
        try:
            lines = note.read_text(encoding="utf-8", errors="replace").split()
        except OSError:
            continue
        return lines[1] if len(lines) > 1 and SHA_256.fullmatch(lines[1]) else None
    return None


def _no_numbers(file: Path, heed: Callable[[], None]) -> Iterator[str]:
    """Tells the first tensor with values that are infinite or no numbers, and how many there are."""
    if is_gguf(file):
        return
    wrong = []
    with opened(file) as tensors:
        for key in tensors.keys():
            heed()
            values = tensors.get_tensor(key)
            if values.is_floating_point() and not _are_numbers(values):
                wrong.append(key)
    if wrong:
        yield (
            f"{len(wrong)} of its tensors have values that are infinite or no numbers, the first is '{wrong[0]}': it "
            "is damaged; download it again"
        )


def _are_numbers(values: torch.Tensor) -> bool:
    flat = values.reshape(-1)
    # The least and the greatest are infinite, or no numbers, if one is; `isfinite` takes thirty times as long. Of 8
    # bits torch does not know them.
    parts = (part.float() for part in flat.split(ELEMENTS)) if flat.element_size() == 1 else [flat]
    return all(not len(part) or bool(torch.stack(torch.aminmax(part)).isfinite().all()) for part in parts)


def _remembered(record: Path) -> dict[str, list[Any]]:
    """What is known of files; nothing if it is damaged, so that they are read again."""
    try:
        known = parsed_json(record.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if is_of(known, KNOWN) and all(len(one) == 3 for one in known.values()) else {}
