"""How long files are, and where in them clips begin. Pure functions; lengths in frames at the rate of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from utils.media.source import Probe

# Times in files are rounded: what lacks less than this to be a frame is one.
ROUNDING_FRAMES = 0.05

ClipMode = Literal["single_beginning", "single_middle", "single_random", "multiple_overlapping", "chunks"]


def frames_at(probe: Probe, fps: float) -> int:
    """How many frames the file has at `fps` frames per second: those that are shown for their whole time, and at
    least one. 113 frames at 24 are 75 at 16. A still has one."""
    return max(1, math.floor(probe.seconds * fps + ROUNDING_FRAMES))


def clip_starts(available_frames: int, wanted_frames: int, mode: ClipMode, draw: float = 0.0) -> list[int]:
    """Where clips of `wanted_frames` begin in a file of `available_frames`; nowhere, if it has fewer.

    - "single_beginning", "single_middle": one clip there;
    - "single_random": one clip, by `draw`, in [0, 1), each place being as likely;
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
