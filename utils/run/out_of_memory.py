"""What to set when the memory of a GPU does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import optimizers
from utils.errors import UserError
from utils.settings.schema import Settings


@contextmanager
def told(settings: Settings, folder: Path, where: str) -> Iterator[None]:
    """A context in which a lack of memory is told with the settings that would save some, those first that cost least.

    Args:
        folder: of the run, or in which it will be.
        where: in the run.

    Raises:
        UserError: it does not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = ". ".join(str(error).split(". ")[:2])
        advice = "\n".join(f"    - {setting}" for setting in savings(settings))
        raise UserError.of(
            f"the GPU's memory does not suffice ({said}). What was saved before stays. To need less, in this order:\n"
            f"{advice}\n  --check tells how much each of them needs",
            str(folder),
            where,
        ) from error


def savings(settings: Settings) -> Iterator[str]:
    """What these settings leave to save."""
    model = settings.model
    if not settings.activation_checkpointing:
        yield "activation_checkpointing = true: each block is computed once more in the backward pass"
    elif settings.recomputed_every > 1:
        yield "a smaller activation_checkpointing_every_n_blocks"
    elif not settings.offloads:
        yield 'activation_checkpointing = "offload": what is kept of the blocks waits in the machine\'s memory'
    if settings.micro_batch_size_per_gpu != 1:
        yield "micro_batch_size_per_gpu = 1, with more gradient_accumulation_steps"
    if settings.adapter:
        yield f"{_more_swap(settings)}: frozen weights wait in the machine's memory"
        if model.transformer_dtype in (None, "float32", "float16", "bfloat16"):
            yield "[model] transformer_dtype = 'int8', 'float8' or 'nf4': the frozen weights in 8 or 4 bits"
    yield from _of_optimizer(settings)
    if settings.ema and settings.ema.device == "gpu":
        yield "[ema] device = 'cpu'"
    yield "more pipeline_stages, if there are more GPUs"
    yield "smaller resolutions, or fewer frames, in the dataset"


def _of_optimizer(settings: Settings) -> Iterator[str]:
    on_host = "cpu" not in optimizers.find(settings.optimizer.type).not_on
    if not (settings.adapter or settings.swaps) and settings.optimizer.type == "adamw":
        yield "[optimizer] type = 'adamw8bit': a quarter of the optimizer's state"
    if not settings.adapter and on_host and not settings.zero_stage:
        yield f"{_more_swap(settings)}: weights and their optimizer state wait in the machine's memory"
    if not (settings.zero_stage or settings.swaps_trained):
        if settings.pipeline_stages == 1:
            yield "zero_stage = 3, if there are several data ranks: each keeps a part of state and weights"
        else:
            yield "zero_stage = 1 or 2, if there are several data ranks: each keeps its share of the optimizer's state"
    if on_host and not settings.offload_optimizer:
        yield "offload_optimizer = true: the optimizer's state waits in the machine's memory"


def _more_swap(settings: Settings) -> str:
    return "more blocks_to_swap" if settings.swaps else "blocks_to_swap = 10 or more"
