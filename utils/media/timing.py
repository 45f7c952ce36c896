"""Lengths of files, and the starts of clips in them. Pure functions; lengths in frames at the frame rate of
training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from utils.media.source import Probe

# Times in files are rounded: a frame may lack this fraction of its duration.
ROUNDING_FRAMES = 0.05

ClipMode = Literal["single_beginning", "single_middle", "single_random", "multiple_overlapping", "chunks"]


def frames_at(probe: Probe, fps: float) -> int:
    """The number of frames of the file at `fps` frames per second: those that last for their whole duration, and at
    least one. 113 frames at 24 fps are 75 at 16 fps. A still picture has one."""
    return max(1, math.floor(probe.seconds * fps + ROUNDING_FRAMES))


def clip_starts(available_frames: int, wanted_frames: int, mode: ClipMode, draw: float = 0.0) -> list[int]:
    """The first frames of clips of `wanted_frames` in a file of `available_frames`; none if the file is too short.

    - "single_beginning", "single_middle": one clip there;
    - "single_random": one clip; `draw`, in [0, 1), picks its start uniformly;
    - "multiple_overlapping": as few clips as cover the whole file, evenly spread;
    - "chunks": one after the other; the remainder, `available_frames % wanted_frames`, is left out.
    """
    assert wanted_frames > 0 and 0 <= draw < 1, (wanted_frames, draw)
    spare = available_frames - wanted_frames
    return _STARTS[mode](spare, wanted_frames, draw) if spare >= 0 else []


def _covering(spare: int, wanted: int, draw: float) -> list[int]:
    steps = math.ceil(spare / wanted)
    return [index * spare // steps for index in range(steps + 1)] if steps else [0]


_STARTS: dict[str, Callable[[int, int, float], list[int]]] = {
    "single_beginning": lambda spare, wanted, draw: [0],
    "single_middle": lambda spare, wanted, draw: [spare // 2],
    "single_random": lambda spare, wanted, draw: [int(draw * (spare + 1))],
    "multiple_overlapping": _covering,
    "chunks": lambda spare, wanted, draw: list(range(0, spare + 1, wanted)),
}
