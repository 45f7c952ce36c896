"""Running a layer, and recomputing its activations in the backward pass instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

from utils.parallel.attention import kernels_for


def run_layer(layer: Callable[[Any], Any], stream: Any, *, recompute: bool, draws_random_numbers: bool) -> Any:
    """Runs one layer. With `recompute`, only its input is kept for the backward pass, which runs it again.

    The random state is saved and restored around the second run only if the layer draws from it (dropout), because this
    copies the state from the device and waits for it.
    """

    def run(stream: Any) -> Any:
        with kernels_for(stream):
            return layer(stream)

    if not recompute:
        return run(stream)
    return checkpoint(run, stream, use_reentrant=False, preserve_rng_state=draws_random_numbers)
