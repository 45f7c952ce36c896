"""A device that is pretended: the CPU's memory, of which some is marked as the device's.

Everything is computed with its values, so that the trainer's own code runs on it: block swap, experts, the engine, an
optimizer. A marked tensor says that its `device` is `DEVICE`, what is made of it is marked too, and factories follow
the device that they are asked for. What a GPU would refuse, or would let the host wait for, is noted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from utils.parallel.transfers import ImmediateTransfers

DEVICE = torch.device("privateuseone:0")
ROOT = str(Path(__file__).parents[1])
aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.equal,
    aten._linalg_check_errors,
}
"""Operations from which a GPU's host returns only when the device has come to them."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}
SLOW = {aten.mm, aten.addmm, aten.bmm, aten.convolution, aten.convolution_backward}
"""In bfloat16, on a CPU."""
DEVICE_OF = torch.Tensor.device.__get__
READS = {torch.Tensor.tolist, torch.Tensor.numpy}
FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray}
"""Factories that copy what they are given."""


class PretendedDevice:
    """A context in which `DEVICE` exists.

    Args:
        samples: of a batch. What is computed for each of them once may be in float32, and what has more rows may not.

    Attributes:
        faults: tensors of two devices in one operation, unless one is a number; products of activations in float32.
            Each is a line with the operation and its place.
        waits: what lets the host wait for the device: copies that are not asynchronous, values that are read, and
            shapes that depend on values.
    """

    def __init__(self, samples: int = 1) -> None:
        self.samples = samples
        self.faults: list[str] = []
        self.waits: list[str] = []
        # What is marked lives as long as this object, so that no other memory gets its number.
        self._marked: dict[int, torch.UntypedStorage] = {}
        self._activations: set[int] = set()
        self._makes = False
        self._functions, self._operations = _Functions(self), _Operations(self)

    def __enter__(self) -> PretendedDevice:
        self._operations.__enter__()
        self._functions.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._functions.__exit__(*exception)
        self._operations.__exit__(*exception)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the device."""
        return tensor.untyped_storage()._cdata in self._marked

    def mark(self, tensor: torch.Tensor) -> None:
        """What shares the tensor's memory is on the device."""
        storage = tensor.untyped_storage()
        self._marked[storage._cdata] = storage

    def is_activation(self, tensor: torch.Tensor) -> bool:
        """Whether it was made of what `follow` was given."""
        return tensor.untyped_storage()._cdata in self._activations

    def follow(self, tensor: torch.Tensor) -> torch.Tensor:
        """It, and what is made of it, are activations."""
        self._activations.add(tensor.untyped_storage()._cdata)
        return tensor

    def watched(self, module: Callable) -> Callable:
        """It; autograd's backward pass does not see what Python asks for, unless a module that it calls is this one."""

        def call(*inputs: Any) -> Any:
            if _get_current_function_mode() is not None:
                return module(*inputs)
            with self._functions:
                return module(*inputs)

        return call

    @contextmanager
    def making(self, here: bool) -> Iterator[None]:
        """A context in which tensors that are made of nothing are on the device, or are not."""
        before, self._makes = self._makes, here
        try:
            yield
        finally:
            self._makes = before


class PretendedTransfers(ImmediateTransfers):
    """Copies to the device and back for which the host does not wait, like CUDA's."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: None) -> None:
        """See `Transfers`."""
        target.copy_(source, non_blocking=True)


class _Functions(TorchFunctionMode):
    """What Python asks for: devices of tensors, factories, and copies between devices."""

    def __init__(self, device: PretendedDevice):
        super().__init__()
        self._device = device

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs, device = kwargs or {}, self._device
        if function == DEVICE_OF:
            return DEVICE if device.has(args[0]) else function(*args)
        if function is torch.Tensor.backward:
            with device.making(True):
                return torch.autograd.backward(args[0], kwargs.get("gradient"))
        if function is torch.Tensor.cpu:
            return self._moved(args[0], torch.device("cpu"))
        if function is torch.Tensor.to:
            return self._moved(args[0], *_asked(device, args[1:], kwargs))
        here = any(map(device.has, _tensors(args, kwargs)))
        if function in READS and here:
            device.waits.append(_line(function.__name__))
        if not _is_pretended(kwargs.get("device")):
            with device.making(here and "device" not in kwargs):
                return function(*args, **kwargs)
        if function in FROM_VALUES:
            device.waits.append(_line(f"{function.__name__} of values"))
        with device.making(True):
            made = function(*args, **{**kwargs, "device": "cpu"})
        device.mark(made)
        return made

    def _moved(
        self,
        tensor: torch.Tensor,
        target: torch.device | None,
        dtype: torch.dtype | None = None,
        asynchronous: bool = False,
        copy: bool = False,
    ) -> torch.Tensor:
        device, dtype = self._device, dtype or tensor.dtype
        if target is not None and target.type == "meta":
            return tensor.to(target, dtype)
        before = device.has(tensor)
        after = before if target is None else _is_pretended(target)
        if before == after:
            with device.making(after):
                return tensor.to(dtype=dtype, copy=copy)
        if not asynchronous:
            device.waits.append(_line("a copy between devices"))
        with device._operations.crossing():
            moved = tensor.to(dtype=dtype, copy=True)
        if after:
            device.mark(moved)
        return moved


class _Operations(TorchDispatchMode):
    """What is computed, forward and backward."""

    def __init__(self, device: PretendedDevice):
        super().__init__()
        self._device = device
        self._crosses = False

    @contextmanager
    def crossing(self) -> Iterator[None]:
        """A context of a copy from one device to the other."""
        self._crosses = True
        try:
            yield
        finally:
            self._crosses = False

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs, device, packet = kwargs or {}, self._device, operation.overloadpacket
        tensors = _tensors(args, kwargs)
        here = [device.has(tensor) for tensor in tensors]
        made = _quickly(operation, args) if packet in SLOW else operation(*args, **kwargs)
        if self._crosses:
            return made
        if packet is aten.copy_:
            if here[0] != here[1] and not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
                device.waits.append(_line("a copy between devices"))
            return made
        if any(here):
            self._look(packet, tensors, here, made)
        if any(here) or (not tensors and device._makes):
            follows = any(map(device.is_activation, tensors))
            for tensor in _tensors((made,), {}):
                device.mark(tensor)
                if follows:
                    device.follow(tensor)
        return made

    def _look(self, packet: Any, tensors: list[torch.Tensor], here: list[bool], made: Any) -> None:
        device = self._device
        elsewhere = [t for t, there in zip(tensors, here, strict=True) if not there and t.dim() and t.numel()]
        if elsewhere:
            forms = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in elsewhere)
            device.faults.append(_line(f"{packet.__name__}: on the CPU is {forms}"))
        by_mask = packet in INDEXING and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
        if packet in WAITING or by_mask or (packet is aten.repeat_interleave and len(tensors) == 1):
            device.waits.append(_line(packet.__name__))
        # Types of a backward pass follow from those of the forward pass; that of factors may be wider.
        if packet in PRODUCTS and made.dtype == torch.float32 and torch.is_grad_enabled():
            if made.numel() > device.samples * made.shape[-1] and any(map(device.is_activation, tensors)):
                device.faults.append(_line(f"{packet.__name__}: float32 {list(made.shape)}"))


def _is_pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _asked(device: PretendedDevice, args: tuple, kwargs: dict) -> tuple[Any, ...]:
    """What `Tensor.to` is asked for: device, type, whether asynchronously, whether a copy at any rate."""
    other = kwargs.get("other", args[0] if args else None)
    if isinstance(other, torch.Tensor):
        return DEVICE if device.has(other) else other.device, other.dtype
    copy = kwargs.get("copy", False)
    return *torch._C._nn._parse_to(*args, **{key: kwargs[key] for key in kwargs if key != "copy"})[:3], copy


def _tensors(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors among arguments or results, and in lists of these."""
    found = []
    for one in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, list | tuple):
            found += [part for part in one if isinstance(part, torch.Tensor)]
    return found


def _quickly(operation: Any, args: tuple) -> Any:
    """What an operation makes; of bfloat16 by way of float32, in which a CPU is much faster."""
    if {one.dtype for one in args if isinstance(one, torch.Tensor)} != {torch.bfloat16}:
        return operation(*args)
    wide = [one.float() if isinstance(one, torch.Tensor) else one for one in args]
    return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, operation(*wide))


def _line(what: str) -> str:
    """With the places in the trainer and in diffusers from which it was asked."""
    frame, places = sys._getframe(2), []
    while frame and len(places) < 4:
        path = frame.f_code.co_filename
        if "diffusers" in path or (path.startswith(ROOT) and "/tests/" not in path):
            places.append(f"{'/'.join(Path(path).parts[-2:])}:{frame.f_lineno}")
        frame = frame.f_back
    return f"{what} at {' < '.join(places) or 'the test'}"
