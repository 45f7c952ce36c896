"""Somebody's optimizer by the path of its class ("some.module.Class"), or by its name in pytorch-optimizer.

Its keys are the arguments that its class names. What it keeps and whether it can take steps at all, one step of a small
parameter shows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache, lru_cache, partial
from importlib import import_module
from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, create_model
from torch import nn

from optimizers.averaging import begin_training
from optimizers.kinds import Groups, OptimizerKind
from optimizers.libraries import nothing_is_kept, of_its_type
from optimizers.saved_state import FORM, remember_groups, state_by_parameter
from utils.errors import UserError
from utils.settings.schema import OptimizerSettings

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
GIVEN = ("self", "params", "lr", "weight_decay")
TRIED_ELEMENTS = 2**16
"""Larger parameters are not stepped to see what is kept of them."""
Tuple = Annotated[tuple[Any, ...], Field(strict=False)]
Number = Annotated[float, BeforeValidator(lambda given: float(given) if type(given) is int else given)]
_TYPES: Mapping[type, Any] = {bool: bool, int: int | float, float: Number, str: str, tuple: Tuple, list: list[Any]}
"""Of an argument's default -> what the key may be."""


def kind_of(name: str) -> OptimizerKind | None:
    """The optimizer that a path or a name in pytorch-optimizer means; None if it means none.

    Raises:
        ValueError: the path leads to no optimizer.
    """
    if PATH.fullmatch(name):
        return _kind(name, _at(name))
    found = _in_pytorch_optimizer(name)
    return None if found is None else _kind(f"pytorch_optimizer.{found.__name__}", found)


def _at(path: str) -> type[torch.optim.Optimizer]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f'no optimizer is at "{path}": {error}') from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        what = "nothing" if found is None else "no class of a torch.optim.Optimizer"
        raise ValueError(f'no optimizer is at "{path}": {module} has {what} of this name')
    return found


def _in_pytorch_optimizer(name: str) -> type[torch.optim.Optimizer] | None:
    from pytorch_optimizer.optimizer import OPTIMIZERS

    plain = {known.replace("_", ""): found for known, found in OPTIMIZERS.items()}
    return plain.get(name.lower().replace("-", "").replace("_", ""))


@cache
def _kind(path: str, found: type[torch.optim.Optimizer]) -> OptimizerKind:
    settings = _settings(path, found)
    return OptimizerKind(
        settings,
        partial(_build, found, "weight_decay" in inspect.signature(found).parameters),
        _state_bytes,
        not_on={},
        retyped=of_its_type,
        library=path.partition(".")[0],
        averages=callable(getattr(found, "eval", None)) and callable(getattr(found, "train", None)),
        unknown=True,
        loses_small_steps=nothing_is_kept,
    )


def _settings(path: str, found: type[torch.optim.Optimizer]) -> type[OptimizerSettings]:
    """The class of its keys.

    Raises:
        ValueError: it cannot be given what every optimizer is given.
    """
    arguments = inspect.signature(found).parameters
    if "lr" not in arguments:
        raise ValueError(f'"{path}" takes no lr, which a schedule has to change')
    fields: dict[str, Any] = {"type": (Literal[path], ...)}
    if "weight_decay" in arguments:
        default = arguments["weight_decay"].default
        fields["weight_decay"] = (Annotated[float, Field(ge=0)], default if isinstance(default, int | float) else 0.0)
    else:
        # It would be taken, and not be done.
        fields["weight_decay"] = (Annotated[float, Field(ge=0, le=0)], 0.0)
    for name, argument in arguments.items():
        if name in GIVEN or argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            continue
        kind = _TYPES.get(type(argument.default), Any)
        if argument.default is argument.empty:
            fields[name] = (Any, ...)
        elif argument.default is None:
            fields[name] = (Any, None)
        else:
            fields[name] = (kind, argument.default)
    return create_model(
        f"Settings_{found.__name__}",
        __base__=OptimizerSettings,
        __doc__=f'`type = "{path}"`: the class {found.__name__} of {found.__module__}.',
        __module__=__name__,
        **fields,
    )


def _build(
    found: type[torch.optim.Optimizer], decays: bool, groups: Groups, *, weight_decay: float, **keys: Any
) -> torch.optim.Optimizer:
    # TOML has no tuples, which most classes expect.
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    return found(groups, **given, **({"weight_decay": weight_decay} if decays else {}))


def tried(settings: OptimizerSettings, shape: tuple[int, ...] = (4, 3), **how: Any) -> dict[str, torch.Tensor]:
    """What the optimizer keeps of a parameter after two steps, by name.

    Args:
        how: the parameter's `device` and `dtype`.

    Raises:
        UserError: it cannot be made, cannot take a step without a closure, or keeps what no checkpoint can hold.
    """
    parameters = [nn.Parameter(torch.ones(one, **how)) for one in (shape, (3,))]
    kind = kind_of(settings.type)
    assert kind, settings.type
    try:
        groups = [{"params": [one], "weight_decay": settings.weight_decay} for one in parameters]
        optimizer = kind.build(groups, **settings.arguments())
        begin_training(optimizer)
        remember_groups(optimizer)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.step()
        return state_by_parameter(optimizer)[parameters[0]]
    except Exception as error:
        raise UserError.of(
            f'"{settings.type}" takes no step of a small parameter: {type(error).__name__}: {error}',
            where="[optimizer]",
        ) from error


def _state_bytes(settings: OptimizerSettings, parameter: torch.Tensor) -> int:
    """As one step shows; of a large parameter, by the share that a smaller one of as many dimensions has."""
    small = list(parameter.shape)
    while prod(small) > TRIED_ELEMENTS:
        small[small.index(max(small))] = -(-max(small) // 2)
    # Without what is a list, which no cache takes.
    kept = _kept_of(settings.model_copy(update={"rules": ()}), tuple(small), parameter.dtype)
    return round(kept * parameter.numel() / max(1, prod(small)))


@lru_cache(maxsize=1024)
def _kept_of(settings: OptimizerSettings, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    kept = tried(settings, shape, dtype=dtype)
    return sum(tensor.nbytes for key, tensor in kept.items() if tensor.ndim and not key.endswith(FORM))
