"""Gradients on their way between the data ranks of a stage, while the backward pass that makes them goes on.

They travel in buckets, which follow one another in the same order on all ranks: from the last parameter to the first,
as a backward pass goes. A bucket begins its way as soon as all of its gradients are there and those before it have
begun theirs; what a rank has no gradient for counts as zeros when the pass is over. So sending takes time only where
there is nothing left to compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from utils.parallel.clipping import gradient_norms
from utils.parameter_lists import in_lists

BUCKET_ELEMENTS = 2**25
"""Elements that travel together: 128 MB in float32."""
ON_THE_WAY = 2
"""Buckets that travel at once, at most."""


@dataclass(frozen=True)
class DataRanks:
    """Those of a stage.

    Attributes:
        device: on which this one's gradients are made.
        sent_as: the type in which gradients travel; default: that in which they are summed.
    """

    group: dist.ProcessGroup
    device: torch.device
    sent_as: torch.dtype | None = None

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    def process(self, data_rank: int) -> int:
        """The number of a data rank among all processes."""
        return dist.get_global_rank(self.group, data_rank)


def buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters whose gradients travel together."""
    return in_lists(parameters, BUCKET_ELEMENTS)


def first_layer(parameters: Sequence[nn.Parameter], layers: Sequence[nn.Module]) -> int:
    """The position of the first of the layers that has one of these parameters."""
    of_these = set(map(id, parameters))
    return next(place for place, layer in enumerate(layers) if of_these & set(map(id, layer.parameters())))


def shared_by(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that several layers have: where these are recomputed, each brings a part of the gradient."""
    holders = Counter(parameter for layer in layers for parameter in set(layer.parameters()))
    return [parameter for parameter, count in holders.items() if count > 1]


def summed_in(parameter: torch.Tensor) -> torch.dtype:
    """The type in which gradients of a parameter are summed over data ranks."""
    return torch.promote_types(parameter.dtype, torch.float32)


def with_zeros(parameters: Iterable[nn.Parameter]) -> None:
    """Gives parameters without a gradient one of zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            # Of the parameter's type in torch before 2.10, which knows no other.
            parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))


class TravellingGradients(ABC):
    """What sends gradients in buckets.

    Args:
        pieces: the parameters that each piece of the stage trains, in one order on all data ranks.
        late: those whose gradients are whole only behind the backward pass; they come last.
    """

    def __init__(self, pieces: Sequence[Sequence[nn.Parameter]], ranks: DataRanks, late: Iterable[nn.Parameter] = ()):
        parameters, last = [parameter for piece in pieces for parameter in piece], set(map(id, late))
        self._parameters, self._ranks = parameters, ranks
        in_time = [[parameter for parameter in piece if id(parameter) not in last] for piece in pieces]
        self._buckets: list[list[nn.Parameter]] = []
        self._ends = [0] * len(pieces)
        """Where the buckets of each piece end. The last piece comes first."""
        for piece in reversed(range(len(pieces))):
            self._buckets += buckets(reversed(in_time[piece]))
            self._ends[piece] = len(self._buckets)
        self._buckets += buckets(parameter for parameter in parameters if id(parameter) in last)
        # With the first piece, at which a micro-batch's way back ends.
        self._ends[0] = len(self._buckets)
        self._bucket_of = {id(p): number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._pending: deque[Callable[[], None]] = deque()
        self._begin()
        for parameter in (parameter for piece in in_time for parameter in piece):
            parameter.register_post_accumulate_grad_hook(self._arrived)

    @abstractmethod
    def begin_backward(self, piece: int, *, last: bool) -> None:
        """Must be called before each backward pass of a step, by all data ranks; says whether it is the last one of
        this piece."""

    @abstractmethod
    def end_backward(self) -> None:
        """Must be called after it."""

    @abstractmethod
    def hand_over(self) -> None:
        """After all backward passes of a step: gives the parameters the means of their gradients over the ranks."""

    @abstractmethod
    def norms_of_all(self) -> torch.Tensor:
        """The norm of these means for every parameter (P,), in float32."""

    @abstractmethod
    def _kind(self, parameter: nn.Parameter) -> Hashable:
        """What gradients of a bucket must have in common to travel as one tensor."""

    @abstractmethod
    def _send(self, parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
        """Sends the gradients of parameters of one kind. Returns what waits until they are there, and takes them."""

    def _begin(self) -> None:
        self._missing = [len(bucket) for bucket in self._buckets]
        self._next, self._stop = 0, len(self._buckets)

    def _arrived(self, parameter: nn.Parameter) -> None:
        """A gradient is there."""
        number = self._bucket_of[id(parameter)]
        assert number >= self._next and self._missing[number], "a parameter's gradient came in two parts"
        self._missing[number] -= 1
        while self._is_next_ready():
            self._send_next()

    def _is_next_ready(self) -> bool:
        return self._next < self._stop and not self._missing[self._next]

    @torch.no_grad()
    def _send_next(self) -> None:
        by_kind: dict[Hashable, list[nn.Parameter]] = {}
        for parameter in self._buckets[self._next]:
            by_kind.setdefault(self._kind(parameter), []).append(parameter)
        for parameters in by_kind.values():
            self._end(ON_THE_WAY - 1)
            self._pending.append(self._send(parameters))
        self._next += 1

    def _send_rest(self) -> None:
        """Sends all that has not begun its way, and waits until all are there. The next gradients begin anew."""
        while self._next < self._stop:
            self._send_next()
        self._end(0)
        self._begin()

    @torch.no_grad()
    def _end(self, left: int) -> None:
        """Waits for those that were sent first, until so many are on their way. A GPU waits, its host does not."""
        while len(self._pending) > left:
            self._pending.popleft()()


class AveragedGradients(TravellingGradients):
    """Every data rank has all gradients. They travel once a step, in its last backward pass."""

    _is_last = False

    def begin_backward(self, piece: int, *, last: bool) -> None:
        self._is_last = last

    def end_backward(self) -> None:
        pass

    def hand_over(self) -> None:
        with_zeros(self._parameters)
        self._send_rest()
        self._is_last = False

    def norms_of_all(self) -> torch.Tensor:
        return gradient_norms(self._parameters, self._ranks.device)

    def _arrived(self, parameter: nn.Parameter) -> None:
        if self._is_last:
            super()._arrived(parameter)

    def _kind(self, parameter: nn.Parameter) -> Hashable:
        return parameter.grad.dtype, parameter.grad.device

    def _send(self, parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
        gradients = [parameter.grad for parameter in parameters]
        dtype, device = self._ranks.sent_as or summed_in(gradients[0]), self._ranks.device
        # A large one needs no copy.
        alone = len(gradients) == 1 and gradients[0].is_contiguous() and gradients[0].dtype == dtype
        alone = alone and gradients[0].device == device
        # Those of swapped blocks are in the host's memory.
        flat = gradients[0].view(-1) if alone else _flatten_dense_tensors(gradients).to(device).to(dtype)
        work = dist.all_reduce(flat, group=self._ranks.group, async_op=True)

        def end() -> None:
            work.wait()
            flat.mul_(1.0 / self._ranks.count)
            if not alone:
                means = flat.to(gradients[0].dtype).to(gradients[0].device)
                torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(means, gradients)))

        return end


class OwnedGradients(TravellingGradients):
    """A gradient is kept by its parameter's owner alone. They travel in every backward pass, and the owners sum them up
    over these.

    Where weights are gathered in that pass, too, all ranks must ask for both in one order, also if one of them has no
    gradient for something. Then buckets go between two blocks alone, by `reduce_behind`.

    Args:
        pieces, ranks, late: see `TravellingGradients`.
        owner_of: the data rank that owns a parameter.
        data_rank: this one.
        layers: of the stage, if buckets go between these alone; default: as soon as they are full.
    """

    def __init__(
        self,
        pieces: Sequence[Sequence[nn.Parameter]],
        ranks: DataRanks,
        late: Iterable[nn.Parameter] = (),
        *,
        owner_of: Callable[[nn.Parameter], int],
        data_rank: int,
        layers: Sequence[nn.Module] | None = None,
    ):
        super().__init__(pieces, ranks, late)
        self._owner_of, self._data_rank, self._sums = owner_of, data_rank, dict[int, torch.Tensor]()
        # The first layer of each bucket, if these go between layers.
        self._first_layers = [first_layer(bucket, layers) for bucket in self._buckets] if layers is not None else []

    def begin_backward(self, piece: int, *, last: bool) -> None:
        # Those of the pieces behind it come first.
        self._next, self._stop = max(self._ends[piece + 1 :], default=0), self._ends[piece]

    def end_backward(self) -> None:
        self._send_rest()

    def _is_next_ready(self) -> bool:
        return not self._first_layers and super()._is_next_ready()

    def reduce_behind(self, layer: int) -> None:
        """The backward pass has come to this layer of the stage: all gradients of those behind it are there."""
        while self._next < len(self._buckets) and self._first_layers[self._next] > layer:
            self._send_next()

    def _kind(self, parameter: nn.Parameter) -> Hashable:
        return self._owner_of(parameter), summed_in(parameter)

    def _send(self, parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
        owner, dtype = self._owner_of(parameters[0]), summed_in(parameters[0])
        gradients = [
            torch.zeros_like(p, dtype=dtype, device=self._ranks.device) if p.grad is None else p.grad.to(dtype)
            for p in parameters
        ]
        for parameter in parameters:
            parameter.grad = None
        flat = _flatten_dense_tensors(gradients).to(self._ranks.sent_as or dtype)
        work = dist.reduce(flat, self._ranks.process(owner), group=self._ranks.group, async_op=True)

        def end() -> None:
            work.wait()
            if owner == self._data_rank:
                for parameter, total in zip(
                    parameters, _unflatten_dense_tensors(flat.to(dtype), parameters), strict=True
                ):
                    before = self._sums.setdefault(id(parameter), total)
                    if before is not total:
                        before += total

        return end

    @torch.no_grad()
    def hand_over(self) -> None:
        """Gives this rank's parameters the means of their gradients over the data ranks. The others have none."""
        for parameter in self._parameters:
            total = self._sums.pop(id(parameter), None)
            if total is not None:
                # With the parameter's order of elements, which fused optimizers go by.
                dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
                parameter.grad = torch.empty_like(parameter, dtype=dtype)
                parameter.grad.copy_(total.mul_(1.0 / self._ranks.count))

    @torch.no_grad()
    def norms_of_all(self) -> torch.Tensor:
        held, zero = [p.grad is not None for p in self._parameters], torch.zeros((), device=self._ranks.device)
        # One by one, since the host would wait for the device to get a list of places.
        own = iter(gradient_norms([p for p in self._parameters if p.grad is not None], self._ranks.device).unbind())
        norms_P = torch.stack([next(own) if has_one else zero for has_one in held])
        # Each is zero on all ranks but one.
        dist.all_reduce(norms_P, group=self._ranks.group)
        return norms_P
