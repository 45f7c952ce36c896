"""What the stages of a pipeline send one another."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from utils.parallel import wire


class StageMail:
    """Sends and receives the tensors of one stage.

    Args:
        grid: DeepSpeed's, of all processes.
        device: where tensors are received.
        description_group: through which descriptions of tensors go, on the CPU; None in a pipeline of one stage.
        is_ring: whether the last stage sends to the first one.
    """

    def __init__(
        self, grid: Any, device: torch.device, description_group: dist.ProcessGroup | None, *, is_ring: bool = False
    ):
        self._grid, self._device, self._description_group = grid, device, description_group
        self._meet(is_ring)
        self._sending: defaultdict[int, deque[list[tuple[dist.Work, torch.Tensor]]]] = defaultdict(deque)
        """By neighbouring stage, one list for each message; the tensors have to live as long."""

    def _meet(self, is_ring: bool) -> None:
        """Exchanges something with each neighbour, all pairs in one order. With NCCL two processes make what connects
        them when they first exchange something, and wait for each other, as no schedule expects it."""
        stages, own = self._grid.get_pipe_parallel_world_size(), self._grid.get_stage_id()
        pairs = {(stage, stage + 1) for stage in range(stages - 1)} | ({(0, stages - 1)} if is_ring else set())
        for first, second in sorted(pairs):
            something = torch.zeros(1, device=self._device)
            if own == first:
                dist.send(something, self._grid.stage_to_global(second))
            elif own == second:
                dist.recv(something, self._grid.stage_to_global(first))

    def buffer(self, expected: wire.TensorDescription) -> torch.Tensor:
        """Room for a tensor that is to come."""
        return torch.empty(expected.shape, dtype=expected.dtype, device=self._device)

    def send(
        self,
        tensors: Sequence[torch.Tensor],
        stage: int,
        description: wire.Description | None = None,
        *,
        under_way: int = 0,
    ) -> None:
        """Begins to send tensors, and what describes them, to a neighbouring stage; what was sent to it before has
        arrived, but for so many messages that may be under way."""
        self._wait(self._sending[stage], under_way)
        rank, described = self._grid.stage_to_global(stage), []
        if description is not None:
            numbers = wire.encode(description)
            described = [(dist.isend(numbers, rank, group=self._description_group), numbers)]
        whole = [tensor.detach().contiguous() for tensor in tensors if tensor.numel()]
        self._sending[stage].append([*described, *((dist.isend(tensor, rank), tensor) for tensor in whole)])

    def finish(self) -> None:
        """Waits until all has arrived that is on its way."""
        for messages in self._sending.values():
            self._wait(messages, 0)

    @staticmethod
    def _wait(messages: deque[list[tuple[dist.Work, torch.Tensor]]], left: int) -> None:
        """Until the first ones have arrived, so that so many are left."""
        while len(messages) > left:
            for work, _ in messages.popleft():
                work.wait()

    def description(self, stage: int) -> wire.Description:
        """That of the tensors that a neighbouring stage sends next."""
        numbers = torch.empty(wire.DESCRIPTION_NUMBERS, dtype=torch.int64)
        dist.recv(numbers, self._grid.stage_to_global(stage), group=self._description_group)
        return wire.decode(numbers)

    def receive(self, tensors: Sequence[torch.Tensor], stage: int) -> None:
        """Fills tensors with what a neighbouring stage sends."""
        rank = self._grid.stage_to_global(stage)
        for work in [dist.irecv(tensor, rank) for tensor in tensors if tensor.numel()]:
            work.wait()

    def from_last_stage(self, tensors: Sequence[torch.Tensor], count: int, *, is_last: bool) -> list[torch.Tensor]:
        """The last stage's tensors, on all stages of its pipeline."""
        group, stages = self._grid.get_pipe_parallel_group(), self._grid.get_pipe_parallel_world_size()
        if stages == 1:
            return list(tensors)
        source, received = self._grid.stage_to_global(stages - 1), []
        for index in range(count):
            if is_last:
                _, description = wire.flatten((tensors[index],))
                numbers = wire.encode(description).to(self._device)
            else:
                numbers = torch.empty(wire.DESCRIPTION_NUMBERS, dtype=torch.int64, device=self._device)
            dist.broadcast(numbers, source, group=group)
            (expected,) = wire.decode(numbers.cpu()).tensors
            tensor = tensors[index].contiguous() if is_last else self.buffer(expected)
            dist.broadcast(tensor, source, group=group)
            received.append(tensor)
        return received
