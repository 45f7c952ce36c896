"""Updates that are whole differences of weights or biases, as some files have them beside low ranks; and updates that
are made of others: with the scale of DoRA, or the rows of a larger one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from utils.adapters.kinds import Entry, ModelNames, Update

ENDINGS = {".diff": "weight", ".w_norm": "weight", ".diff_b": "bias", ".b_norm": "bias"}
"""The ending of a difference's name in files -> the parameter to which it belongs."""


@dataclass(frozen=True)
class WholeUpdate:
    """A difference, which is added."""

    values: torch.Tensor
    fits_beside = False

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the difference."""
        return tuple(self.values.shape)

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """The difference."""
        return self.values.float()


@dataclass(frozen=True)
class WholeValues:
    """The values that a parameter gets, in the place of those that it has."""

    values: torch.Tensor
    fits_beside = False
    needs_base = True

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the parameter."""
        return tuple(self.values.shape)

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """What they are more than the base."""
        return self.values.float().to(base.device) - base


@dataclass(frozen=True)
class RowsUpdate:
    """The rows [start, stop) of the update of a larger weight.

    Attributes:
        swap_halves: whether the larger one's halves change places before.
    """

    whole: Update
    start: int
    stop: int
    swap_halves: bool
    fits_beside = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows."""
        return self.stop - self.start, *self.whole.shape[1:]

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """The rows of the whole one, which does not depend on the base."""
        assert not isinstance(self.whole, DoraUpdate), "its norms would be those of the whole weight"
        values = self.whole.delta(base)
        return (_swapped(values) if self.swap_halves else values)[self.start : self.stop]


@dataclass(frozen=True)
class DoraUpdate:
    """An update after which the weight's rows, or its columns, are scaled to given lengths: DoRA, Liu et al. 2024, as
    LyCORIS writes it and ComfyUI applies it.

    Attributes:
        scale: (O, 1, ...) for rows or (1, I, 1, ...) for columns, with as many dimensions as the weight has.
    """

    plain: Update
    scale: torch.Tensor
    fits_beside = False

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the update without the scale."""
        return self.plain.shape

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """The difference between the scaled weight and the base. Rows are measured without the update, columns with
        it."""
        changed = base + self.plain.delta(base).to(base.device)
        dimension = 0 if len(self.scale) == len(base) else 1
        measured = base if dimension == 0 else changed
        others = [number for number in range(base.ndim) if number != dimension]
        length = torch.linalg.vector_norm(measured, dim=others, keepdim=True) + torch.finfo(torch.float32).eps
        return changed * (self.scale.float().to(base.device) / length) - base


def differences(entry: Entry, names: ModelNames) -> dict[str, Update]:
    """The updates of parameters by whole differences, by name.

    Raises:
        ValueError: there is no such parameter, or it has another size.
    """
    found: dict[str, Update] = {}
    for part, tensor in entry.tensors.items():
        own = [name if name in names.shapes else f"{name}.{part}" for name in entry.target.modules]
        if missing := [name for name in own if name not in names.shapes]:
            raise ValueError(f"'{entry.name}' changes '{missing[0]}', which this model does not have")
        rows = [names.shapes[name][0] for name in own]
        if len(own) > 1 and sum(rows) != len(tensor):
            raise ValueError(f"'{entry.name}' changes {len(tensor)} rows, and the model has {sum(rows)}")
        values = _swapped(tensor) if entry.target.swap_halves else tensor
        if len(own) == 1 and values.numel() == math.prod(names.shapes[own[0]]):
            # A table may be a single row there.
            values = values.reshape(names.shapes[own[0]])
        found |= {
            name: WholeUpdate(piece)
            for name, piece in zip(own, values.split(rows) if len(own) > 1 else [values], strict=True)
        }
    return found


def rows_of_update(entry: Entry, names: ModelNames, whole: Update) -> dict[str, Update]:
    """An update of the module of a file as updates of our modules, of which that may be made.

    Raises:
        ValueError: it has another number of rows than they have.
    """
    modules, swap = entry.target
    if len(modules) == 1 and not swap:
        return {modules[0]: whole}
    rows = [names.rows_of(module) for module in modules]
    if sum(rows) != whole.shape[0]:
        raise ValueError(f"'{entry.name}' adapts {whole.shape[0]} rows, and the model has {sum(rows)}")
    stops = [sum(rows[: number + 1]) for number in range(len(rows))]
    return {
        module: RowsUpdate(whole, stop - count, stop, swap)
        for module, count, stop in zip(modules, rows, stops, strict=True)
    }


def with_dora(updates: dict[str, Update], scale: torch.Tensor, entry: Entry) -> dict[str, Update]:
    """Updates by the name of our module, with the scale of DoRA that a file has for them together.

    Raises:
        ValueError: the scale is of an unknown shape, or its columns belong to several modules of ours.
    """
    rows, first = sum(update.shape[0] for update in updates.values()), next(iter(updates.values()))
    sides = [size for size in scale.shape if size != 1]
    fits_rows = scale.ndim == len(first.shape) and scale.shape[0] == rows and sides in ([rows], [])
    fits_columns = scale.ndim == len(first.shape) and scale.shape[0] == 1 and sides in ([first.shape[1]], [])
    if not (fits_rows or (fits_columns and len(updates) == 1)):
        raise ValueError(f"the dora_scale of '{entry.name}', {list(scale.shape)}, is of a form that is not known here")
    if not fits_rows:
        return {module: DoraUpdate(update, scale) for module, update in updates.items()}
    values = _swapped(scale) if entry.target.swap_halves else scale
    pieces = values.split([update.shape[0] for update in updates.values()])
    return {module: DoraUpdate(update, piece) for (module, update), piece in zip(updates.items(), pieces, strict=True)}


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(reversed(tensor.chunk(2))))
