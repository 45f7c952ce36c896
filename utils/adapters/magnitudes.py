"""The lengths of a weight's rows that DoRA trains (Liu et al. 2024), as files have them.

PEFT's `lora_magnitude_vector` is the length m of a row of W + U, where U is the update: the row is m (W + U) / |W + U|.
In `dora_scale`, of which there is one for each row too, ComfyUI sees the length d of a row of W without the update, and
computes d (W + U) / |W|. So one becomes the other by |W| / |W + U|, which takes the weight itself.

Shapes: O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from utils.adapters.base_weight import row_lengths
from utils.adapters.kinds import DORA_SCALE, Entry, ModelNames, Update

MAGNITUDE = "lora_magnitude_vector"
Pair = tuple[torch.Tensor, torch.Tensor]
EPSILON = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class MagnitudeUpdate:
    """An update after which the rows of the weight have these lengths (O)."""

    plain: Update
    lengths_O: torch.Tensor
    fits_beside = False

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the update without the lengths."""
        return self.plain.shape

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """The difference between the weight with these lengths and the base."""
        changed = base + self.plain.delta(base).to(base.device)
        there = torch.linalg.vector_norm(changed.flatten(1), dim=1).clamp_min(EPSILON)
        ratio_O = self.lengths_O.flatten().float().to(base.device) / there
        return changed * ratio_O.view(-1, *[1] * (base.ndim - 1)) - base


def magnitudes(entry: Entry, pairs: Mapping[str, Pair], scale: float, names: ModelNames) -> dict[str, torch.Tensor]:
    """The lengths (O) of the rows that a file, or a plain LoRA, gives our modules.

    Args:
        pairs: both factors of each of them.
        scale: of their product.

    Raises:
        ValueError: they are lengths of columns, or not of these modules; or the weight is needed and cannot be read.
    """
    if MAGNITUDE in entry.tensors:
        return _divided(entry.tensors[MAGNITUDE].flatten(), entry, names)
    weights = {module: names.weight(module) for module in pairs}
    changed = {module: row_lengths(weights[module], *pair, scale) for module, pair in pairs.items()}
    if DORA_SCALE not in entry.tensors:
        return changed
    given = entry.tensors[DORA_SCALE]
    if given.shape[0] != sum(map(names.rows_of, entry.target.modules)):
        raise ValueError(f"the dora_scale of '{entry.name}' has lengths of columns, and those of rows are trained here")
    divided = _divided(given.flatten(), entry, names)
    return {module: divided[module].float() * changed[module] / _lengths(weights[module]) for module in pairs}


def with_magnitudes(updates: Mapping[str, Update], entry: Entry, names: ModelNames) -> dict[str, Update]:
    """Updates of our modules by one of a file, with its lengths.

    Raises:
        ValueError: there are not as many as the modules have rows.
    """
    lengths = _divided(entry.tensors[MAGNITUDE].flatten(), entry, names)
    return {module: MagnitudeUpdate(update, lengths[module]) for module, update in updates.items()}


def dora_scale(weight: torch.Tensor, pair: Pair | None, scale: float, magnitude: torch.Tensor | None) -> torch.Tensor:
    """What ComfyUI is to be told (O, 1, ...) of a weight in float32 and its update; of one without an update its own
    lengths."""
    lengths_O = _lengths(weight)
    if pair is not None and magnitude is not None:
        lengths_O = magnitude.flatten().float() * lengths_O / row_lengths(weight, *pair, scale)
    return lengths_O.view(-1, *[1] * (weight.ndim - 1))


def _lengths(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(weight.float().flatten(1), dim=1).clamp_min(EPSILON)


def _divided(values_O: torch.Tensor, entry: Entry, names: ModelNames) -> dict[str, torch.Tensor]:
    """What a file has for the rows of a module, for each of ours of which that is made.

    Raises:
        ValueError: it has another number of rows.
    """
    rows = [names.rows_of(module) for module in entry.target.modules]
    if len(values_O) != sum(rows):
        raise ValueError(f"'{entry.name}' has {len(values_O)} lengths of rows, and the model has {sum(rows)} rows")
    values_O = torch.cat(list(reversed(values_O.chunk(2)))) if entry.target.swap_halves else values_O
    return dict(zip(entry.target.modules, values_O.split(rows), strict=True))
