"""What each data rank of a stage keeps of its training, where all of them would keep the same (ZeRO, Rajbhandari et al.
2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", stages 1 and 2; the third is in
`divided.py`).

A data rank's share is of whole parameters. It has their optimizer state, steps them, and sends the result to the
others; from the second stage on it alone has their gradients too. Where something is follows from names and sizes, so
that a checkpoint, which knows names alone, fits any number of ranks.

With `offload` the optimizer steps copies of the parameters in the host's memory, beside which it keeps its state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from utils.parallel.clipping import gradient_norms
from utils.parallel.transfers import aligned, dense_strides, host_memory
from utils.parameter_lists import in_lists
from utils.ranks import Ranks

BUCKET_ELEMENTS = 2**25
"""Elements that travel together: 128 MB in float32."""


def owners(sizes: Mapping[str, int], data_ranks: int) -> dict[str, int]:
    """The data rank that owns each parameter: the largest one comes first, and each goes to the rank that has least.

    Args:
        sizes: name of a parameter -> its number of elements.
    """
    held, found = [0] * data_ranks, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        found[name] = held.index(min(held))
        held[found[name]] += sizes[name]
    return found


def buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters whose gradients travel together."""
    return in_lists(parameters, BUCKET_ELEMENTS)


def first_layer(parameters: Sequence[nn.Parameter], layers: Sequence[nn.Module]) -> int:
    """The position of the first of the layers that has one of these parameters."""
    of_these = set(map(id, parameters))
    return next(place for place, layer in enumerate(layers) if of_these & set(map(id, layer.parameters())))


def summed_in(parameter: torch.Tensor) -> torch.dtype:
    """The type in which gradients of a parameter are summed over data ranks."""
    return torch.promote_types(parameter.dtype, torch.float32)


class Shares:
    """Which of a stage's trained parameters this data rank steps, and where.

    Args:
        parameters: those of the stage, by name.
        ranks: this process; alone it steps all of them.
        zero_stage: 0, where every data rank steps all parameters; 1; or 2 and 3, where an owner alone has the gradients
            too.
        offload: the optimizer steps copies in the host's memory.
        pinned: whether that memory is locked, for copies to a CUDA device.
        at_home: those that are in the host's memory anyway, with their gradients, and are stepped there.
        apart: those of which only an owner has the values, between passes; if anything is divided.

    Attributes:
        stepped: the parameters of this share as the optimizer has them, by name.
        held: the parameters that have their values on this data rank, by name.
        written: those of which this data rank writes the values for all.
        divided: whether data ranks have different shares.
        divides_gradients: whether a gradient is kept by its parameter's owner alone.
        is_stepping: whether the optimizer has begun a step, and not all that belongs to it is done.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        ranks: Ranks | None = None,
        zero_stage: int = 0,
        *,
        offload: bool = False,
        pinned: bool = False,
        at_home: Iterable[nn.Parameter] = (),
        apart: Iterable[nn.Parameter] = (),
    ):
        self._ranks, self.is_stepping = ranks or Ranks(), False
        self.divided = zero_stage > 0 and self._ranks.data_ranks > 1
        self.divides_gradients = self.divided and zero_stage > 1
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        owner_of = owners(sizes, self._ranks.data_ranks) if self.divided else dict.fromkeys(sizes, self.data_rank)
        self._owned = {name: p for name, p in parameters.items() if owner_of[name] == self.data_rank}
        self._owners = {id(parameters[name]): rank for name, rank in owner_of.items()}
        by_kind: dict[tuple[int, torch.dtype, bool], list[nn.Parameter]] = {}
        elsewhere = set(map(id, apart)) if self.divided else set()
        stay = set(map(id, at_home))
        self.held = {n: p for n, p in parameters.items() if n in self._owned or id(p) not in elsewhere}
        self.written = {n: p for n, p in self.held.items() if id(p) in elsewhere or not self.data_rank}
        for name, parameter in parameters.items():
            if id(parameter) not in elsewhere:
                kind = owner_of[name], parameter.dtype, id(parameter) in stay
                by_kind.setdefault(kind, []).append(parameter)
        self._parts = [(owner, part) for (owner, *_), some in by_kind.items() for part in buckets(some)]
        copied = {name: p for name, p in self._owned.items() if offload and id(p) not in stay}
        self._host = HostCopies(list(copied.values()), pinned=pinned) if copied else None
        twins = dict(zip(copied, self._host.twins if self._host else (), strict=True))
        self.stepped: dict[str, nn.Parameter] = {name: twins.get(name, p) for name, p in self._owned.items()}
        self._group: dist.ProcessGroup | None = None

    @property
    def data_rank(self) -> int:
        return self._ranks.data_rank

    def start(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Names the group of the stage's data ranks and its device; the parameters are where they are to be."""
        self._group, self._device = group, device
        self.take_values()

    def owner_of(self, parameter: nn.Parameter) -> int:
        """The data rank that steps a parameter."""
        return self._owners[id(parameter)]

    def take_values(self) -> None:
        """Must be called when parameters were given other values than by `after_step`."""
        if self._host:
            self._host.take_values()

    def before_step(self) -> None:
        """Gives the optimizer the gradients of what it steps."""
        self.is_stepping = True
        if self._host:
            self._host.take_gradients()

    def after_step(self) -> None:
        """Lets the parameters of all ranks have the values that the optimizers gave them."""
        if self._host:
            self._host.give_values()
        self.complete()
        self.is_stepping = False

    @torch.no_grad()
    def complete(self) -> None:
        """Sends the values of each share to the other data ranks, which all call this together."""
        if not self.divided:
            return
        for owner, parameters in self._parts:
            own = owner == self.data_rank
            # One alone needs no copy, where its elements lie in order.
            alone = len(parameters) == 1 and parameters[0].is_contiguous() and parameters[0].device == self._device
            if alone:
                flat = parameters[0].detach().view(-1)
            elif own:
                # Those of swapped blocks are in the host's memory.
                flat = _flatten_dense_tensors([parameter.detach() for parameter in parameters]).to(self._device)
            else:
                count = sum(parameter.numel() for parameter in parameters)
                flat = torch.empty(count, dtype=parameters[0].dtype, device=self._device)
            # As bytes, since not every backend knows every type.
            dist.broadcast(flat.view(torch.uint8), dist.get_global_rank(self._group, owner), group=self._group)
            if not own and not alone:
                values = _unflatten_dense_tensors(flat.to(parameters[0].device), parameters)
                torch._foreach_copy_(parameters, list(values))

    def reduced_gradients(
        self,
        parameters: Sequence[nn.Parameter],
        sent_as: torch.dtype | None = None,
        layers: Sequence[nn.Module] | None = None,
    ) -> ReducedGradients | None:
        """What keeps the gradients of these parameters, all that the stage trains, at their owners; None where every
        data rank keeps all of them. See `ReducedGradients`."""
        if not (self.divides_gradients and parameters):
            return None
        owned_by = [self.owner_of(parameter) for parameter in parameters]
        return ReducedGradients(parameters, owned_by, self.data_rank, self._group, self._device, sent_as, layers)


class HostCopies:
    """Copies of parameters and gradients in the host's memory, which the optimizer works with.

    Attributes:
        twins: the copies of the parameters, in their order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, pinned: bool):
        self._parameters, self._pinned = parameters, pinned
        values = _packed(parameters, [parameter.dtype for parameter in parameters], pinned=pinned)
        self.twins = [nn.Parameter(value) for value in values]
        self._gradients: list[torch.Tensor] = []
        self.take_values()

    @torch.no_grad()
    def take_values(self) -> None:
        """Copies the parameters."""
        for twin, parameter in zip(self.twins, self._parameters, strict=True):
            twin.copy_(parameter)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Moves the parameters' gradients, and waits for them."""
        given = [parameter.grad for parameter in self._parameters]
        if not self._gradients:
            self._gradients = _packed(self._parameters, [gradient.dtype for gradient in given], pinned=self._pinned)
        for twin, parameter, kept in zip(self.twins, self._parameters, self._gradients, strict=True):
            kept.copy_(parameter.grad, non_blocking=True)
            parameter.grad = None
            if twin.grad is None:
                # Of another type than the parameter's, where it says so.
                if getattr(parameter, "grad_dtype", None) is not None:
                    twin.grad_dtype = parameter.grad_dtype
                twin.grad = kept
        if given and given[0].is_cuda:
            torch.cuda.current_stream(given[0].device).synchronize()

    @torch.no_grad()
    def give_values(self) -> None:
        """Copies back what the optimizer made of the parameters. Before the copies change again, `take_gradients` has
        waited for the device, which works in order."""
        for twin, parameter in zip(self.twins, self._parameters, strict=True):
            parameter.copy_(twin, non_blocking=True)


def _packed(forms: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], *, pinned: bool) -> list[torch.Tensor]:
    """Tensors of these forms and types, without values, in one piece of the host's memory."""
    sizes = [form.numel() * dtype.itemsize for form, dtype in zip(forms, dtypes, strict=True)]
    memory = host_memory(sum(map(aligned, sizes)), pinned=pinned)
    tensors, start = [], 0
    for form, dtype, size in zip(forms, dtypes, sizes, strict=True):
        flat = memory[start : start + size].view(dtype)
        tensors.append(flat.as_strided(form.shape, dense_strides(form)))
        start += aligned(size)
    return tensors


class ReducedGradients:
    """Gradients that are summed over the data ranks while the backward pass of a micro-batch runs, and kept by their
    owners alone.

    They travel in buckets, which follow one another in the same order on all ranks: from the last parameter to the
    first, as a backward pass goes. A bucket waits until those before it have gone. What a rank has no gradient for
    counts as zeros when the pass is over.

    Where weights are gathered in that pass, too, all ranks must ask for both in one order, also if one of them has no
    gradient for something. Then buckets go between two blocks alone, by `reduce_behind`.

    Args:
        parameters: all that the stage trains, in one order on all data ranks.
        owned_by: their owners.
        group: of the data ranks.
        device: on which gradients are made.
        sent_as: the type in which gradients travel; default: that in which they are summed.
        layers: of the stage, if buckets go between these alone; default: as soon as they are full.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        owned_by: Sequence[int],
        data_rank: int,
        group: dist.ProcessGroup,
        device: torch.device,
        sent_as: torch.dtype | None,
        layers: Sequence[nn.Module] | None = None,
    ):
        self._parameters, self._data_rank = parameters, data_rank
        self._group, self._device, self._sent_as = group, device, sent_as
        self._owners = {id(p): owner for p, owner in zip(parameters, owned_by, strict=True)}
        self._buckets = list(buckets(reversed(parameters)))
        self._bucket_of = {id(p): number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._sums: dict[int, torch.Tensor] = {}
        # The first layer of each bucket, if these go between layers.
        self._first_layers = [first_layer(bucket, layers) for bucket in self._buckets] if layers is not None else []
        self._begin()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _begin(self) -> None:
        self._missing = [len(bucket) for bucket in self._buckets]
        self._next = 0

    def _arrived(self, parameter: nn.Parameter) -> None:
        """A gradient is there."""
        number = self._bucket_of[id(parameter)]
        assert number >= self._next and self._missing[number], "a parameter's gradient came in two parts"
        self._missing[number] -= 1
        while not self._first_layers and self._next < len(self._buckets) and not self._missing[self._next]:
            self._reduce_next()

    def reduce_behind(self, layer: int) -> None:
        """The backward pass has come to this layer of the stage: all gradients of those behind it are there."""
        while self._next < len(self._buckets) and self._first_layers[self._next] > layer:
            self._reduce_next()

    @torch.no_grad()
    def _reduce_next(self) -> None:
        """Sends the next bucket's gradients to their owners."""
        by_kind: dict[tuple[int, torch.dtype], list[nn.Parameter]] = {}
        for parameter in self._buckets[self._next]:
            by_kind.setdefault((self._owners[id(parameter)], summed_in(parameter)), []).append(parameter)
        self._next += 1
        for (owner, dtype), parameters in by_kind.items():
            gradients = [
                torch.zeros_like(p, dtype=dtype, device=self._device) if p.grad is None else p.grad.to(dtype)
                for p in parameters
            ]
            for parameter in parameters:
                parameter.grad = None
            flat = _flatten_dense_tensors(gradients).to(self._sent_as or dtype)
            dist.reduce(flat, dist.get_global_rank(self._group, owner), group=self._group)
            flat = flat.to(dtype)
            if owner == self._data_rank:
                for parameter, total in zip(parameters, _unflatten_dense_tensors(flat, parameters), strict=True):
                    before = self._sums.setdefault(id(parameter), total)
                    if before is not total:
                        before += total

    def end_backward(self) -> None:
        """Must be called after the backward pass of each micro-batch, by all data ranks."""
        while self._next < len(self._buckets):
            self._reduce_next()
        self._begin()

    @torch.no_grad()
    def hand_over(self) -> None:
        """Gives this rank's parameters the means of their gradients over the data ranks. The others have none."""
        data_ranks = dist.get_world_size(self._group)
        for parameter in self._parameters:
            total = self._sums.pop(id(parameter), None)
            if total is not None:
                # With the parameter's order of elements, which fused optimizers go by.
                dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
                parameter.grad = torch.empty_like(parameter, dtype=dtype)
                parameter.grad.copy_(total.mul_(1.0 / data_ranks))

    @torch.no_grad()
    def norms_of_all(self) -> torch.Tensor:
        """The norm of the gradient of every parameter (P,), in float32."""
        places = [place for place, parameter in enumerate(self._parameters) if parameter.grad is not None]
        norms_P = torch.zeros(len(self._parameters), device=self._device)
        if places:
            norms_P[places] = gradient_norms([self._parameters[place] for place in places], self._device)
        # Each is zero on all ranks but one.
        dist.all_reduce(norms_P, group=self._group)
        return norms_P
