"""What each data rank of a stage keeps of its training, where all of them would keep the same (ZeRO, Rajbhandari et al.
2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", stages 1 and 2; the third is in
`divided.py`).

A data rank's share is of whole parameters. It has their optimizer state, steps them, and sends the result to the
others; from the second stage on it alone has their gradients too. Where something is follows from names and sizes, so
that a checkpoint, which knows names alone, fits any number of ranks.

With `offload` the optimizer steps copies of the parameters in the host's memory, beside which it keeps its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from utils.parallel.transfers import aligned, dense_strides, host_memory
from utils.parallel.travelling import AveragedGradients, DataRanks, OwnedGradients, buckets
from utils.ranks import Ranks


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


def owner_of(parameters: Mapping[str, nn.Parameter], data_ranks: int) -> Callable[[torch.Tensor], int]:
    """What says which data rank owns one of these parameters, which have their names."""
    found = owners({name: parameter.numel() for name, parameter in parameters.items()}, data_ranks)
    by_number = {id(parameter): found[name] for name, parameter in parameters.items()}
    return lambda tensor: by_number[id(tensor)]


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

    def show_values(self) -> None:
        """The same, where what the optimizer has may change before its next step."""
        self.after_step()
        if self._host:
            self._host.wait()

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

    def travelling_gradients(
        self,
        pieces: Sequence[Sequence[nn.Parameter]],
        sent_as: torch.dtype | None = None,
        layers: Sequence[nn.Module] | None = None,
        late: Iterable[nn.Parameter] = (),
    ) -> AveragedGradients | OwnedGradients | None:
        """What sends the gradients of all that the pieces of a stage train to the data ranks that keep them; None if
        there is one alone. See `OwnedGradients` and `TravellingGradients`."""
        among = DataRanks(self._group, self._device, sent_as)
        if not any(pieces) or among.count == 1:
            return None
        if not self.divides_gradients:
            return AveragedGradients(pieces, among, late)
        return OwnedGradients(pieces, among, late, owner_of=self.owner_of, data_rank=self.data_rank, layers=layers)


class HostCopies:
    """Copies of parameters and gradients in the host's memory, which the optimizer works with.

    Attributes:
        twins: the copies of the parameters, in their order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, pinned: bool):
        self._parameters, self._pinned = parameters, pinned
        dtypes = [parameter.dtype for parameter in parameters]
        # Memory is locked as long as its tensor is there, and not as long as what lies in it.
        self._memory, values = _packed(parameters, dtypes, pinned=pinned)
        self.twins = [nn.Parameter(value) for value in values]
        self._memory_of_gradients: torch.Tensor | None = None
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
            dtypes = [gradient.dtype for gradient in given]
            self._memory_of_gradients, self._gradients = _packed(self._parameters, dtypes, pinned=self._pinned)
        for twin, parameter, kept in zip(self.twins, self._parameters, self._gradients, strict=True):
            kept.copy_(parameter.grad, non_blocking=True)
            parameter.grad = None
            if twin.grad is None:
                # Of another type than the parameter's, where it says so.
                if getattr(parameter, "grad_dtype", None) is not None:
                    twin.grad_dtype = parameter.grad_dtype
                twin.grad = kept
        self.wait()

    def wait(self) -> None:
        """Returns when the device has done what it was asked."""
        device = self._parameters[0].device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    @torch.no_grad()
    def give_values(self) -> None:
        """Copies back what the optimizer made of the parameters. Before the copies change again, somebody must have
        waited for the device, which works in order, as `take_gradients` does."""
        for twin, parameter in zip(self.twins, self._parameters, strict=True):
            parameter.copy_(twin, non_blocking=True)


def _packed(
    forms: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], *, pinned: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One piece of the host's memory, and the tensors of these forms and types in it, without values."""
    sizes = [form.numel() * dtype.itemsize for form, dtype in zip(forms, dtypes, strict=True)]
    memory = host_memory(sum(map(aligned, sizes)), pinned=pinned)
    tensors, start = [], 0
    for form, dtype, size in zip(forms, dtypes, sizes, strict=True):
        flat = memory[start : start + size].view(dtype)
        tensors.append(flat.as_strided(form.shape, dense_strides(form)))
        start += aligned(size)
    return memory, tensors
