"""What an optimizer keeps, as tensors with names: what of it goes into a checkpoint.

Most keep tensors and counts for each parameter. Some keep lists, texts or nothing (None) among them, and many keep what
all parameters of a group share in the group itself: a count of steps, a sum of weights, an estimate of the distance to
go. What has changed there since the optimizer was made is saved with every parameter of the group, so that a
checkpoint, which knows names of parameters alone, fits any cut and any number of ranks.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch

GROUP = "of_group"
"""The key of the values of a parameter's group."""
FORM = ".form"
NOT_STATE = ("params", "names", "lr", "initial_lr")
_MADE_WITH = "made_with"
_SEQUENCES = {"list": list, "tuple": tuple}


def remember_groups(optimizer: torch.optim.Optimizer) -> None:
    """Call it once an optimizer is made: what its groups hold then follows from the settings, and is not saved."""
    setattr(optimizer, _MADE_WITH, [deepcopy(_values(group)) for group in optimizer.param_groups])


def state_by_parameter(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    """Parameter -> the tensors of its state, and of its group's, by names without a slash."""
    found: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for number, group in enumerate(optimizer.param_groups):
        changed = _changed(optimizer, number)
        of_group = packed(GROUP, changed) if changed else {}
        for parameter in group["params"]:
            tensors = dict(of_group) if optimizer.state.get(parameter) or of_group else {}
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors |= packed(key, value)
            found[parameter] = tensors
    return found


def restore_groups(optimizer: torch.optim.Optimizer, of_parameters: Mapping[torch.Tensor, dict[str, Any]]) -> None:
    """Gives each group the values that were saved with one of its parameters.

    Args:
        of_parameters: parameter -> what was saved of its group.
    """
    for group in optimizer.param_groups:
        saved = next((of_parameters[one] for one in group["params"] if of_parameters.get(one)), None)
        if saved:
            group.update(deepcopy(saved))


def packed(key: str, value: Any) -> dict[str, torch.Tensor]:
    """A value as tensors by name: itself if it is one, or a count; otherwise its form, and the tensors in it."""
    if isinstance(value, torch.Tensor) and (value.ndim or value.dtype == torch.float32):
        return {key: value.detach()}
    if type(value) is int:
        return {key: torch.tensor(value)}
    tensors: list[torch.Tensor] = []
    form = json.dumps(_form_of(value, tensors)).encode()
    named = {f"{key}.{number}": tensor.detach() for number, tensor in enumerate(tensors)}
    return {f"{key}{FORM}": torch.frombuffer(bytearray(form), dtype=torch.uint8), **named}


def unpacked(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
    """The values of `packed` by their keys; tensors on `device`, and those without dimensions where they were."""
    forms = [name.removesuffix(FORM) for name in tensors if name.endswith(FORM)]
    values: dict[str, Any] = {}
    parts = set()
    for key in forms:
        leaves = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}
        form = json.loads(bytes(leaves.pop(f"{key}{FORM}").tolist()))
        values[key] = _value_of(form, key, leaves, device)
        parts |= {f"{key}{FORM}", *leaves}
    for name, tensor in tensors.items():
        if name not in parts:
            values[name] = _as_kept(tensor, device)
    return values


def _as_kept(value: torch.Tensor, device: torch.device) -> torch.Tensor | int:
    """A value of an optimizer's state in the form in which the optimizer keeps it: torch counts steps in a float tensor
    on the CPU, bitsandbytes in an int, which as a tensor would move to the GPU and be read back at every step."""
    if value.ndim:
        return value.to(device)
    return value if value.is_floating_point() else int(value)


def _form_of(value: Any, tensors: list[torch.Tensor]) -> Any:
    """What JSON can say of a value; the tensors in it are appended to `tensors`.

    Raises:
        TypeError: it has a part that cannot be saved.
    """
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        form = {"tensor": len(tensors) - 1, "home": value.device.type == "cpu"}
        order = sorted(range(value.ndim), key=value.stride, reverse=True)
        is_turned = not value.is_contiguous() and value.permute(order).is_contiguous()
        return form | {"order": order} if is_turned else form
    if isinstance(value, Mapping):
        return {"dict": [[key, _form_of(one, tensors)] for key, one in value.items()]}
    for name, kind in _SEQUENCES.items():
        if type(value) is kind:
            return {name: [_form_of(one, tensors) for one in value]}
    if isinstance(value, deque):
        return {"deque": [value.maxlen, [_form_of(one, tensors) for one in value]]}
    if isinstance(value, torch.dtype):
        return {"type": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    raise TypeError(f"an optimizer's {type(value).__name__} cannot be saved in a checkpoint")


def _value_of(form: Any, key: str, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    ((kind, content),) = [(kind, content) for kind, content in form.items() if kind not in ("home", "order")]
    if kind == "tensor":
        tensor = tensors[f"{key}.{content}"]
        if order := form.get("order"):
            # By columns, as decompositions give them: products of matrices differ in the last bits otherwise.
            tensor = tensor.permute(order).contiguous().permute([order.index(place) for place in range(len(order))])
        return tensor if form["home"] and not tensor.ndim else tensor.to(device)
    if kind == "dict":
        return {name: _value_of(one, key, tensors, device) for name, one in content}
    if kind == "plain":
        return content
    if kind == "type":
        return getattr(torch, content)
    if kind == "deque":
        most, content = content
        return deque((_value_of(one, key, tensors, device) for one in content), most)
    return _SEQUENCES[kind](_value_of(one, key, tensors, device) for one in content)


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in NOT_STATE}


def _changed(optimizer: torch.optim.Optimizer, number: int) -> dict[str, Any]:
    """What a group holds that it did not when the optimizer was made."""
    made_with = getattr(optimizer, _MADE_WITH, None)
    if made_with is None:
        return {}
    before = made_with[number]
    now = _values(optimizer.param_groups[number])
    return {key: value for key, value in now.items() if key not in before or not _same(before[key], value)}


def _same(first: Any, second: Any) -> bool:
    befores: list[torch.Tensor] = []
    nows: list[torch.Tensor] = []
    if _form_of(first, befores) != _form_of(second, nows):
        return False
    return all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in zip(befores, nows, strict=True))
