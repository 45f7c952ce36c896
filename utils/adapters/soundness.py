"""Is what a file says of a module's adapter something that can be computed with? Damage that does not show in names and
shapes would be wrong weights, or an error from within a library."""

from __future__ import annotations

import math

import torch

from utils.adapters.kinds import ALPHA, Entry


def check_entry(entry: Entry) -> None:
    """Whether the tensors of a module are floating-point numbers, an alpha one finite number, and none is empty or has
    values that are no numbers.

    Raises:
        ValueError: they are not; names the tensor.
    """
    for part, tensor in entry.tensors.items():
        what = f"the {part} of '{entry.name}'"
        if part == ALPHA:
            if tensor.numel() != 1 or tensor.is_complex() or not math.isfinite(tensor.item()):
                raise ValueError(f"{what} is {_shown(tensor)}, and one number is meant; give a file that is whole")
            continue
        if not tensor.is_floating_point():
            raise ValueError(
                f"{what} is of the type {str(tensor.dtype).removeprefix('torch.')}, and factors are floating-point "
                "numbers; a quantised adapter is not read: give it in bfloat16, float16 or float32"
            )
        if tensor.ndim == 0 or tensor.numel() == 0:
            raise ValueError(f"{what} has the shape {list(tensor.shape)}, so that nothing is in it; download it again")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{what} has values that are infinite or no numbers; it is damaged: download it again")


def _shown(tensor: torch.Tensor) -> str:
    return f"{tensor.item()}" if tensor.numel() == 1 else f"{tensor.numel()} numbers"
