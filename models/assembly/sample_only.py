"""`--sample_only`: the samples of a config by the weights of a checkpoint or of an export, without data and without
training."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from torch import nn

from models.assembly.checkpoint_export import averages_in, has_averages, in_words_of, take_weights_to_use
from models.assembly.drawings import sample_model
from models.assembly.placement import block_swap, homes_of
from models.assembly.preflight import check_model
from models.assembly.prompts import pictures_a_prompt
from models.assembly.sample_checks import tell_long_prompts
from models.assembly.stage import StagedModel, load_stage
from models.assembly.trainer import open_checkpoint
from models.base import BasePipeline
from utils.errors import UserError
from utils.parallel.backend import initialize_deepspeed
from utils.parallel.engine import Engine
from utils.parallel.pipeline import DenoiserPipeline
from utils.parallel.together import optimizer_for_frozen_stage
from utils.ranks import Ranks
from utils.run.attempts import Attempt, Failed
from utils.run.checkpoint import Checkpoint, ResumeFlags
from utils.run.folder import SETTINGS
from utils.run.out_of_memory import explaining
from utils.run.sample_texts import Origin
from utils.run.sampling import draw_into, file_name
from utils.run.savings import Parallelism, to_draw
from utils.run.signals import StopRequests
from utils.settings.sample_requests import requests_of
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

FLAG = "--sample_only"
FOLDER = "samples_only"
"""Where they go in the run's folder, beside those of the run itself, which stay; of an export that is in no run's
folder, in `output_dir`."""
CONFIG = "config.json"
"""What a part of a diffusers folder has."""


def export_at(source: str, settings: Settings) -> Path | None:
    """The file or folder of an export, if `source` (a path, or a name in `output_dir`) names one, and no checkpoint and
    no run."""
    found = next((path for path in (Path(source), settings.output_dir / source) if path.exists()), None)
    if found is None or found.is_file():
        return found
    if found.name.startswith("global_step") or (found / SETTINGS).is_file() or any(found.glob("global_step*")):
        return None
    return found


def with_export(source: str | None, settings: Settings) -> Settings:
    """The settings with which a model begins as the export that `source` names is; the same ones, if it names none.

    Raises:
        UserError: the export has something else than what the settings train.
    """
    export = export_at(source, settings) if source else None
    if export is None:
        return settings
    if settings.adapter:
        if export.is_dir() and (parts := _parts(export)):
            raise UserError.of(
                f"has a whole model ({', '.join(parts)}), and the config has an [adapter]; leave that out, or name "
                "the file of an adapter",
                str(export),
                FLAG,
            )
        # It may be of another rank: that of a run with `init` has twice as many.
        of_file = {"init_from_existing": export, "dim_from_weights": True, "init": None, "dropout": 0.0}
        known = {key: value for key, value in of_file.items() if key in type(settings.adapter).model_fields}
        return settings.model_copy(update={"adapter": settings.adapter.model_copy(update=known)})
    parts = _parts(export) if export.is_dir() else []
    if len(parts) > 1:
        raise UserError.of(
            f"has {len(parts)} parts of a model, {', '.join(parts)}; name them in [model] transformer_path and "
            "text_encoders, or draw with the checkpoint",
            str(export),
            FLAG,
        )
    weights = export / parts[0] if parts else export
    return settings.model_copy(update={"model": settings.model.model_copy(update={"transformer_path": weights})})


def _parts(export: Path) -> list[str]:
    """The folders of an export that are parts of a model."""
    return sorted(config.parent.name for config in export.glob(f"*/{CONFIG}"))


def folder_for(export: Path, output_dir: Path) -> Path:
    """Where the samples of an export go: beside those of the run in whose folder it lies, since exports of several runs
    have one name."""
    place = export.absolute()
    run = next((folder for folder in (place, *place.parents)[1:3] if (folder / SETTINGS).is_file()), None)
    if run is None:
        return output_dir / FOLDER / export.stem
    named = place if place.is_dir() else place.with_suffix("")
    return run / FOLDER / "_".join(named.relative_to(run).parts)


def draw_samples(source: str, settings: Settings, ranks: Ranks, pipeline: BasePipeline, stop: StopRequests) -> Path:
    """Draws into `samples_only/step000500` of the checkpoint's run, with the moving averages if `[ema]` says that
    samples have them, or with an export as `folder_for` says, and returns the folder. What a run chooses by its data
    ("auto", a planned cut) is not done: no block is swapped then, and stages have equal numbers of parameters.

    Args:
        source: a checkpoint, or a run with checkpoints; or an export, with which the settings and the pipeline are made
            already, see `with_export`.

    Raises:
        UserError: there is none, or nothing to draw; the model and the adapter are not those that it was made with; the
            GPU's memory does not suffice; or drawing failed.
    """
    requests = requests_of(settings.sampling, pipeline.guided_by_second_prediction)
    if not requests:
        raise UserError.of(f"there is nothing to draw for {FLAG}; add prompts", where="[sampling]")
    settings = settings.model_copy(update=_without_training(settings))
    staged = check_model(settings, pipeline)
    export, checkpoint = export_at(source, settings), None
    if export is None:
        checkpoint = _checkpoint(source, settings, staged, ranks)
    encoders = pipeline.encoders_for(0 if pipeline.starts_from_picture else pictures_a_prompt(requests))
    if ranks.is_main:
        tell_long_prompts(encoders, requests, pipeline)
    initialize_deepspeed()
    parallelism = Parallelism.of(staged.layers, staged.bounds, staged.stages, ranks.data_ranks)
    savings = partial(to_draw, settings, parallelism)
    with explaining(savings, settings.output_dir, lambda: FLAG, saved=""):
        engine = _engine(settings, ranks, pipeline, checkpoint)
    model = sample_model(pipeline, encoders, settings, ranks, Path(), in_cache=False)
    if checkpoint:
        run, step = checkpoint.folder.parent, checkpoint.progress.step
        folder, origin = run / FOLDER / f"step{step:06d}", Origin(model.name, run.name, step)
    else:
        folder, origin = folder_for(export, settings.output_dir), Origin(model.name, export.name, None)
    if ranks.is_main and any(folder.glob("*")):
        logger.info("what was drawn into %s before is replaced", folder)
    with explaining(savings, folder, lambda: FLAG, saved=""):
        try:
            drawn = draw_into(folder, engine, ranks, model, origin, Attempt(FLAG, ranks, stop.pending, savings))
        except Failed as failed:
            raise UserError.of(f"no samples are drawn: {failed}", str(folder), FLAG) from failed
    if ranks.is_main:
        logger.info("done: %d samples in %s", len(drawn), folder)
    if ranks.is_main and model.score:
        files = [folder / file_name(drawing.request) for drawing in drawn]
        score = model.score.of(files, [drawing.request.prompt for drawing in drawn])
        if score is not None:
            logger.info("samples/clip_score: %.3f", score)
    return folder


def _checkpoint(source: str, settings: Settings, staged: StagedModel, ranks: Ranks) -> Checkpoint:
    try:
        # The optimizer's state is not read.
        return open_checkpoint(settings, ResumeFlags(source, reset_optimizer=True), staged, ranks)
    except UserError as error:
        raise in_words_of(FLAG, error) from error


def _without_training(settings: Settings) -> dict[str, object]:
    """What a run needs for its steps alone, and what it chooses by its data."""
    return {
        "activation_checkpointing": False,
        "blocks_to_swap": 0 if settings.blocks_to_swap == "auto" else settings.blocks_to_swap,
        # Weights are divided here too; there is nothing else that data ranks could divide.
        "zero_stage": settings.zero_stage if settings.divides_weights else 0,
        "offload_optimizer": False,
    }


def _engine(settings: Settings, ranks: Ranks, pipeline: BasePipeline, checkpoint: Checkpoint | None) -> Engine:
    """This stage with the checkpoint's weights, if there is one, which nothing trains."""
    trained = Trained(settings, checkpoint)
    homes = partial(homes_of, settings, ranks, trained=False)
    # What is trained beside frozen weights stays.
    before = {} if settings.adapter else {"change": trained.take}
    staged = load_stage(pipeline, settings, ranks.stage, homes, ranks=ranks, **before)
    trained.take(staged, staged.stage_layers(ranks.stage))
    staged.denoiser.requires_grad_(False)
    module = DenoiserPipeline(
        staged.layers,
        staged.bounds,
        pipeline.stream_type,
        pipeline.maths.loss,
        stages=staged.stages,
        loss_terms=pipeline.loss_terms,
        swap=block_swap(settings, staged.homes),
    )
    return Engine(module, optimizer_for_frozen_stage(), accumulation=1, clip_norm=0.0)


class Trained:
    """What samples are drawn with of a checkpoint, if there is one."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint | None):
        self._settings, self._checkpoint = settings, checkpoint
        wanted = checkpoint is not None and not (settings.ema and not settings.ema.sample)
        self._averages = wanted and has_averages(settings, checkpoint, "drawn with")

    @torch.no_grad()
    def take(self, staged: StagedModel, layers: list[nn.Module]) -> None:
        """Gives layers their trained weights, and freezes them; a second time it does nothing."""
        parameters = staged.trained(layers)
        if self._checkpoint and parameters:
            for parameter in parameters.values():
                # Pages of the base's mapped file that are written to would stay as long as it is open.
                parameter.data = torch.empty_like(parameter)
            self._checkpoint.load_weights(parameters)
            take_weights_to_use(self._settings, self._checkpoint, parameters)
            if self._averages:
                ema = averages_in(self._settings, self._checkpoint, parameters)
                for name, parameter in parameters.items():
                    parameter.copy_(ema.averages[name])
        for layer in layers:
            layer.requires_grad_(False)
