"""Module names of diffusers <-> names of other programs, as tables that work in both directions.

A rule says that one module there corresponds to one or several modules here, stacked along the first dimension of their
weights (fused query-key-value projections), possibly with swapped halves (modulations whose scale and shift change
places). Names contain `{}` for the number of a block. A parameter follows its module, and a parameter without a module
has a rule of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "")
OWN_NAME = ""
"""The parameter of a rule that names a parameter instead of a module."""
PARAMETERS = ("weight", "bias", OWN_NAME)
BLOCK_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class KeyRule:
    """The module `there` is cat(`here`); its weight may have another name there (`scale` for `weight`)."""

    there: str
    here: tuple[str, ...]
    swap_halves: bool = False
    weight_there: str = "weight"

    def parameter_there(self, parameter: str) -> str:
        return self.weight_there if parameter == "weight" else parameter


@dataclass(frozen=True)
class Piece:
    """The location of a tensor of ours in a file: rows [start, stop) of `key`; None for all rows."""

    key: str
    rows: tuple[int, int] | None = None
    swap_halves: bool = False


def swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the second half of its rows first."""
    return torch.cat(list(reversed(tensor.chunk(2))))


class KeyLayout:
    """The renaming table of a model family, for weights and for LoRA factors.

    Args:
        unused: tensors of the other program's files that have no effect there either.
    """

    def __init__(self, rules: Sequence[KeyRule], unused: Sequence[str] = ()):
        self.rules, self.unused = tuple(rules), tuple(unused)

    def recognises(self, keys: Iterable[str]) -> bool:
        """Whether a file with `keys` has this layout, which is so if it contains the module of the first rule."""
        return self.prefix(keys) is not None

    def prefix(self, keys: Iterable[str]) -> str | None:
        """The prefix of this layout's names in a file with `keys`; None for a file with another layout."""
        keys, first = list(keys), self.rules[0].there.format(0)
        return next((prefix for prefix in PREFIXES if any(key.startswith(prefix + first) for key in keys)), None)

    def pieces(self, shapes: Mapping[str, Sequence[int]], keys: Iterable[str]) -> dict[str, Piece]:
        """The locations of our parameters in a file with `keys`.

        Args:
            shapes: parameter name -> shape.

        Raises:
            ValueError: the file lacks a tensor; names the first one.
        """
        keys = set(keys)
        prefix = self.prefix(keys)
        found = {}
        for there, parts, rule in self._modules(_modules_and_parameters(shapes)):
            for parameter in PARAMETERS:
                names = [_named(part, parameter) for part in parts]
                if not all(name in shapes for name in names):
                    continue
                key = prefix + _named(there, rule.parameter_there(parameter))
                if key not in keys:
                    raise ValueError(f"the tensor '{key}' is missing")
                found |= _rows_of(key, names, shapes, rule.swap_halves)
        return found

    def to_original(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our tensors under the other program's names.

        Raises:
            ValueError: a tensor does not occur in the table.
        """
        converted, used = {}, set()
        for there, parts, rule in self._modules(_modules_and_parameters(tensors)):
            for parameter in PARAMETERS:
                names = [_named(part, parameter) for part in parts]
                if all(name in tensors for name in names):
                    joined = torch.cat([tensors[name] for name in names]) if len(names) > 1 else tensors[names[0]]
                    key = _named(there, rule.parameter_there(parameter))
                    converted[key] = swap_halves(joined) if rule.swap_halves else joined
                    used.update(names)
        left = sorted(set(tensors) - used)
        if left:
            raise ValueError(f"no place in the original layout for {len(left)} tensors, first '{left[0]}'")
        return converted

    def from_original(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `to_original`, for layouts whose fused modules are equally large; tensors that do not
        occur in the table are left out."""
        numbers = range(1 + max([0, *(int(number) for name in tensors for number in BLOCK_NUMBER.findall(name))]))
        found = {}
        for rule in self.rules:
            for number in numbers if "{}" in rule.there else [0]:
                for parameter in PARAMETERS:
                    key = _named(rule.there.format(number), rule.parameter_there(parameter))
                    if key in tensors:
                        whole = swap_halves(tensors[key]) if rule.swap_halves else tensors[key]
                        names = [_named(part.format(number), parameter) for part in rule.here]
                        found |= dict(zip(names, whole.chunk(len(names)), strict=True))
        return found

    def names_there(self, modules: Iterable[str]) -> dict[str, str]:
        """Module here -> the module there to which it corresponds, or of which it is a part."""
        ours = set(modules)
        return {part: there for there, parts, _ in self._modules(ours) for part in parts if part in ours}

    def lora_to_kohya(
        self, factors: Mapping[str, torch.Tensor], scale_of: Callable[[str], float], rows_of: Callable[[str], int]
    ) -> dict[str, torch.Tensor]:
        """LoRA factors under kohya's names, which ComfyUI, Forge and diffusers read:
        `lora_unet_<module there, _ for .>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

        A fused module gets one LoRA whose rank is the sum of its parts': down stacked, up block-diagonal.

        Args:
            factors: `<module>.lora_A.weight` (rank, in) and `<module>.lora_B.weight` (out, rank).
            scale_of: module -> alpha / rank of its LoRA.
            rows_of: module -> its number of outputs.
        """
        adapted = {name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")}
        converted, used = {}, set()
        for there, parts, rule in self._modules(adapted):
            present = [part for part in parts if part in adapted]
            down = torch.cat([factors[f"{part}.lora_A.weight"] for part in present])
            blocks = [
                factors[f"{part}.lora_B.weight"] * scale_of(part)
                if part in adapted
                else down.new_zeros(rows_of(part), 0)
                for part in parts
            ]
            up = torch.block_diag(*blocks)
            name = "lora_unet_" + there.replace(".", "_")
            converted[f"{name}.lora_down.weight"] = down.contiguous()
            converted[f"{name}.lora_up.weight"] = (swap_halves(up) if rule.swap_halves else up).contiguous()
            converted[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
            used.update(present)
        assert used == adapted, f"no place in the original layout for {sorted(adapted - used)[:3]}"
        return converted

    def lora_from_kohya(
        self, tensors: Mapping[str, torch.Tensor], modules: Iterable[str], rows_of: Callable[[str], int]
    ) -> dict[str, torch.Tensor]:
        """The inverse of `lora_to_kohya` for the given modules of ours, with alpha multiplied into `lora_B`.

        A block-diagonal LoRA of a fused module is split into its parts. If a program has trained the fused module
        itself, all of its rank serves every part.
        """
        factors = {}
        for there, parts, rule in self._modules(set(modules)):
            name = "lora_unet_" + there.replace(".", "_")
            if f"{name}.lora_down.weight" not in tensors:
                continue
            down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
            alpha = tensors.get(f"{name}.alpha", torch.tensor(float(down.shape[0])))
            up = up * (alpha.item() / down.shape[0])
            up = swap_halves(up) if rule.swap_halves else up
            for part, rows in zip(parts, up.split([rows_of(part) for part in parts]), strict=True):
                used = rows.any(dim=0) if len(parts) > 1 else torch.ones(len(down), dtype=torch.bool)
                if used.any():
                    factors[f"{part}.lora_A.weight"] = down[used].contiguous()
                    factors[f"{part}.lora_B.weight"] = rows[:, used].contiguous()
        return factors

    def _modules(self, ours: set[str]) -> list[tuple[str, list[str], KeyRule]]:
        """(module there, modules here, rule) wherever at least one of our modules is among those here."""
        numbers = sorted({int(number) for name in ours for number in BLOCK_NUMBER.findall(name)})
        found = []
        for rule in self.rules:
            for number in numbers if "{}" in rule.there else [0]:
                parts = [name.format(number) for name in rule.here]
                if any(part in ours for part in parts):
                    found.append((rule.there.format(number), parts, rule))
        return found


def _modules_and_parameters(names: Iterable[str]) -> set[str]:
    return {part for name in names for part in (name, name.rpartition(".")[0])}


def _named(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if parameter else module


def _rows_of(key: str, names: list[str], shapes: Mapping[str, Sequence[int]], swap: bool) -> dict[str, Piece]:
    if len(names) == 1:
        return {names[0]: Piece(key, None, swap)}
    pieces, start = {}, 0
    for name in names:
        stop = start + shapes[name][0]
        pieces[name] = Piece(key, (start, stop), swap)
        start = stop
    return pieces
