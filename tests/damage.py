"""Damages files as a disk, a broken download or another program's hand does, the same each time.

Every reader is called with every damage. It may read the file all the same, or tell what is wrong with it; whatever
else it raises is a fault of ours. `PENSTOCK_FUZZ=1000 pytest tests/test_damaged_files.py` tries so many of each kind.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

COUNT = int(os.environ.get("PENSTOCK_FUZZ", "12"))
"""How many damages of each kind."""
OTHERS: tuple[Any, ...] = (
    None, True, False, 0, -1, 3, 2.5, -0.5, 1e300, float("nan"), float("inf"), "", "x", "3", "\0\n\x1b[31m", "\ud800",
    [], [1], [[]], [None], ["a", "b"], [1, 2, 3, 4, 5, 6, 7], {}, {"a": 1}, {"": None},
)  # fmt: skip
"""Values of other types, or of the same and out of range. None is so large that a library would build without end."""


def damaged_bytes(content: bytes, seed: int, count: int = COUNT) -> Iterator[tuple[str, bytes]]:
    """The content with some bits flipped, bytes replaced, inserted, repeated or cut off, and what was done. Most of it
    is done near the beginning, where headers are."""
    draw = random.Random(seed)
    yield "empty", b""
    for _ in range(count):
        end = max(1, min(len(content), draw.choice((16, 400, len(content)))))
        at, length = draw.randrange(end), draw.choice((1, 1, 2, 8, 100))
        done = draw.choice(("flipped", "replaced", "inserted", "cut", "left out", "doubled", "zeroed"))
        part = content[at : at + length]
        new = {
            "flipped": bytes([part[0] ^ 1 << draw.randrange(8)]) + part[1:] if part else b"",
            "replaced": draw.randbytes(len(part)),
            "inserted": draw.randbytes(length) + part,
            "left out": b"",
            "doubled": part + part,
            "zeroed": bytes(len(part)),
        }
        rest = b"" if done == "cut" else new[done] + content[at + length :]
        yield f"{done} at {at}, {length} bytes", content[:at] + rest


def damaged_values(document: Any, seed: int, count: int = COUNT) -> Iterator[tuple[str, Any]]:
    """A document of JSON with one value of another type, taken away, or under another key; and what was done."""
    draw = random.Random(seed)
    places = list(_places(document))
    for _ in range(count):
        path, changed = draw.choice(places), copy.deepcopy(document)
        holder, done = changed, draw.choice(("other", "other", "other", "gone", "renamed"))
        for key in path[:-1]:
            holder = holder[key]
        if done == "other":
            holder[path[-1]] = copy.deepcopy(draw.choice(OTHERS))
            done = f"is {holder[path[-1]]!r}"
        else:
            value = holder.pop(path[-1])
            if done == "renamed" and isinstance(holder, dict):
                holder[f"{path[-1]}_"] = value
        yield f"{'.'.join(map(str, path))} {done}", changed


def _places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield (*path, key)
        yield from _places(document[key], (*path, key))


def damaged_json(content: bytes, seed: int, count: int = COUNT) -> Iterator[tuple[str, bytes]]:
    """A JSON file with wrong values, and with wrong bytes."""
    for done, document in damaged_values(json.loads(content), seed, count):
        yield done, json.dumps(document).encode()
    yield "brackets", b"[" * 100_000
    yield from damaged_bytes(content, seed, count // 3)


def damaged_safetensors(content: bytes, seed: int, count: int = COUNT) -> Iterator[tuple[str, bytes]]:
    """A safetensors file with wrong values in its header, and with wrong bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    for done, header in damaged_values(json.loads(content[8 : 8 + length]), seed, count):
        text = json.dumps(header).encode()
        yield done, struct.pack("<Q", len(text)) + text + content[8 + length :]
    yield from damaged_bytes(content, seed, count)


Damages = Callable[[bytes, int], Iterator[tuple[str, bytes]]]


def outcomes(
    file: Path, read: Callable[[], object], damages: Damages, told: tuple[type[Exception], ...], seed: int = 0
) -> tuple[dict[str, int], list[str]]:
    """What becomes of `read` with each damage of `file`, which is then as it was.

    Args:
        told: the errors that tell what is wrong.

    Returns:
        How often it read the file, and how often it told; and each damage with which it did neither.
    """
    content, counts, faults = file.read_bytes(), {"read": 0, "told": 0}, []
    try:
        for done, damaged in damages(content, seed):
            file.write_bytes(damaged)
            try:
                read()
                counts["read"] += 1
            except told as error:
                counts["told"] += 1
                if not str(error).strip():
                    faults.append(f"{file.name}, {done}: told nothing")
            except Exception as error:
                faults.append(f"{file.name}, {done}: {type(error).__name__}: {error!s:.300}{_place_of(error)}")
    finally:
        file.write_bytes(content)
    logger.info("%s: %s", file, counts)
    return counts, faults


def _place_of(error: BaseException) -> str:
    """Where an error was raised, in code of ours."""
    places, trace = [], error.__traceback__
    while trace:
        if "/tests/" not in (name := trace.tb_frame.f_code.co_filename) and "site-packages" not in name:
            places.append(f"{Path(name).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f" ({' '.join(places[-3:])})"
