"""OFT: the outputs of a layer are rotated in blocks (Qiu et al. 2023). BOFT: in several stages, whose blocks are made
of other outputs each (Liu et al. 2024, "butterfly"), so that every output may reach every other one.

Names and the order of blocks are LyCORIS's, which ComfyUI reads. A rotation of outputs W x is one of the rows of W, so
that the weight itself is not needed: it may be quantised or swapped.

Shapes: O outputs, in K blocks of N; M stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import nn

from utils.adapters.base_weight import shape_of
from utils.adapters.kinds import ALPHA, Entry, ModelNames, Tensors, Update
from utils.adapters.lycoris import AdaptedLayer, LycorisKind
from utils.errors import UserError
from utils.settings.schema import AdapterSettings
from utils.settings.values import Count, Share

BLOCKS = "oft_blocks"


class OftSettings(AdapterSettings):
    """`type = "oft"`: OFT or BOFT of LyCORIS, which rotate the outputs of a layer in blocks."""

    binds_checkpoint: ClassVar[tuple[str, ...]] = ("type", "block_size", "butterfly", "include", "exclude")

    type: Literal["oft"]
    """Kind of adapter."""
    block_size: Count = 8
    """Outputs that are rotated together, at most; the largest number that divides those of a layer."""
    butterfly: bool = False
    """Rotate in several stages, whose blocks are made of other outputs each (BOFT). The outputs of a layer have to be
    an even number, not above `block_size`, times a power of 2."""
    dropout: Share = 0.0
    """Fraction of the blocks that a training step does not rotate."""
    module_dropout: Share = 0.0
    """Fraction of the adapted modules that a step trains without."""


def shape_of_blocks(outputs: int, settings: OftSettings) -> tuple[int, ...] | None:
    """(K, N, N), or (M, K, N, N) of a butterfly; None for outputs that have none."""
    sizes = [size for size in range(1, settings.block_size + 1) if outputs % size == 0]
    if not settings.butterfly:
        return outputs // sizes[-1], sizes[-1], sizes[-1]
    sizes = [size for size in sizes if size % 2 == 0 and (outputs // size).bit_count() == 1]
    if not sizes:
        return None
    count = outputs // sizes[-1]
    return count.bit_length(), count, sizes[-1], sizes[-1]


class OftLayer(AdaptedLayer):
    """A Linear or convolution whose outputs, without the bias, are rotated."""

    def __init__(self, base_layer: nn.Module, settings: OftSettings):
        shape = shape_of_blocks(shape_of(base_layer)[0], settings)
        assert shape, "told before"
        super().__init__(base_layer, settings, {BLOCKS: shape})

    def change(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        product = result
        if self.bias is not None:
            bias = self.bias.to(result.dtype)
            product = result - (bias[:, None, None] if self.is_convolution else bias)
        turns = turns_of(self.get_parameter(BLOCKS)).to(result.dtype)
        if self.training and self.dropout.p:
            turns = turns * (torch.rand(turns.shape[:-2], device=x.device) >= self.dropout.p)[..., None, None]
        if self.is_convolution:
            return rotated(product.movedim(1, -1), turns).movedim(-1, 1)
        return rotated(product, turns)


def turns_of(blocks: torch.Tensor) -> torch.Tensor:
    """R - 1 of blocks B (..., N, N), where R = (1 + Q) / (1 - Q) is the rotation by Q = B - B^T (Cayley). It is
    2 Q / (1 - Q), which keeps small rotations exact."""
    turn = (blocks - blocks.transpose(-1, -2)).float()
    one = torch.eye(turn.shape[-1], device=turn.device)
    # There always is a solution; to look for one that is missing, the host would wait for a GPU.
    return torch.linalg.solve_ex(one - turn, 2 * turn).result


def rotated(outputs: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """What rotations add to outputs (..., O), by R - 1 of each block.

    The rows of a weight w become the sum over n of R_nm w_n in OFT's files, and over n of R_mn w_n in BOFT's.
    """
    if turns.ndim == 3:
        in_blocks = rearrange(outputs, "... (k n) -> ... k n", k=len(turns))
        return rearrange(torch.einsum("...kn,knm->...km", in_blocks, turns), "... k m -> ... (k m)")
    half, change = turns.shape[-1] // 2, torch.zeros_like(outputs)
    for stage, turn in enumerate(turns):
        # Of each stage, a block has outputs that are twice as far from one another as in the one before.
        far = 2**stage * half
        mixed = rearrange(outputs + change, "... (c g f) -> ... (c f g)", g=2, f=far)
        in_blocks = rearrange(mixed, "... (k n) -> ... k n", k=len(turn))
        added = rearrange(torch.einsum("...kn,kmn->...km", in_blocks, turn), "... k m -> ... (k m)")
        change = change + rearrange(added, "... (c f g) -> ... (c g f)", g=2, f=far)
    return change


@dataclass(frozen=True)
class RotationUpdate:
    """The update of a weight whose rows are rotated."""

    blocks: torch.Tensor
    shape: tuple[int, ...]
    fits_beside = False
    needs_base = True

    def delta(self, base: torch.Tensor) -> torch.Tensor:
        """What the rotation adds to the base."""
        rows = base.float().flatten(1)
        return rotated(rows.T, turns_of(self.blocks.to(base.device))).T.reshape(base.shape)


class Oft(LycorisKind):
    """See `AdapterKind`."""

    settings = OftSettings
    name = "OFT"
    mark = ".oft_"
    endings = {f".{BLOCKS}": BLOCKS}
    layer = OftLayer

    def adapted(self, denoiser: nn.Module, name: str, settings: OftSettings) -> OftLayer:
        """See `LycorisKind`.

        Raises:
            UserError: the outputs of the module are not made of a butterfly's blocks.
        """
        base = denoiser.get_submodule(name)
        outputs = shape_of(base)[0]
        if shape_of_blocks(outputs, settings) is None:
            odd = outputs // (outputs & -outputs)
            cure = f"set block_size = {2 * odd}, or `exclude` it" if outputs % 2 == 0 else "`exclude` it"
            raise UserError.of(
                f"'{name}' has {outputs} outputs, which are not an even number up to {settings.block_size} times a "
                f"power of 2; {cure}",
                where="[adapter] butterfly",
            )
        return OftLayer(base, settings)

    def rank_of(self, tensors: Tensors) -> int | None:
        """None: an alpha is another thing here."""
        return None

    def alpha_of(self, tensors: Tensors, scale: float) -> float | None:
        """The largest rotation, of which 0 is none. Without it ComfyUI fails to apply a butterfly."""
        return 0.0

    def factors(self, entry: Entry, names: ModelNames, scale_of: Callable[[str], float]) -> Tensors:
        """The blocks of a module, within the bound that the file gives them."""
        factors = super().factors(entry, names, scale_of)
        return {name: bounded(tensor, entry) for name, tensor in factors.items()}

    def updates(self, entry: Entry, names: ModelNames) -> Mapping[str, Update]:
        """Of one of our modules.

        Raises:
            ValueError: the file's module is several of ours, whose rows the rotation mixes.
        """
        if len(entry.target.modules) > 1 or entry.target.swap_halves:
            raise ValueError(
                f"the OFT of '{entry.name}' rotates the rows of {len(entry.target.modules)} modules of this model at "
                f"once ({entry.target.modules[0]} ...), and cannot be divided among them"
            )
        return super().updates(entry, names)

    def update_from(self, tensors: Tensors, scale: float, shape: tuple[int, ...], name: str) -> RotationUpdate:
        """See `LycorisKind`."""
        blocks = tensors.get(BLOCKS)
        fits = blocks is not None and blocks.ndim in (3, 4) and blocks.shape[-1] == blocks.shape[-2]
        if not fits or math.prod(blocks.shape[-3:-1]) != shape[0]:
            what = "nothing" if blocks is None else list(blocks.shape)
            raise ValueError(
                f"the blocks of the OFT of '{name}' are {what}, which do not fit a weight of {list(shape)}"
            )
        if blocks.ndim == 4 and (blocks.shape[-1] % 2 or shape[0] % (2 ** (len(blocks) - 1) * blocks.shape[-1])):
            raise ValueError(f"the blocks of the OFT of '{name}', {list(blocks.shape)}, are no butterfly's")
        limit = tensors.get(ALPHA)
        return RotationUpdate(within(blocks.float(), 0.0 if limit is None else limit.item()), shape)


def bounded(blocks: torch.Tensor, entry: Entry) -> torch.Tensor:
    """Blocks within the bound of a file."""
    return within(blocks, entry.tensors[ALPHA].item()) if ALPHA in entry.tensors else blocks


def within(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """Blocks of which Q is not larger than a limit above 0, as ComfyUI sees to it."""
    size = (blocks - blocks.transpose(-1, -2)).float().norm().item()
    return blocks * (limit / size) if 0 < limit < size else blocks


KINDS = (Oft(),)
