"""`--sample_only`: the samples of a config by the weights of a checkpoint, without data and without training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from models.assembly.checkpoint_export import averages_in, in_words_of, take_weights_to_use
from models.assembly.drawings import sample_model
from models.assembly.preflight import check_model
from models.assembly.prompts import pictures_a_prompt
from models.assembly.sample_checks import tell_long_prompts
from models.assembly.stage import StagedModel, load_stage
from models.assembly.trainer import block_swap, open_checkpoint
from models.base import BasePipeline
from utils.errors import UserError
from utils.parallel.backend import initialize_deepspeed
from utils.parallel.engine import Engine, optimizer_for_frozen_stage
from utils.parallel.pipeline import DenoiserPipeline
from utils.ranks import Ranks
from utils.run.attempts import Attempt, Failed
from utils.run.checkpoint import Checkpoint, ResumeFlags
from utils.run.sample_texts import Origin
from utils.run.sampling import draw_into, file_name
from utils.run.signals import StopRequests
from utils.settings.sample_requests import requests_of
from utils.settings.schema import PLANNED, Settings

logger = logging.getLogger(__name__)

FLAG = "--sample_only"
FOLDER = "samples_only"
"""Where they go in the run's folder, beside those of the run itself, which stay."""


def draw_checkpoint(source: str, settings: Settings, ranks: Ranks, pipeline: BasePipeline, stop: StopRequests) -> Path:
    """Draws into `samples_only/step000500` of the checkpoint's run, with the moving averages if `[ema]` says that
    samples have them, and returns the folder. What a run chooses by its data ("auto", a planned cut) is not done: no
    block is swapped then, and stages have equal numbers of parameters.

    Args:
        source: a checkpoint, or a run with checkpoints.

    Raises:
        UserError: there is none, or nothing to draw; the model and the adapter are not those that it was made with; or
            drawing failed.
    """
    requests = requests_of(settings.sampling, pipeline.guided_by_second_prediction)
    if not requests:
        raise UserError.of(f"there is nothing to draw for {FLAG}; add prompts", where="[sampling]")
    settings = settings.model_copy(update=_without_training(settings))
    staged = check_model(settings, pipeline)
    try:
        # The optimizer's state is not read.
        checkpoint = open_checkpoint(settings, ResumeFlags(source, reset_optimizer=True), staged, ranks)
    except UserError as error:
        raise in_words_of(FLAG, error) from error
    encoders = pipeline.encoders_for(0 if pipeline.starts_from_picture else pictures_a_prompt(requests))
    if ranks.is_main:
        tell_long_prompts(encoders, requests, pipeline)
    initialize_deepspeed()
    engine = _engine(settings, ranks, pipeline, checkpoint)
    model = sample_model(pipeline, encoders, settings, ranks, Path(), in_cache=False)
    run, step = checkpoint.folder.parent, checkpoint.progress.step
    folder = run / FOLDER / f"step{step:06d}"
    try:
        drawn = draw_into(
            folder, engine, ranks, model, Origin(model.name, run.name, step), Attempt(FLAG, ranks, stop.pending)
        )
    except Failed as failed:
        raise UserError.of(f"no samples are drawn: {failed}", str(folder), FLAG) from failed
    if ranks.is_main and model.score:
        files = [folder / file_name(drawing.request) for drawing in drawn]
        score = model.score.of(files, [drawing.request.prompt for drawing in drawn])
        if score is not None:
            logger.info("samples/clip_score: %.3f", score)
    return folder


def _without_training(settings: Settings) -> dict[str, object]:
    """What a run needs for its steps alone, and what it chooses by its data."""
    return {
        "activation_checkpointing": False,
        "blocks_to_swap": 0 if settings.blocks_to_swap == "auto" else settings.blocks_to_swap,
        "partition_method": "parameters" if settings.partition_method in PLANNED else settings.partition_method,
        "zero_stage": 0,
        "offload_optimizer": False,
    }


def _engine(settings: Settings, ranks: Ranks, pipeline: BasePipeline, checkpoint: Checkpoint) -> Engine:
    """This stage with the checkpoint's weights, which nothing trains."""
    staged = load_stage(pipeline, settings, ranks.stage)
    _take_weights(settings, checkpoint, staged.trained(staged.stage_layers(ranks.stage)))
    _freeze(staged)
    module = DenoiserPipeline(
        staged.layers,
        staged.bounds,
        pipeline.stream_type,
        pipeline.maths.loss,
        loss_terms=pipeline.loss_terms,
        swap=block_swap(settings, ranks, staged, trained=False),
    )
    return Engine(module, optimizer_for_frozen_stage(), accumulation=1, clip_norm=0.0)


@torch.no_grad()
def _take_weights(settings: Settings, checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> None:
    checkpoint.load_weights(parameters)
    take_weights_to_use(settings, checkpoint, parameters)
    if settings.ema and not settings.ema.sample:
        return
    if parameters and (ema := averages_in(settings, checkpoint, parameters, "drawn with")):
        for name, parameter in parameters.items():
            parameter.copy_(ema.averages[name])


def _freeze(staged: StagedModel) -> None:
    for layer in staged.layers:
        layer.requires_grad_(False)
