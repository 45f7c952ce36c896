"""Module names of diffusers <-> names of other programs, as tables that work in both directions.

A rule says that one module there corresponds to one or several modules here, stacked along the first dimension of their
weights (fused query-key-value projections), possibly with swapped halves (modulations whose scale and shift change
places). Names contain `{}` for the number of a block. A parameter follows its module, and a parameter without a module
has a rule of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from utils.adapters.kinds import Target

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "model.", "net.", "")
KOHYA, LYCORIS = "lora_unet_", "lycoris_"
DOTTED = "diffusion_model."
"""What ComfyUI's own names of a denoiser's modules and parameters begin with in files of adapters."""
OWN_NAME = ""
"""The parameter of a rule that names a parameter instead of a module."""
PARAMETERS = ("weight", "bias", OWN_NAME)
BLOCK_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class KeyRule:
    """The module `there` is cat(`here`); its weight may have another name there (`scale` for `weight`). With `flat`, a
    parameter of several dimensions here is a single row there."""

    there: str
    here: tuple[str, ...]
    swap_halves: bool = False
    weight_there: str = "weight"
    flat: bool = False

    def parameter_there(self, parameter: str) -> str:
        return self.weight_there if parameter == "weight" else parameter


@dataclass(frozen=True)
class Piece:
    """The location of a tensor of ours in a file: rows [start, stop) of `key`; None for all rows. It has a shape if the
    file has its numbers in a single row."""

    key: str
    rows: tuple[int, int] | None = None
    swap_halves: bool = False
    shape: tuple[int, ...] | None = None


def swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the second half of its rows first."""
    return torch.cat(list(reversed(tensor.chunk(2))))


class KeyLayout:
    """The renaming table of a model family, for weights and for LoRA factors.

    Args:
        unused: tensors of the other program's files that have no effect there either, or that belong to another part of
            the model; or beginnings of their names.
        further: modules of other programs' LoRAs that stand in no file of weights.
        parts_are_known: whether ComfyUI knows the parts of fused modules, by our names, in files of adapters.
    """

    part_prefixes: Mapping[str, tuple[str, ...]] = {}

    def __init__(
        self,
        rules: Sequence[KeyRule],
        unused: Sequence[str] = (),
        *,
        further: Sequence[KeyRule] = (),
        parts_are_known: bool = False,
    ):
        self.rules, self.unused, self.further = tuple(rules), tuple(unused), tuple(further)
        self.parts_are_known = parts_are_known

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
                found |= _rows_of(key, names, shapes, rule)
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
                    joined = joined.flatten() if rule.flat else joined
                    converted[key] = swap_halves(joined) if rule.swap_halves else joined
                    used.update(names)
        left = sorted(set(tensors) - used)
        if left:
            raise ValueError(f"no place in the original layout for {len(left)} tensors, first '{left[0]}'")
        return converted

    def from_original(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `to_original`, for layouts whose fused modules are equally large and of which no rule is flat;
        tensors that do not occur in the table are left out."""
        assert not any(rule.flat for rule in self.rules)
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

    def targets(self, names: Iterable[str]) -> Iterator[tuple[str, Target]]:
        """See `FileLayout`."""
        names = set(names)
        known = _modules_and_parameters(names)
        for there, parts, rule in [*self._modules(known), *self._modules(known, self.further)]:
            if all(part in known for part in parts):
                yield there, Target(tuple(parts), rule.swap_halves)
                for parameter, other in (("bias", "bias"), ("weight", rule.weight_there)):
                    own = tuple(_named(part, parameter) for part in parts)
                    # A weight that is called so follows its module's name in files of adapters.
                    if other != "weight" and names.issuperset(own):
                        yield _named(there, other), Target(own, rule.swap_halves)

    def comfyui_names(self, modules: Iterable[str]) -> dict[str, str]:
        """See `FileLayout`."""
        modules = set(modules)
        found = {
            module: f"{LYCORIS}{module.replace('.', '_')}" for module in (modules if self.parts_are_known else set())
        }
        for there, parts, rule in self._modules(modules):
            if len(parts) == 1 and not rule.swap_halves:
                found[parts[0]] = f"{KOHYA}{there.replace('.', '_')}"
        return found

    def lora_to_kohya(
        self,
        factors: Mapping[str, torch.Tensor],
        scale: float | Callable[[str], float],
        rows_of: Callable[[str], int],
        dora_scale: Callable[[str], torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """LoRA factors under kohya's names, which ComfyUI, Forge and diffusers read:
        `lora_unet_<module there, _ for .>.lora_down.weight`, `.lora_up.weight`, `.alpha`, perhaps `.dora_scale`.

        A fused module gets one LoRA whose rank is the sum of its parts': down stacked, up block-diagonal.

        Args:
            factors: `<module>.lora_A.weight` (rank, in) and `<module>.lora_B.weight` (out, rank).
            scale: alpha / rank of all of them, or of each module.
            rows_of: module -> its number of outputs.
            dora_scale: module, adapted or not -> the lengths (out, 1, ...) of its rows; None without DoRA.

        Raises:
            ValueError: a module does not occur in the table.
        """
        adapted = {name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")}
        converted, used = {}, set()
        for there, parts, rule in self._modules(adapted):
            present = [part for part in parts if part in adapted]
            scales = [scale(part) if callable(scale) else scale for part in present]
            # One alpha is for all of them.
            downs = [
                down if own == scales[0] else down.float() * (own / scales[0])
                for down, own in zip((factors[f"{part}.lora_A.weight"] for part in present), scales, strict=True)
            ]
            down = torch.cat(downs)
            blocks = [
                factors[f"{part}.lora_B.weight"] if part in adapted else down.new_zeros(rows_of(part), 0)
                for part in parts
            ]
            up = torch.block_diag(*blocks) if len(blocks) > 1 else blocks[0]
            name = KOHYA + there.replace(".", "_")
            converted[f"{name}.lora_down.weight"] = down.contiguous()
            converted[f"{name}.lora_up.weight"] = (swap_halves(up) if rule.swap_halves else up).contiguous()
            # Not multiplied into a factor, whose small values float16 would lose.
            converted[f"{name}.alpha"] = torch.tensor(scales[0] * down.shape[0])
            if dora_scale:
                lengths = torch.cat([dora_scale(part) for part in parts])
                converted[f"{name}.dora_scale"] = swap_halves(lengths) if rule.swap_halves else lengths
            used.update(present)
        left = sorted(adapted - used)
        if left:
            raise ValueError(f"no place in the original layout for adapters of {len(left)} modules, first '{left[0]}'")
        return converted

    def differences(
        self, values: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """See `FileLayout`: `diffusion_model.<module there>.diff` of a weight, `.diff_b` of its bias, and
        `diffusion_model.<parameter there>.diff` of others. What is fused there has zeros for what is not given."""
        converted, used = {}, set()
        for there, parts, rule in self._modules(_modules_and_parameters(values)):
            for parameter in PARAMETERS:
                names = [_named(part, parameter) for part in parts]
                given = [values[name] for name in names if name in values]
                if not given:
                    continue
                used.update(names)
                rows = [values[name] if name in values else given[0].new_zeros(shapes[name]) for name in names]
                joined = torch.cat(rows) if len(rows) > 1 else rows[0]
                joined = joined.flatten() if rule.flat else joined
                of_weight = rule.weight_there == "weight" and f"{parts[0]}.weight" in shapes
                key = difference_of(_named(there, rule.parameter_there(parameter)), of_weight=of_weight)
                converted[DOTTED + key] = (swap_halves(joined) if rule.swap_halves else joined).contiguous()
        if left := sorted(set(values) - used):
            raise ValueError(
                f"no place in the original layout for changes of {len(left)} parameters, first '{left[0]}'"
            )
        return converted

    def _modules(self, ours: set[str], rules: Sequence[KeyRule] | None = None) -> list[tuple[str, list[str], KeyRule]]:
        """(module there, modules here, rule) wherever at least one of our modules is among those here."""
        numbers = sorted({int(number) for name in ours for number in BLOCK_NUMBER.findall(name)})
        found = []
        for rule in self.rules if rules is None else rules:
            for number in numbers if "{}" in rule.there else [0]:
                parts = [name.format(number) for name in rule.here]
                if any(part in ours for part in parts):
                    found.append((rule.there.format(number), parts, rule))
        return found


def _modules_and_parameters(names: Iterable[str]) -> set[str]:
    return {part for name in names for part in (name, name.rpartition(".")[0])}


def difference_of(name: str, *, of_weight: bool = True) -> str:
    """What ComfyUI calls the difference of a tensor that it knows by this name.

    Args:
        of_weight: whether a bias belongs to a module with a weight.
    """
    if name.endswith(".weight"):
        return f"{name.removesuffix('.weight')}.diff"
    if name.endswith(".bias") and of_weight:
        return f"{name.removesuffix('.bias')}.diff_b"
    return f"{name}.diff"


def _named(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if parameter else module


def _rows_of(key: str, names: list[str], shapes: Mapping[str, Sequence[int]], rule: KeyRule) -> dict[str, Piece]:
    swap = rule.swap_halves
    if len(names) == 1:
        return {names[0]: Piece(key, None, swap, tuple(shapes[names[0]]) if rule.flat else None)}
    pieces, start = {}, 0
    for name in names:
        stop = start + shapes[name][0]
        pieces[name] = Piece(key, (start, stop), swap)
        start = stop
    return pieces
