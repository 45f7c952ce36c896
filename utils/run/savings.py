"""What takes less memory of a GPU: what a run's settings leave of it to set, and its other keys allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optimizers
from utils.parallel.partition import Bounds, of_stage, repeated_blocks, within
from utils.parallel.swap_plan import BUFFERS, numbers_of
from utils.quantised.formats import FORMATS, FOUR_BITS
from utils.settings.advice import allows
from utils.settings.plain import as_toml
from utils.settings.schema import Settings
from utils.settings.values import MicroBatches

SOME = 10
"""Blocks to begin with, where more could be swapped."""
SHARES = {
    1: "each data rank keeps its share of the optimizer's state",
    2: "each data rank keeps its share of the optimizer's state and of gradients",
    3: "each data rank keeps a part of state and weights",
}
"""`zero_stage` -> what it does."""


@dataclass(frozen=True)
class Parallelism:
    """Among how many ranks a run is divided, and what there is to divide.

    Attributes:
        blocks: the number of repeated blocks of every stage.
        data_ranks: of a stage.
    """

    blocks: Sequence[int]
    data_ranks: int = 1

    @classmethod
    def of(cls, layers: Sequence[Any], bounds: Bounds, stages: int, data_ranks: int) -> Parallelism:
        """That of a denoiser's layers, cut into pieces of so many stages."""
        of_stages = (within(of_stage(bounds, stage, stages), layers) for stage in range(stages))
        return cls([len(repeated_blocks(own)) for own in of_stages], data_ranks)


@dataclass(frozen=True)
class Saving:
    """Something to set.

    Attributes:
        says: what; as it is written in a config, or in words.
        does: what comes of it.
        changes: keys and values that are meant by it, or an example of them.
    """

    says: str
    does: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.says}: {self.does}" if self.does else self.says


def to_train(settings: Settings, parallelism: Parallelism, *, planned: bool = False) -> list[Saving]:
    """What makes a step smaller, that first which costs least.

    Args:
        planned: whether a plan is made of what is set, so that "auto" finds out.
    """
    of_step = _cached_texts, _recomputed, _micro_batches, _plain_schedule
    ways = (*of_step, _swapped, _small_weights, *_OF_STATE, _more_gpus)
    smaller = Saving("smaller resolutions, or fewer frames, in the dataset")
    return [*_allowed(settings, parallelism, ways, planned=planned), smaller]


def ways_for(what: str, settings: Settings, parallelism: Parallelism) -> list[Saving]:
    """The savings of what a run does that is called so: "evaluation after step 3", "samples 3", "step 3"."""
    named = {"evaluation": to_evaluate, "samples": to_sample}
    ways = next((ways for name, ways in named.items() if what.startswith(name)), to_train)
    return ways(settings, parallelism)


def to_evaluate(settings: Settings, parallelism: Parallelism, *, planned: bool = False) -> list[Saving]:
    """The same for evaluation."""
    ways = (_evaluated_batches, *_BETWEEN_STEPS)
    return _allowed(settings, parallelism, ways, planned=planned)


def to_sample(settings: Settings, parallelism: Parallelism, *, planned: bool = False) -> list[Saving]:
    """The same for samples."""
    return [_SMALLER_SAMPLES, *_allowed(settings, parallelism, _BETWEEN_STEPS, planned=planned)]


def to_draw(settings: Settings, parallelism: Parallelism) -> list[Saving]:
    """The same for samples without a run, beside which nothing is trained."""
    return [_SMALLER_SAMPLES, *_allowed(settings, parallelism, (_swapped_in_evaluation, *_FOR_WEIGHTS), planned=False)]


def of_weights(settings: Settings, parallelism: Parallelism, *, planned: bool = False) -> list[Saving]:
    """What leaves fewer weights on the GPU while it trains."""
    return _allowed(settings, parallelism, (_cached_texts, *_FOR_WEIGHTS), planned=planned)


Way = Callable[[Settings, Parallelism, bool], Iterable[Saving]]
"""(settings, parallelism, whether it is planned) -> what may be set."""


def _allowed(settings: Settings, parallelism: Parallelism, ways: Sequence[Way], *, planned: bool) -> list[Saving]:
    found = [saving for way in ways for saving in way(settings, parallelism, planned)]
    return [saving for saving in found if allows(settings, **saving.changes)]


def _plain_schedule(settings: Settings, parallelism: Parallelism, planned: bool) -> Iterator[Saving]:
    """Of stages in several pieces, the cut of one is another."""
    if settings.pieces > 1:
        changes = {
            **_CUT_ANEW,
            "schedule": "1f1b",
            "pieces_per_stage": Settings.model_fields["pieces_per_stage"].default,
        }
        yield Saving('schedule = "1f1b"', "fewer micro-batches are under way", changes)


def _cached_texts(settings: Settings, parallelism: Parallelism, planned: bool) -> Iterator[Saving]:
    if not settings.cache_text_embeddings:
        changes = {"cache_text_embeddings": True}
        yield Saving("cache_text_embeddings = true", "no text encoder stays on the GPU", changes)


def _recomputed(settings: Settings, parallelism: Parallelism, planned: bool) -> Iterator[Saving]:
    now = settings.activation_checkpointing
    if not any(parallelism.blocks):
        return
    if planned and now in (False, True):
        does = "blocks are computed once more in the backward pass, as far as the card asks for it"
        yield Saving('activation_checkpointing = "auto"', does, {"activation_checkpointing": "offload"})
    elif not now:
        does = "each block is computed once more in the backward pass"
        yield Saving("activation_checkpointing = true", does, {"activation_checkpointing": True})
    if now and settings.activation_checkpointing_every_n_blocks > 1:
        changes = {"activation_checkpointing_every_n_blocks": 1}
        yield Saving("a smaller activation_checkpointing_every_n_blocks", "", changes)
    elif now is True and not planned:
        does = "what is kept of the blocks waits in the machine's memory"
        yield Saving('activation_checkpointing = "offload"', does, {"activation_checkpointing": "offload"})


def _micro_batches(settings: Settings, parallelism: Parallelism, planned: bool) -> Iterator[Saving]:
    keys = [f"{kind}micro_batch_size_per_gpu" for kind in ("", "image_")]
    if changes := {key: 1 for key in keys if _is_several(getattr(settings, key))}:
        more = settings.gradient_accumulation_steps + 1
        accumulates = allows(settings, **changes, gradient_accumulation_steps=more)
        with_more = ", with more gradient_accumulation_steps" if accumulates else ""
        yield Saving(" and ".join(f"{key} = 1" for key in changes) + with_more, "", changes)


def _evaluated_batches(settings: Settings, parallelism: Parallelism, planned: bool) -> Iterator[Saving]:
    trained = settings.micro_batch_size_per_gpu, settings.image_micro_batch_size_per_gpu
    own = settings.eval_micro_batch_size_per_gpu, settings.eval_image_micro_batch_size_per_gpu
    # What evaluation has none of is that of training.
    clips, images = own[0] or trained[0], own[1] or own[0] or trained[1]
    changes = {}
    if _is_several(clips) or (_is_several(images) and own[1] is None):
        changes["eval_micro_batch_size_per_gpu"] = 1
    if _is_several(own[1]):
        changes["eval_image_micro_batch_size_per_gpu"] = 1
    if changes:
        yield Saving(" and ".join(f"{key} = 1" for key in changes), "", changes)


def _is_several(sizes: MicroBatches | None) -> bool:
    """Whether a micro-batch of any resolution has more than one sample."""
    return any(count > 1 for _, count in sizes) if isinstance(sizes, list) else (sizes or 1) > 1


def _swapped(settings: Settings, parallelism: Parallelism, planned: bool) -> Iterator[Saving]:
    """Blocks that are not swapped yet, where that leaves less on the GPU than the buffers take."""
    in_full, stages = settings.adapter is None, len(parallelism.blocks)
    if settings.blocks_to_swap == "auto" or (in_full and not _steps_on_processor(settings)):
        return
    now, most = numbers_of(settings.blocks_to_swap, stages), list(parallelism.blocks)
    least = 1 if in_full or (settings.divides_weights and parallelism.data_ranks > 1) else BUFFERS + 1
    if not any(limit > max(number, least - 1) for number, limit in zip(now, most, strict=True)):
        return
    top = most[0] if len(set(most)) == 1 else most
    if planned:
        says = 'blocks_to_swap = "auto"'
    elif any(now):
        says = f"more blocks_to_swap ({as_toml(top)} at most)"
    elif min(most) > SOME:
        says = f"blocks_to_swap = {SOME} or more ({as_toml(top)} at most)"
    else:
        says = f"blocks_to_swap = {as_toml(top)}, or fewer"
    what = "weights and their optimizer state wait" if in_full else "frozen weights wait"
    yield Saving(says, f"{what} in the machine's memory", {"blocks_to_swap": top})


def _swapped_in_evaluation(settings: Settings, parallelism: Parallelism, planned: bool) -> Iterator[Saving]:
    if settings.disable_block_swap_for_eval and settings.swaps:
        yield Saving("disable_block_swap_for_eval = false", "", {"disable_block_swap_for_eval": False})


def _small_weights(settings: Settings, parallelism: Parallelism, planned: bool) -> Iterator[Saving]:
    model = settings.model
    # What of a weight is trained itself must not be quantised.
    if settings.adapter is None or model.train or model.transformer_dtype in FOUR_BITS or not any(parallelism.blocks):
        return
    changes = {"model": model.model_copy(update={"transformer_dtype": "nf4"})}
    if model.transformer_dtype in FORMATS:
        yield Saving('[model] transformer_dtype = "nf4"', "the frozen weights in 4 bits", changes)
    else:
        says = '[model] transformer_dtype = "int8", "float8" or "nf4"'
        yield Saving(says, "the frozen weights in 8 or 4 bits", changes)


def _eight_bits(settings: Settings, parallelism: Parallelism, planned: bool) -> Iterator[Saving]:
    """Of a full fine-tune, whose steps the GPU makes."""
    now = settings.optimizer
    if now.type != "adamw" or settings.adapter or settings.swaps or settings.offload_optimizer:
        return
    # Of 16-bit weights it keeps what is lost of small steps.
    name = "adamw8bit" if _trained_type(settings) == "float32" else "adamw8bitkahan"
    kind, given = optimizers.find(name).settings, now.model_dump(exclude_unset=True)
    lost = [key for key in given if key not in kind.model_fields]
    without = f", without {', '.join(lost)}" if lost else ""
    kept = {key: value for key, value in given.items() if key not in lost}
    changes = {"optimizer": kind(**{**kept, "type": name})}
    yield Saving(f'[optimizer] type = "{name}"{without}', "the moments in 8 bits", changes)


def _divided(
    settings: Settings, parallelism: Parallelism, planned: bool, among: Sequence[int] = (3, 2, 1)
) -> Iterator[Saving]:
    """The first of these values of `zero_stage` that leaves less and is allowed."""
    fitting = (
        stage for stage in among if allows(settings, zero_stage=stage) and _divides(settings, parallelism, stage)
    )
    if stage := next(fitting, None):
        yield Saving(f"zero_stage = {stage}", SHARES[stage], {"zero_stage": stage})


def _divides(settings: Settings, parallelism: Parallelism, stage: int) -> bool:
    """Whether a value of `zero_stage` leaves less than the one that is set. Buffers may take as much as it divides."""
    now, ranks = settings.zero_stage, parallelism.data_ranks
    if ranks == 1 or stage <= now:
        return False
    if stage == 3 and (settings.adapter or now):
        # Blocks differ in size, and two of the largest are whole; where they are trained, the gradients of one too.
        whole = BUFFERS if settings.adapter else BUFFERS + 1
        return sum(parallelism.blocks) * (1 - 1 / ranks) > 2 * whole
    if stage == 2 and now:
        # What is divided is summed in float32, and is otherwise of the parameters' type in a single micro-batch.
        return ranks > 2 or settings.gradient_accumulation_steps > 1 or _trained_type(settings) == "float32"
    return True


def _trained_type(settings: Settings) -> str:
    """The type of what is trained."""
    chosen = settings.adapter if settings.adapter else settings.model
    return getattr(chosen, "transformer_dtype", None) or chosen.dtype


def _offloaded_optimizer(settings: Settings, parallelism: Parallelism, planned: bool) -> Iterator[Saving]:
    if _steps_on_processor(settings) and not settings.offload_optimizer:
        does = "the optimizer's state waits in the machine's memory"
        yield Saving("offload_optimizer = true", does, {"offload_optimizer": True})


def _steps_on_processor(settings: Settings) -> bool:
    return "cpu" not in optimizers.find(settings.optimizer.type).not_on


def _averages(settings: Settings, parallelism: Parallelism, planned: bool) -> Iterator[Saving]:
    if settings.ema and settings.ema.device == "gpu":
        changes = {"ema": settings.ema.model_copy(update={"device": "cpu"})}
        yield Saving('[ema] device = "cpu"', "the averages wait in the machine's memory", changes)


def _more_gpus(settings: Settings, parallelism: Parallelism, planned: bool) -> Iterator[Saving]:
    """What further GPUs could do: hold a stage each, or a part of all blocks. With a plain schedule what a stage keeps
    for backward passes stays, and weights become less; with stages in pieces, more is kept."""
    stages = {**_CUT_ANEW, "pipeline_stages": settings.pipeline_stages + 1, "blocks_to_swap": 0}
    if settings.pieces == 1 and sum(parallelism.blocks) > settings.pipeline_stages and allows(settings, **stages):
        yield Saving("more pipeline_stages", "if there are more GPUs", stages)
    elif settings.divides_weights and any(parallelism.blocks):
        yield Saving("more data ranks", "if there are more GPUs, each keeps a smaller part of the weights", {})


_CUT_ANEW = {"partition_method": "parameters", "partition_split": None, "stage_weights": None}
_OF_STATE = (_eight_bits, _divided, _offloaded_optimizer, _averages)
_FOR_WEIGHTS = (partial(_divided, among=(3,)), _swapped, _small_weights, _more_gpus)
_SMALLER_SAMPLES = Saving("smaller samples in [sampling] (width, height, frames)")
_BETWEEN_STEPS = (
    _swapped_in_evaluation,
    _averages,
    _cached_texts,
    _swapped,
    _small_weights,
    _eight_bits,
    # There are no gradients.
    partial(_divided, among=(3, 1)),
    _offloaded_optimizer,
    _more_gpus,
)
