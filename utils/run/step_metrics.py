"""The numbers of a step beside its loss: where its time goes, how much it handles, and what it holds in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from optimizers.found_rates import distance_of, rates_of
from utils.parallel.interleaved import Layout, waiting_share
from utils.parallel.step_numbers import StepResult
from utils.parallel.step_times import COMPUTE, OPTIMIZER
from utils.ranks import largest
from utils.run.parts import RunParts
from utils.run.reporting import PEAK_MEMORY

OWN = "optimizer/"
"""What the names of an optimizer's own numbers begin with."""
HOST_MEMORY = "train/host_memory_gib"
BUBBLE = "train/bubble_share"
EVERY = 10
STATM = Path("/proc/self/statm")


def step_metrics(run: RunParts, result: StepResult, step: int, waited: float) -> dict[str, float]:
    """The numbers of a step; all ranks call it together, and have the largest of all ranks where these differ, but for
    the parts of the step's time, which are this process's. Of later steps most numbers are told of one in ten alone.

    Args:
        step: its number, from 1.
        waited: seconds for which this process waited for its data.
    """
    in_full = is_told_in_full(step)
    if not in_full and run.ranks.device.type != "cuda":
        return {}
    busy = result.seconds.get(COMPUTE, 0.0) + result.seconds.get(OPTIMIZER, 0.0)
    stages = [busy if stage == run.ranks.stage else 0.0 for stage in range(run.ranks.stages)]
    on_gpu, in_host, *stages = largest([_peak(run.ranks.device), _resident(), *stages])
    found = {PEAK_MEMORY: on_gpu} if on_gpu else {}
    if not in_full:
        return found
    found |= {"train/data_time_sec": waited}
    found |= {f"train/{part}_time_sec": seconds for part, seconds in result.seconds.items()}
    if in_host:
        found[HOST_MEMORY] = in_host
    if run.ranks.stages > 1:
        found[BUBBLE] = bubble_share(stages, run.settings.gradient_accumulation_steps, run.settings.pieces)
    if run.norms:
        found |= run.norms.measure()
    own = distance_of(run.optimizer) | rates_of(run.optimizer)
    return found | {f"{OWN}{name}": value for name, value in own.items()}


def is_told_in_full(step: int) -> bool:
    """Whether all numbers of a step are written: a long run would have some hundred megabytes of them."""
    return step <= EVERY or step % EVERY == 0


def bubble_share(seconds: Sequence[float], micro_batches: int, pieces: int = 1) -> float:
    """The share of a step in which the stages have nothing to do, in the mean. The slowest stage waits for the others
    as the schedule says; communication takes no time in this.

    Args:
        seconds: for which each stage computes in a step.
        pieces: of each stage.
    """
    slowest, others = max(seconds), len(seconds) - 1
    waits = waiting_share(Layout(len(seconds), pieces, micro_batches))
    length = slowest + (sum(seconds) - slowest) / others * waits
    return 1 - sum(seconds) / len(seconds) / length if length else 0.0


def forget_peak(device: torch.device) -> None:
    """What was held until now, as in an evaluation or while the cache was filled, does not count in the next step's
    peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float:
    """The most GiB that tensors took on this process's GPU since `forget_peak`; 0 without a GPU."""
    if device.type != "cuda":
        return 0.0
    return torch.cuda.max_memory_allocated(device) / 2**30


def _resident() -> float:
    """The GiB of the machine's memory that this process holds, with what it shares; 0 where that is not told."""
    try:
        return int(STATM.read_text().split()[1]) * _page_bytes() / 2**30
    except (OSError, ValueError, IndexError):
        return 0.0


@cache
def _page_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE")
