"""Which blocks of a stage are swapped, and which of their tensors leave the device with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.parallel.partition import repeated_blocks
from utils.parallel.transfers import aligned

BUFFERS = 2
"""One for the block that computes and one for the next. A third would not make the copies any faster."""


def spread(count: int, blocks: int) -> tuple[int, ...]:
    """Which of a stage's blocks are swapped: evenly from the first to the last, so that as much computation as possible
    lies between two of them. At both ends of a pass the last used buffers are those that the pass back begins with, so
    that computation before the first or behind the last one would hide no copy."""
    if count == 1:
        return (0,)
    return tuple(index * (blocks - 1) // (count - 1) for index in range(count))


def counts(setting: int | Sequence[int] | str, layers_of_stages: Sequence[Sequence[nn.Module]]) -> list[int]:
    """The number of swapped blocks of every stage, from one number for all or one for each; 0 as long as they are not
    chosen ("auto").

    Raises:
        ValueError: a stage has fewer blocks.
    """
    numbers = numbers_of(setting, len(layers_of_stages))
    most = [len(repeated_blocks(layers)) for layers in layers_of_stages]
    for stage, (number, limit) in enumerate(zip(numbers, most, strict=True)):
        if number > limit:
            if len(most) == 1:
                raise ValueError(
                    f"{number} blocks cannot be swapped, since the model has {limit}; swap at most {limit}"
                )
            raise ValueError(
                f"{number} blocks cannot be swapped, since stage {stage} has {limit}; swap at most {min(most)}, or "
                f"write a number for each stage, at most {most}"
            )
    return numbers


def numbers_of(setting: int | Sequence[int] | str, stages: int) -> list[int]:
    """The number that is asked for in every stage."""
    if setting == "auto":
        return [0] * stages
    return [setting] * stages if isinstance(setting, int) else list(setting)


class Swappable(NamedTuple):
    """A tensor that may leave the device, and the tables of modules in which it stands as a parameter or buffer."""

    tensor: torch.Tensor
    places: tuple[tuple[dict[str, Any], str], ...]


def swappable_tensors(layers: Sequence[nn.Module], *, trained: bool) -> list[list[Swappable]]:
    """The tensors of each layer that can leave the device: not shared with another layer, and plain, since only plain
    tensors are no more than their bytes. With `trained`, those that are trained are among them."""
    found = [list(_tensors(layer)) for layer in layers]
    users = Counter(key for tensors in found for key in {id(tensor) for tensor, _, _ in tensors})
    chosen: list[list[Swappable]] = []
    for tensors in found:
        places: dict[int, Swappable] = {}
        for tensor, table, name in tensors:
            plain = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_sparse
            if plain and tensor.numel() and (trained or not tensor.requires_grad) and users[id(tensor)] == 1:
                before = places[id(tensor)].places if id(tensor) in places else ()
                places[id(tensor)] = Swappable(tensor, (*before, (table, name)))
        chosen.append(list(places.values()))
    return chosen


def _tensors(layer: nn.Module) -> Iterator[tuple[torch.Tensor, dict[str, Any], str]]:
    for module in layer.modules():
        for table in (module._parameters, module._buffers):
            yield from ((tensor, table, name) for name, tensor in table.items() if tensor is not None)


@dataclass(frozen=True)
class SwapPlan:
    """What leaves the device.

    Attributes:
        blocks: position of a layer -> its tensors.
    """

    blocks: dict[int, list[Swappable]]

    @classmethod
    def of(cls, layers: Sequence[nn.Module], count: int, *, trained: bool = False) -> SwapPlan:
        """For `count` of a stage's layers, which may be on the meta device; see `of_all`."""
        return cls.of_all(layers, trained=trained).with_blocks(count) if count else cls({})

    @classmethod
    def of_all(cls, layers: Sequence[nn.Module], *, trained: bool = False) -> SwapPlan:
        """For all blocks: their frozen tensors, and with `trained` those that are trained."""
        tensors = swappable_tensors(layers, trained=trained)
        return cls({position: tensors[position] for position in repeated_blocks(layers)})

    @classmethod
    def of_divided(cls, layers: Sequence[nn.Module], *, trained: bool) -> SwapPlan:
        """What data ranks may divide of all blocks: their frozen tensors, or those that are `trained`."""
        blocks = cls.of_all(layers, trained=trained).blocks
        chosen = {position: [one for one in b if one.tensor.requires_grad == trained] for position, b in blocks.items()}
        return cls(chosen)

    def with_blocks(self, count: int) -> SwapPlan:
        """For so many of these blocks, without those that have nothing to swap."""
        positions = list(self.blocks)
        chosen = [positions[index] for index in spread(count, len(positions))] if count else []
        return SwapPlan({position: self.blocks[position] for position in chosen if self.blocks[position]})

    @property
    def sizes(self) -> list[int]:
        """The bytes of every swapped block in the host's memory."""
        return [sum(aligned(one.tensor.nbytes) for one in tensors) for tensors in self.blocks.values()]

    @property
    def host_bytes(self) -> int:
        """All of them."""
        return sum(self.sizes)

    @property
    def tensor_bytes(self) -> int:
        """The bytes of the tensors without what lies between them."""
        return sum(one.tensor.nbytes for block in self.blocks.values() for one in block)

    @property
    def ring_bytes(self) -> int:
        """The bytes of the buffers on the device."""
        return min(BUFFERS, len(self.sizes)) * max(self.sizes, default=0)

    @property
    def trained(self) -> dict[int, list[torch.Tensor]]:
        """Position of a layer -> what is trained of its tensors."""
        return {
            position: [one.tensor for one in block if one.tensor.requires_grad]
            for position, block in self.blocks.items()
        }
