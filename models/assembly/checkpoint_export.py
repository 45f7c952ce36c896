"""`--export`: the weights of a checkpoint for other programs, without training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import optimizers
from models.assembly.exports import about_run, beside_factors, export_plan
from models.assembly.preflight import check_model
from models.assembly.stage import StagedModel, load_stage
from models.assembly.trainer import open_checkpoint
from models.base import BasePipeline
from optimizers.ema import EMA
from optimizers.parameter_groups import groups_of
from utils.errors import Problem, UserError
from utils.ranks import Ranks
from utils.run import export_metadata
from utils.run.attempts import Failed
from utils.run.checkpoint import Checkpoint, ResumeFlags
from utils.run.export import OF_AVERAGES, export_with_averages
from utils.run.folder import saved_at
from utils.run.results import weights_in
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

RESUME, EXPORT = "--resume_from_checkpoint", "--export"
WHOLE = {
    "pipeline_stages": 1,
    "schedule": "1f1b",
    "pieces_per_stage": 2,
    "partition_method": "parameters",
    "partition_split": None,
    "stage_weights": None,
    "blocks_to_swap": 0,
    "compile": False,
}
"""Settings with which one process holds the model and runs nothing."""


def export_checkpoint(source: str, settings: Settings, pipeline: BasePipeline) -> Path:
    """Exports a checkpoint's weights into the folder of its run, as `step500`, in one process whatever the number of
    stages. Files that an earlier export of that name has and this one does not write stay.

    Args:
        source: a checkpoint, or a run with checkpoints.

    Raises:
        UserError: there is none, or the model and the adapter are not those that it was made with.
    """
    staged = check_model(settings, pipeline)
    try:
        # The optimizer's state is not read.
        checkpoint = open_checkpoint(settings, ResumeFlags(source, reset_optimizer=True), staged)
    except UserError as error:
        raise in_words_of(EXPORT, error) from error
    if not settings.adapter or beside_factors(staged, of_this_process=False):
        staged = load_stage(pipeline, settings.model_copy(update=WHOLE), stage=0)
    parameters = _parameters(staged, is_adapter=settings.adapter is not None)
    checkpoint.load_weights(parameters)
    take_weights_to_use(settings, checkpoint, parameters)
    ema = averages_in(settings, checkpoint, parameters) if has_averages(settings, checkpoint) else None
    step = checkpoint.progress.step
    folder = checkpoint.folder.parent / f"step{step}"
    about = about_run(pipeline, settings, _of_data(checkpoint.folder.parent))
    about |= export_metadata.of_progress(checkpoint.progress)
    about[export_metadata.FINISHED] = repr(saved_at(checkpoint.folder))
    plan = export_plan(pipeline, settings, staged, about)
    try:
        export_with_averages(folder, Ranks(), parameters, plan, step, ema, adds=True)
    except Failed as failed:
        raise UserError.of(f"the export is not written: {failed}", str(folder), EXPORT) from failed
    made = [export for export in (folder, folder.with_name(folder.name + OF_AVERAGES)) if export.is_dir()]
    logger.info("done:\n%s", "\n".join(f"  weights:    {path}" for export in made for path in weights_in(export)))
    return folder


def _of_data(run: Path) -> dict[str, str]:
    """What the run has left about its data, for the headers."""
    found = export_metadata.kept(run)
    if not found:
        logger.warning("the export's header says nothing of the data: %s is not there", run / export_metadata.ABOUT)
    return found


def in_words_of(flag: str, error: UserError) -> UserError:
    """The problems of finding a checkpoint, in the words of the flag that was given."""
    return UserError(
        Problem(one.file, one.where.replace(RESUME, flag), one.message.replace(RESUME, flag)) for one in error.problems
    )


def _parameters(staged: StagedModel, *, is_adapter: bool) -> Mapping[str, nn.Parameter]:
    """What is trained, on the CPU. Nothing of the base is needed for most adapters, whose factors have no values."""
    trained = staged.trained(staged.layers)
    if not is_adapter:
        return trained
    return {name: nn.Parameter(torch.empty_like(factor, device="cpu")) for name, factor in trained.items()}


def take_weights_to_use(settings: Settings, checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> None:
    """Gives the parameters the average that their optimizer keeps, where it keeps one and trains something else.

    Raises:
        UserError: the settings have another optimizer.
    """
    made_with, chosen = checkpoint.made_with["optimizer"].get("type", ""), settings.optimizer
    try:
        kind = optimizers.find(made_with)
    except ValueError:
        return
    if not kind.averages:
        return
    if made_with != chosen.type:
        raise UserError.of(
            f"is '{chosen.type}', the checkpoint's is '{made_with}', which keeps the average that is to be exported: "
            "export with it",
            str(checkpoint.folder),
            "[optimizer] type",
        )
    groups = groups_of(parameters.items(), lr=chosen.lr, weight_decay=chosen.weight_decay)
    optimizer = optimizers.build(groups, chosen)
    checkpoint.load_optimizer(parameters, optimizer, kind.retyped)
    optimizer.eval()


def has_averages(settings: Settings, checkpoint: Checkpoint, use: str = "exported") -> bool:
    """Whether the checkpoint has moving averages, and the settings some; warns if one has none. `use` says what for."""
    if settings.ema is None:
        if checkpoint.ema_since is not None:
            logger.warning("the moving averages of %s are not %s: the config has no [ema]", checkpoint.folder, use)
        return False
    if checkpoint.ema_since is None:
        logger.warning("%s has no moving averages: its weights alone are %s", checkpoint.folder, use)
        return False
    return True


def averages_in(settings: Settings, checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> EMA:
    """The checkpoint's moving averages of the parameters, where it has some."""
    # The averages are read; an optimizer is where they would begin.
    ema = EMA(parameters.items(), settings.ema, torch.optim.SGD(parameters.values()))
    checkpoint.load_ema(ema)
    return ema
