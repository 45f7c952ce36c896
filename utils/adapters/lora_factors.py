"""The factors of LoRAs as files have them, of all programs: both of each module, divided among ours.

Shapes: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.nn import functional

from utils.adapters.kinds import ADAPTER, ALPHA, Entry, ModelNames
from utils.adapters.peft_settings import peft_settings
from utils.json_files import shown

DOWN, UP, MID = "lora_A", "lora_B", "lora_mid"
FOLDED_SCALE = "folded_scale"
"""The key of our headers for the factor that is multiplied into every `lora_A`, since ComfyUI reads no header."""
FOLDED_SCALES = "folded_scales"
"""The key for those of modules that have another one, by our names, as JSON."""


class LowRankUpdate(NamedTuple):
    """The update of a layer's weight by a LoRA: up @ down. For a convolution they are (R, I, ...) and (O, R, 1,
    ...)."""

    down: torch.Tensor
    up: torch.Tensor

    @property
    def fits_beside(self) -> bool:
        """Always."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return len(self.up), *self.down.shape[1:]

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """The product in the shape of the weight."""
        return (self.up.flatten(1).float() @ self.down.flatten(1).float()).view(self.shape)

    def kept(self, weight: float) -> tuple[torch.Tensor, ...]:
        """Both factors."""
        return self.down * weight, self.up

    @staticmethod
    def applied(x: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        """`x` through both factors."""
        down, up = kept
        return functional.linear(functional.linear(x, down), up)


def pair_of(entry: Entry) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Both factors of a file's module, (R, I, ...) and (O, R, ...), and the scale of their product.

    Raises:
        ValueError: one is missing, or they do not fit each other.
    """
    for part in (DOWN, UP):
        if part not in entry.tensors:
            raise entry.lacks(part)
    down, up, mid = entry.tensors[DOWN], entry.tensors[UP], entry.tensors.get(MID)
    rank = len(down)
    fits = up.ndim >= 2 and down.ndim >= 2 and up.shape[1] == (rank if mid is None else len(mid))
    if not fits or up[0].numel() != up.shape[1]:
        raise ValueError(f"the factors of '{entry.name}' are {list(down.shape)} and {list(up.shape)}, which is no LoRA")
    if mid is not None:
        # Tucker's form, whose core is a convolution between both.
        if mid.ndim != 4 or mid.shape[1] != rank:
            raise ValueError(f"the lora_mid of '{entry.name}', {list(mid.shape)}, does not fit its other factors")
        down = torch.einsum("rshw,si->rihw", mid.float(), down.flatten(1).float())
    return _undone(down, entry), up, _scale(entry, rank)


def _folded(entry: Entry) -> float:
    """The scale that is in the `lora_A` of a module in a file of ours; 1 in others.

    Raises:
        ValueError: the header has something else than such a scale.
    """
    said = entry.file.metadata.get(FOLDED_SCALE, "1.0")
    try:
        others = json.loads(entry.file.metadata.get(FOLDED_SCALES, "{}"))
        folded = float(others.get(entry.target.modules[0], said))
    except (AttributeError, TypeError, ValueError):
        folded = 0.0
    if not (math.isfinite(folded) and folded > 0):
        raise ValueError(
            f"`{FOLDED_SCALE}` in its header is {shown(said)}, and a number above 0 is meant; the file is damaged: "
            "export it again"
        )
    return folded


def _undone(down: torch.Tensor, entry: Entry) -> torch.Tensor:
    """`lora_A` as it was trained, if the file is ours and a scale is in it."""
    folded = _folded(entry)
    return down if folded == 1.0 else down.float() / folded


def _scale(entry: Entry, rank: int) -> float:
    """The factor of the product: alpha / rank by the alpha of this module, of its part, or 1."""
    if ALPHA in entry.tensors:
        return entry.tensors[ALPHA].item() / rank
    if FOLDED_SCALE in entry.file.metadata:
        return _folded(entry)
    module = entry.target.modules[0]
    known = peft_settings(entry.file, module)
    # As PEFT finds the alpha of a module that has its own.
    patterns = known.get("alpha_pattern") or {}
    own = next((alpha for name, alpha in patterns.items() if re.match(rf"(.*\.)?({name})$", module)), None)
    alpha = known.get("lora_alpha") if own is None else own
    return 1.0 if alpha is None else alpha / (math.sqrt(rank) if known.get("use_rslora") else rank)


def divided(
    down: torch.Tensor, up: torch.Tensor, entry: Entry, names: ModelNames
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Both factors of each of our modules of which the file's is made.

    A block-diagonal LoRA, as our exports have it, is split into those of its parts. If a program has trained the whole
    module, all of its rank serves every part.
    """
    modules, swap = entry.target
    up = torch.cat(list(reversed(up.chunk(2)))) if swap else up
    down, up = _shaped(down, up, names.shapes.get(f"{modules[0]}.weight", ()))
    if len(modules) == 1:
        return {modules[0]: (down, up)}
    rows = [names.rows_of(module) for module in modules]
    if sum(rows) != len(up):
        raise ValueError(f"'{entry.name}' adapts {len(up)} rows, and the model has {sum(rows)}")
    pieces = dict(zip(modules, up.split(rows), strict=True))
    columns = _columns_of(pieces, names) or {module: piece.any(dim=0) for module, piece in pieces.items()}
    return {
        module: (down[used].contiguous(), pieces[module][:, used].contiguous())
        for module, used in columns.items()
        if used.any()
    }


def _shaped(down: torch.Tensor, up: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors with as many dimensions as the weight has: programs take Linears for convolutions of 1 x 1 cells, and the
    other way round."""
    if len(shape) < 2 or down.ndim == len(shape) or math.prod(down.shape[1:]) != math.prod(shape[1:]):
        return down, up
    return down.reshape(len(down), *shape[1:]), up.reshape(*up.shape[:2], *[1] * (len(shape) - 2))


def _columns_of(pieces: Mapping[str, torch.Tensor], names: ModelNames) -> dict[str, torch.Tensor] | None:
    """Which part of the rank belongs to which module, if the file is made of the LoRAs of this run's modules: then a
    module may have zeros alone. None if it is not."""
    ranks = {
        module: len(names.modules[module].lora_A[ADAPTER].weight)
        for module in pieces
        if hasattr(names.modules.get(module), "lora_A")
    }
    total, start, columns = next(iter(pieces.values())).shape[1], 0, {}
    if sum(ranks.values()) != total:
        return None
    for module, rank in ranks.items():
        columns[module] = torch.zeros(total, dtype=torch.bool)
        columns[module][start : start + rank] = True
        start += rank
    nothing = torch.zeros(total, dtype=torch.bool)
    others = (piece[:, ~columns.get(module, nothing)] for module, piece in pieces.items())
    return None if any(piece.any() for piece in others) else columns
