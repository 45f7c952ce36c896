"""Rules about the keys that say how a model is cut into stages."""

from collections.abc import Iterator
from itertools import pairwise

from utils.errors import Problem
from utils.settings.rule import SettingsRule, at
from utils.settings.schema import Settings

STAGES_AND_PIECES = ("pipeline_stages", "schedule", "pieces_per_stage")


def _split_fits_method(settings: Settings, _: int) -> Iterator[Problem]:
    split, place = settings.partition_split, "key `partition_split`"
    wanted, of_pieces = settings.pipeline_stages * settings.pieces - 1, f"pipeline_stages = {settings.pipeline_stages}"
    if settings.pieces > 1:
        of_pieces = f"{of_pieces} with {settings.pieces} pieces each"
    if settings.partition_method != "manual":
        if split is not None:
            yield at(place, 'is for partition_method = "manual" only; set that, or leave this out')
    elif split is None:
        yield at(place, f'is required by partition_method = "manual": {wanted} layer numbers')
    elif len(split) != wanted:
        yield at(place, f"needs {wanted} layer numbers for {of_pieces}; given: {split}")
    elif any(first >= second for first, second in pairwise(split)):
        yield at(place, f"must rise from each number to the next; given: {split}")


def _pieces_have_stages(settings: Settings, _: int) -> Iterator[Problem]:
    if settings.schedule == "1f1b":
        if settings.pieces_per_stage != Settings.model_fields["pieces_per_stage"].default:
            yield at("key `pieces_per_stage`", 'is for schedule = "interleaved" only; set that, or leave this out')
        return
    if settings.pipeline_stages == 1:
        yield at(
            "key `schedule`",
            'cannot be "interleaved" with pipeline_stages = 1, where no stage waits for another; leave it out, or take '
            "more stages",
        )
    if settings.partition_method == "memory":
        yield at(
            "key `partition_method`",
            'cannot be "memory" with schedule = "interleaved", which needs pieces that take the same time; set "time"',
        )


def _weights_fit_stages(settings: Settings, _: int) -> Iterator[Problem]:
    weights, stages, place = settings.stage_weights, settings.pipeline_stages, "key `stage_weights`"
    if weights and settings.partition_method == "manual":
        yield at(place, "is not used beside partition_split, which says where stages begin; leave out one of them")
    elif weights and len(weights) != stages:
        yield at(place, f"has {len(weights)} numbers for pipeline_stages = {stages}; write one for each stage")


def _swap_fits_stages(settings: Settings, _: int) -> Iterator[Problem]:
    swapped, stages = settings.blocks_to_swap, settings.pipeline_stages
    if isinstance(swapped, list) and len(swapped) != stages:
        yield at(
            "key `blocks_to_swap`",
            f"has {len(swapped)} numbers for pipeline_stages = {stages}; write one for each stage, or one for all",
        )


def _stages_divide_world(settings: Settings, world_size: int | None) -> Iterator[Problem]:
    stages = settings.pipeline_stages
    if world_size is not None and world_size % stages:
        fitting = [str(count) for count in range(1, world_size + 1) if world_size % count == 0]
        yield at(
            "key `pipeline_stages`",
            f"{stages} does not divide the {world_size} processes of this launch; launch a multiple of "
            f"{stages} (deepspeed --num_gpus={stages} train.py ...), or set it to {' or '.join(fitting)}",
        )


def micro_batches_overlap(settings: Settings) -> Iterator[Problem]:
    """A remark on a schedule that is of no use, and does no harm."""
    if settings.pieces > 1 and settings.gradient_accumulation_steps == 1:
        yield at(
            "key `schedule`",
            '"interleaved" gains nothing with gradient_accumulation_steps = 1: one micro-batch goes through all stages '
            "while the others wait",
        )


STAGE_RULES = (
    SettingsRule(("partition_split", "partition_method", *STAGES_AND_PIECES), _split_fits_method),
    SettingsRule((*STAGES_AND_PIECES, "partition_method"), _pieces_have_stages),
    SettingsRule(("pipeline_stages",), _stages_divide_world),
    SettingsRule(("stage_weights", "partition_method", "pipeline_stages"), _weights_fit_stages),
    SettingsRule(("blocks_to_swap", "pipeline_stages"), _swap_fits_stages),
)
