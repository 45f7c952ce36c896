"""How evenly eight data ranks work, when a step's micro-batches are of any bucket, counted in positions of latents.

Slowest: of a step, the work of the rank that has most over the mean, averaged over an epoch weighted by work.
Useful: of the time that eight ranks spend, the share in which one works on a sample that is no repetition. Beside it
what is useful if a micro-batch of every rank is of the same bucket: no rank waits, but more samples are repeated.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from utils.dataset.ordering import EpochOrder, Group, deal

RANKS, MICRO_BATCH, EPOCHS = 8, 2, 5
SIZES = (300, 3000)
ACCUMULATIONS = (1, 4)


def measure() -> Iterator[str]:
    yield f"{'samples':44}accumulation  slowest  useful  (of one bucket)"
    for name, draw in DATA.items():
        for size in SIZES:
            groups = [
                Group(count, MICRO_BATCH, math.prod(shape))
                for shape, count in Counter(draw(random.Random(number)) for number in range(size)).items()
            ]
            for accumulation in ACCUMULATIONS:
                slowest, useful = balance(groups, accumulation)
                title = f"{size} {name}, {len(groups)} buckets"
                yield (
                    f"{title:44}{accumulation:12}{slowest:9.3f}{useful:8.3f}"
                    f"{useful_of_one_bucket(groups, accumulation):9.3f}"
                )


def balance(groups: Sequence[Group], accumulation: int) -> tuple[float, float]:
    """(slowest rank over the mean, useful share) of some epochs."""
    slowest = total = 0.0
    for epoch in range(EPOCHS):
        for step in EpochOrder(groups, RANKS * accumulation, 0, epoch):
            loads = [groups[one.group].load for one in step]
            of_ranks = [sum(loads[number] for number in share) for share in deal(loads, RANKS)]
            slowest += max(of_ranks)
            total += sum(of_ranks) / RANKS
    wanted = EPOCHS * sum(group.size * group.work for group in groups) / RANKS
    return slowest / total, wanted / slowest


def useful_of_one_bucket(groups: Sequence[Group], accumulation: int) -> float:
    """The useful share if all ranks take their micro-batches of the same bucket at the same time."""
    slots = [math.ceil(group.size / (group.micro_batch * RANKS)) for group in groups]
    spent = sum(count * group.load for count, group in zip(slots, groups, strict=True))
    spent += -sum(slots) % accumulation * spent / sum(slots)
    return sum(group.size * group.work for group in groups) / (RANKS * spent)


def photograph(draw: random.Random, side: int = 1024) -> tuple[int, int, int]:
    """(frames, height, width) in positions, 16 pixels each, of the area nearest to side x side, in steps of 64."""
    ratio = math.exp(draw.gauss(0, 0.35))
    width = min(max(round(side * math.sqrt(ratio) / 64), 8), 32) * 64
    return 1, round(side * side / width / 64) * 4, width // 16


def of_two_resolutions(draw: random.Random) -> tuple[int, int, int]:
    return photograph(draw, draw.choice((512, 1024)))


def clips_with_stills(draw: random.Random) -> tuple[int, int, int]:
    """Stills, and clips of 17 to 81 frames, of which four make a position."""
    _, height, width = photograph(draw, 640)
    return draw.choice((1, 1, 5, 9, 13, 17, 21)), height, width


DATA = {
    "photographs of 1024 x 1024": photograph,
    "of 512 and 1024": of_two_resolutions,
    "clips and stills of 640": clips_with_stills,
}
