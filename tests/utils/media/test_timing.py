"""Lengths and beginnings of clips, by hand and against what must hold for any."""

import random

import pytest

from utils.media.source import Probe
from utils.media.timing import clip_starts, frames_at

LENGTHS = [(1, 1), (5, 9), (9, 9), (10, 9), (100, 33), (99, 33), (101, 33), (3, 1)]


@pytest.mark.parametrize(
    ("frames", "fps", "target", "expected"),
    [
        (113, 24, 16, 75),
        (113, 24, 24, 113),
        (49, 8, 16, 98),
        (100, 30000 / 1001, 24, 80),
        (2, 60, 16, 1),
        (1, 0, 16, 1),
    ],
)
def test_frames_at(frames, fps, target, expected):
    assert frames_at(Probe(8, 8, frames, fps), target) == expected


def test_the_rate_of_a_file_gives_its_frames():
    draw = random.Random(0)
    for _ in range(2000):
        frames, fps = draw.randint(1, 100000), draw.choice([24, 25, 30, 24000 / 1001, draw.uniform(1, 120)])
        assert frames_at(Probe(8, 8, frames, fps), fps) == frames


def test_clip_starts_by_hand():
    assert clip_starts(100, 33, "single_beginning") == [0]
    assert clip_starts(100, 33, "single_middle") == [33]
    assert clip_starts(100, 33, "multiple_overlapping") == [0, 22, 44, 67]
    assert clip_starts(99, 33, "multiple_overlapping") == [0, 33, 66]
    assert clip_starts(100, 33, "chunks") == [0, 33, 66]
    assert [clip_starts(4, 3, "single_random", draw) for draw in (0, 0.49, 0.5, 0.999)] == [[0], [0], [1], [1]]


def cases():
    draw = random.Random(0)
    yield from ((*lengths, draw.random()) for lengths in LENGTHS)
    for _ in range(2000):
        yield draw.randint(1, 300), draw.randint(1, 120), draw.random()


@pytest.mark.parametrize(
    "mode", ["single_beginning", "single_middle", "single_random", "multiple_overlapping", "chunks"]
)
def test_clips_lie_within_the_file(mode):
    for available, wanted, draw in cases():
        starts = clip_starts(available, wanted, mode, draw)
        assert bool(starts) == (available >= wanted)
        assert starts == sorted(set(starts)) and all(0 <= start <= available - wanted for start in starts)


def test_overlapping_clips_are_the_fewest_that_cover_the_file_and_evenly_spread():
    for available, wanted, _ in cases():
        starts = clip_starts(available, wanted, "multiple_overlapping")
        if starts:
            assert len(starts) == -(-available // wanted)
            assert {frame for start in starts for frame in range(start, start + wanted)} == set(range(available))
            steps = {after - before for before, after in zip(starts, starts[1:], strict=False)}
            assert not steps or max(steps) - min(steps) <= 1


def test_chunks_leave_out_less_than_one():
    for available, wanted, _ in cases():
        starts = clip_starts(available, wanted, "chunks")
        assert starts == [index * wanted for index in range(available // wanted)]


def test_random_clips_begin_anywhere_as_often():
    draw = random.Random(0)
    counts = [0] * 11
    for _ in range(11000):
        counts[clip_starts(20, 10, "single_random", draw.random())[0]] += 1
    assert min(counts) > 850 and max(counts) < 1150
