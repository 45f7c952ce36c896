"""The coordinates of this process (rank, stage, data rank), and what the processes of a run do together.

Ranks are laid out stage by stage, as DeepSpeed's `PipeDataParallelTopology` does: with S stages and D data ranks,
rank = stage * D + data_rank. The process group runs NCCL on GPUs and gloo on CPUs.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from utils.turn import turn_in_list

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
PATIENCE = timedelta(minutes=30)
"""How long to wait for a rank that gives no sign of life."""
POLL_SECONDS = 0.05
FIRST_POLL_SECONDS = 0.001
"""Ranks mostly come at nearly the same time, and a start gathers a dozen times."""


class LaunchError(ValueError):
    """The processes were launched in a way that cannot work; the message says how it can."""


@dataclass(frozen=True)
class Ranks:
    """The coordinates of this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    stages: int = 1

    @property
    def data_ranks(self) -> int:
        return self.world_size // self.stages

    @property
    def stage(self) -> int:
        return self.rank // self.data_ranks

    @property
    def data_rank(self) -> int:
        return self.rank % self.data_ranks

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def local_size(self) -> int:
        """The number of processes of this run on this machine, as far as the launcher says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or self.world_size)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def with_stages(self, stages: int) -> Ranks:
        """The same process in a layout of `stages` pipeline stages."""
        assert self.world_size % stages == 0
        return replace(self, stages=stages)


def from_environment() -> Ranks:
    """The coordinates that a launcher (deepspeed, torchrun) left in the environment; one process without any."""
    environment = os.environ
    return Ranks(
        rank=int(environment.get("RANK", 0)),
        world_size=int(environment.get("WORLD_SIZE", 1)),
        local_rank=int(environment.get("LOCAL_RANK", 0)),
    )


def restarts() -> int:
    """How many times the launcher (torchrun with --max_restarts) has started the processes of this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def connect(ranks: Ranks, master_port: int | None = None) -> None:
    """Starts the process group. `MASTER_ADDR` and `MASTER_PORT` of the environment are respected; `master_port` is
    used where the environment names none, and a free port is taken by a process that runs alone.

    Raises:
        LaunchError: the port is taken, or this machine has fewer GPUs than it was given processes.
    """
    coordinates = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world_size, "LOCAL_RANK": ranks.local_rank}
    for name, value in coordinates.items():
        os.environ[name] = str(value)
    if ranks.device.type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"--num_gpus, --nproc_per_node: this machine has {torch.cuda.device_count()} GPUs, and this is its "
                f"process number {ranks.local_rank + 1}; launch as many processes as it has GPUs"
            )
        torch.cuda.set_device(ranks.device)
    _share_cores(ranks)
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    # Without `device_id`, with which torch has one queue for NCCL's messages to all others; the stages' schedules count
    # on one for each.
    dist.init_process_group(
        backend,
        store=meet(ranks, master_port),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def meet(ranks: Ranks, master_port: int | None = None) -> dist.Store:
    """The key-value store of the run, which the main process hosts, or its launcher; where, as `connect` says.

    Raises:
        LaunchError: another program, or another run, has its port.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if master_port is not None:
        os.environ.setdefault("MASTER_PORT", str(master_port))
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    try:
        store, *_ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=COLLECTIVE_TIMEOUT))
        store.set_timeout(COLLECTIVE_TIMEOUT)
        # A launcher's store outlives processes that it starts again, with all that they had put there.
        # So does that of a list, for all its runs.
        store = dist.PrefixStore(f"start{restarts()}/turn{turn_in_list() or 0}", store)
        is_ours = ranks.world_size == 1 or store.add(f"here/{ranks.rank}", 1) == 1
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        is_ours = False
    if is_ours:
        return store
    # Another run's store takes whoever comes; that it has a process of this rank already tells it from ours.
    raise LaunchError(
        f"--master_port: the port {os.environ['MASTER_PORT']} is taken, perhaps by another run on this machine; "
        "give the launcher a free one: deepspeed --master_port 29501 ..., torchrun --master_port 29501 ..."
    )


def disconnect() -> None:
    """Leaves the process group together: a process that leaves early makes gloo abort in the others."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def leave_together(ranks: Ranks, seconds: float) -> bool:
    """Before a process ends early: waits until all ranks want to leave, but not longer than `seconds`. Returns whether
    all of them did; False at once if they are not connected yet."""
    if ranks.world_size == 1:
        return True
    if not dist.is_initialized():
        return False
    try:
        gather(ranks, "leaving", None, timedelta(seconds=seconds))
        # The main process hosts the store, so it must outlive the others' reads.
        time.sleep(10 * POLL_SECONDS if ranks.is_main else 0.0)
    except TimeoutError:
        return False
    except dist.DistError:
        pass
    return True


def gather(
    ranks: Ranks,
    tag: str,
    value: Any,
    patience: timedelta = PATIENCE,
    raise_if_stopping: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Every rank's `value` (anything JSON can hold), in the order of the ranks, once all have given theirs.

    It uses the key-value store instead of a collective, so that one rank may be hours slower than the others, as long
    as it gives a `sign_of_life` now and then. `tag` must be unique within a run. `raise_if_stopping` is called while
    waiting, and an exception ends the wait.

    Raises:
        TimeoutError: some ranks gave neither a value nor a sign of life for `patience`; names them.
    """
    if ranks.world_size == 1:
        return [value]
    store = dist.distributed_c10d._get_default_store()
    store.set(f"share/{tag}/{ranks.rank}", json.dumps(value))
    awaited, pause = dict.fromkeys(range(ranks.world_size), (0, time.monotonic())), FIRST_POLL_SECONDS
    while awaited:
        raise_if_stopping()
        awaited = {
            rank: _last_sign(store, tag, rank, last)
            for rank, last in awaited.items()
            if not store.check([f"share/{tag}/{rank}"])
        }
        silent = [rank for rank, (_, since) in awaited.items() if time.monotonic() - since > patience.total_seconds()]
        if silent:
            raise TimeoutError(f"heard nothing for {patience} at '{tag}' from the ranks {silent}")
        time.sleep(pause if awaited else 0.0)
        pause = min(2 * pause, POLL_SECONDS)
    return [json.loads(store.get(f"share/{tag}/{rank}")) for rank in range(ranks.world_size)]


def by_first(ranks: Ranks, tag: str, work: Callable[[], Any], patience: timedelta = PATIENCE) -> Any:
    """What the first rank makes (anything JSON can hold) that comes here. Others that come wait until it has, and get
    the same, None if it takes longer than `patience`; nobody waits for ranks that do not come. `tag` must be unique
    within a run, and the work must not fail."""
    if ranks.world_size == 1:
        return work()
    store = dist.distributed_c10d._get_default_store()
    if store.add(f"first/{tag}", 1) == 1:
        made = work()
        store.set(f"made/{tag}", json.dumps(made))
        return made
    deadline = time.monotonic() + patience.total_seconds()
    while not store.check([f"made/{tag}"]):
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_SECONDS)
    return json.loads(store.get(f"made/{tag}"))


def sign_of_life(ranks: Ranks, tag: str) -> None:
    """Tells the ranks that wait at `tag` that this rank is still working."""
    if ranks.world_size > 1:
        dist.distributed_c10d._get_default_store().add(f"alive/{tag}/{ranks.rank}", 1)


def _last_sign(store: dist.Store, tag: str, rank: int, last: tuple[int, float]) -> tuple[int, float]:
    """How many signs of life the rank has given, and when (on this rank's clock) their number last changed."""
    signs = store.add(f"alive/{tag}/{rank}", 0)
    return last if signs == last[0] else (signs, time.monotonic())


def largest(values: Sequence[float]) -> list[float]:
    """The largest of each value among all ranks; every rank gets the same answer."""
    return _reduced(values, dist.ReduceOp.MAX)


def summed(values: Sequence[float]) -> list[float]:
    """The sum of each value over all ranks; every rank gets the same answer."""
    return _reduced(values, dist.ReduceOp.SUM)


def _reduced(values: Sequence[float], how: dist.ReduceOp) -> list[float]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=how)
    return shared.tolist()


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """Whether each flag is set on any rank; every rank gets the same answer."""
    return [vote > 0 for vote in largest([float(flag) for flag in flags])]


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        # NCCL would warn that it has to guess the device.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def _share_cores(ranks: Ranks) -> None:
    """Divides the machine's cores among its processes, unless OMP_NUM_THREADS says how: threads that wait for a core
    which another process has make a step many times slower."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_size))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
