"""What to set when the memory of a GPU does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

import optimizers
from utils.errors import UserError
from utils.run.attempts import let_go, reason_of
from utils.run.parts import RunParts
from utils.settings.advice import IN_TURN, allows
from utils.settings.schema import Settings

Built = TypeVar("Built")
KEPT = "What was saved before stays"


def explained(error: Exception, settings: Settings, folder: Path, when: str, saved: str = KEPT) -> UserError:
    """The error with the settings that would save memory, those first that cost least.

    Args:
        saved: what is told of the steps before; see `save_before`.
    """
    said = reason_of(error)
    advice = "\n".join(f"    - {setting}" for setting in savings(settings))
    return UserError.of(
        f"the GPU's memory does not suffice ({said}). {saved}. To need less, in this order:\n"
        f"{advice}\n  --check tells how much each of them needs",
        str(folder),
        when,
    )


def explaining(build: Callable[..., Built]) -> Callable[..., Built]:
    """The function, which is given the run's settings first, with such an error for what finds no memory in it."""

    @wraps(build)
    def explained_build(settings: Settings, *arguments: Any, **keys: Any) -> Built:
        try:
            return build(settings, *arguments, **keys)
        except torch.OutOfMemoryError as error:
            raise explained(error, settings, settings.output_dir, "before the first step") from error

    return explained_build


def save_before(error: torch.OutOfMemoryError, parts: RunParts, save: Callable[[], object]) -> str:
    """Lets go what a step has made that found no memory, and saves what it began with: where it has not begun to change
    that, and no other rank, which waits for this one in the step, has to save along. Returns what is told of it."""
    if parts.ranks.world_size > 1 or parts.shares.is_stepping or parts.settings.optimizer.gradient_release:
        return KEPT
    let_go(error)
    parts.engine.zero_grad()
    try:
        parts.engine.module.swap.settle()
        if parts.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        save()
    except Exception as failure:
        return f"{KEPT}, and the steps since could not be saved: {reason_of(failure)}"
    return "What the steps before it made is saved, and --resume_from_checkpoint goes on from there"


def savings(settings: Settings) -> Iterator[str]:
    """What these settings leave to save, and their other keys allow."""
    model = settings.model
    if not settings.cache_text_embeddings:
        yield "cache_text_embeddings = true: no text encoder stays on the GPU"
    if not settings.activation_checkpointing:
        yield "activation_checkpointing = true: each block is computed once more in the backward pass"
    elif settings.recomputed_every > 1:
        yield "a smaller activation_checkpointing_every_n_blocks"
    elif not settings.offloads:
        yield 'activation_checkpointing = "offload": what is kept of the blocks waits in the machine\'s memory'
    if settings.pieces > 1 and allows(settings, **IN_TURN):
        yield 'schedule = "1f1b", without pieces_per_stage: fewer micro-batches are under way in each stage'
    if settings.micro_batch_size_per_gpu != 1:
        accumulates = allows(settings, gradient_accumulation_steps=settings.gradient_accumulation_steps + 1)
        yield "micro_batch_size_per_gpu = 1" + (", with more gradient_accumulation_steps" if accumulates else "")
    if settings.adapter:
        yield f"{_more_swap(settings)}: frozen weights wait in the machine's memory"
        if model.transformer_dtype in (None, "float32", "float16", "bfloat16"):
            yield "[model] transformer_dtype = 'int8', 'float8' or 'nf4': the frozen weights in 8 or 4 bits"
    yield from _of_optimizer(settings)
    if settings.ema and settings.ema.device == "gpu":
        yield "[ema] device = 'cpu'"
    if not settings.divides_weights:
        yield "more pipeline_stages, if there are more GPUs"
    yield "smaller resolutions, or fewer frames, in the dataset"


def _of_optimizer(settings: Settings) -> Iterator[str]:
    on_host = "cpu" not in optimizers.find(settings.optimizer.type).not_on
    if settings.optimizer.type == "adamw" and not (settings.adapter or settings.swaps or settings.offload_optimizer):
        yield "[optimizer] type = 'adamw8bit': a quarter of the optimizer's state"
    if not settings.adapter and on_host and allows(settings, blocks_to_swap=1):
        yield f"{_more_swap(settings)}: weights and their optimizer state wait in the machine's memory"
    if not (settings.zero_stage or settings.swaps_trained):
        if allows(settings, zero_stage=3):
            yield "zero_stage = 3, if there are several data ranks: each keeps a part of state and weights"
        elif allows(settings, zero_stage=1):
            yield "zero_stage = 1 or 2, if there are several data ranks: each keeps its share of the optimizer's state"
    if on_host and not settings.offload_optimizer and allows(settings, offload_optimizer=True):
        yield "offload_optimizer = true: the optimizer's state waits in the machine's memory"


def _more_swap(settings: Settings) -> str:
    return "more blocks_to_swap" if settings.swaps else "blocks_to_swap = 10 or more"
