"""Puts a run together: weights, optimizer, engine, batches, folder, metrics and duties."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.optim import Optimizer

import optimizers
from models.assembly.data import Data, controls_of, reader_of
from models.assembly.described import described
from models.assembly.drawings import sample_model
from models.assembly.exports import about_run, export_plan
from models.assembly.kept import sums_in_float32
from models.assembly.noising import NoisedBatch, Noising
from models.assembly.placement import block_swap, homes_of, shares_of
from models.assembly.plan import epochs_of
from models.assembly.rates import Rates
from models.assembly.stage import StagedModel, load_stage, partition, teacher_of
from models.base import BasePipeline
from optimizers import sums
from optimizers.ema import EMA
from optimizers.parameter_groups import groups_of
from utils.adapters.norms import factors_in, limit_norms
from utils.collector import without_collector
from utils.dataset.batches import EvaluationBatches, FeatureBatch, SampleReader, TrainingBatches
from utils.dataset.encoders import reads_text
from utils.dataset.epochs import Epochs, micro_batch_of
from utils.dataset.samples import Bucket, VersionPicker
from utils.parallel.engine import Engine
from utils.parallel.offload import HostInputs
from utils.parallel.pipeline import DenoiserPipeline
from utils.parallel.sharding import Shares
from utils.parallel.together import groups_for_frozen_stage, numbers_of_all, optimizer_for_frozen_stage
from utils.parallel.wire import map_tensors
from utils.ranks import Ranks
from utils.run import export_metadata
from utils.run import folder as run_folder
from utils.run.block_norms import BlockNorms
from utils.run.branches import begin_branch
from utils.run.cadence import Duty
from utils.run.checkpoint import Checkpoint, ResumeFlags, damage_in, identity_of, of_other_run, run_of
from utils.run.display import go_on_in
from utils.run.duties import make_duties
from utils.run.export_metadata import STARTED
from utils.run.in_use import RunLock
from utils.run.metrics import Metrics
from utils.run.notes import kept_notes
from utils.run.out_of_memory import explaining
from utils.run.parts import RunParts
from utils.run.patience import Patience
from utils.run.progress import Progress
from utils.run.report import RunPage
from utils.run.savings import Parallelism, to_train
from utils.run.signals import StopRequests
from utils.run.trainer import Trainer
from utils.run.webhook import Webhook
from utils.settings.reader import resolved
from utils.settings.schema import Settings
from utils.turn import tell_folder

CLIP_DIMENSIONS = 4
"""Of a clip's latent: channels, frames, rows, columns."""


def open_checkpoint(
    settings: Settings,
    flags: ResumeFlags,
    staged: StagedModel,
    ranks: Ranks | None = None,
    in_use: RunLock | None = None,
) -> Checkpoint | None:
    """The checkpoint to go on from, if one is asked for, checked against its checksums, the settings and what they
    train. All ranks call it; None stands for one that is alone.

    Args:
        in_use: takes the folder of the checkpoint's run; None where nothing is written there.

    Raises:
        UserError: there is none, or it is damaged or does not fit, or another run goes on in its folder.
    """
    if flags.source is None:
        return None
    alone = ranks or Ranks()

    def damage(folder: Path) -> str | None:
        # Before it is read, which takes time, and while another run may remove it.
        if in_use:
            in_use.take(folder.parent, alone)
        return damage_in(folder, alone)

    found = run_folder.find_checkpoint(
        settings.output_dir,
        flags.source,
        partial(of_other_run, settings=settings),
        damage,
    )
    checkpoint = Checkpoint(found)
    checkpoint.warn_of_other_run(run_of(settings))
    checkpoint.check_identity(identity_of(settings))
    checkpoint.check_weights(staged.trained(staged.layers))
    checkpoint.check_optimizer(
        settings.optimizer.model_dump(mode="json"),
        new_parameters=flags.reset_optimizer_params,
        new_state=flags.reset_optimizer,
    )
    return checkpoint


def build_trainer(
    settings: Settings,
    ranks: Ranks,
    pipeline: BasePipeline,
    data: Data,
    stop: StopRequests,
    config: Path,
    flags: ResumeFlags,
    in_use: RunLock,
    *,
    checkpoint: Checkpoint | None = None,
) -> Trainer:
    """Loads this stage's weights and puts the engine, the batches and the run's folder together.

    Args:
        config: the run's file, which is copied into its folder.
        in_use: has the folder of the checkpoint's run, or takes that of a new one.
        checkpoint: what the run goes on from, as `flags` say.

    Raises:
        UserError: a file of weights or an adapter does not fit; the folder cannot be made; the GPU's memory does not
            suffice.
    """
    with explaining(
        lambda: to_train(settings, parallelism_of(settings, ranks, pipeline)),
        settings.output_dir,
        lambda: "before the first step",
    ):
        return _built(settings, ranks, pipeline, data, stop, config, flags, in_use, checkpoint)


def parallelism_of(settings: Settings, ranks: Ranks, pipeline: BasePipeline) -> Parallelism:
    """That of a run that has no weights yet, or failed on the way to them."""
    staged = partition(pipeline, settings, pipeline.weights.build_empty())
    return Parallelism.of(staged.layers, staged.bounds, staged.stages, ranks.data_ranks)


@without_collector()
def _built(
    settings: Settings,
    ranks: Ranks,
    pipeline: BasePipeline,
    data: Data,
    stop: StopRequests,
    config: Path,
    flags: ResumeFlags,
    in_use: RunLock,
    checkpoint: Checkpoint | None,
) -> Trainer:
    epochs = epochs_of(settings, ranks, pipeline, data.training.samples)
    homes = partial(homes_of, settings, ranks, trained=settings.adapter is None)
    staged = load_stage(pipeline, settings, ranks.stage, homes, ranks=ranks)
    parameters = staged.trained(staged.stage_layers(ranks.stage))
    shares = shares_of(settings, ranks, staged, parameters)
    optimizer = _optimizer(settings, Rates(settings, pipeline, staged.denoiser), shares.stepped, epochs)
    engine = _engine(settings, ranks, pipeline, staged, optimizer, shares)
    reader = reader_of(data, ranks)
    noising = Noising(pipeline, ranks.is_first_stage, ranks.is_last_stage)
    progress = Progress()
    if checkpoint:
        progress, epochs, _ = checkpoint.starting_point(epochs, restart_data=flags.reset_dataloader)
    batches = _batches(settings, ranks, data, epochs, reader, noising)
    ema = restore_or_start(settings, flags, checkpoint, progress, parameters, optimizer, shares)
    folder = _folder(settings, ranks, config, checkpoint, progress)
    in_use.take(folder, ranks)
    if ranks.is_main:
        go_on_in(folder)
        tell_folder(folder)
    metrics = Metrics.from_settings(
        folder,
        settings.monitoring,
        resolved(settings),
        ranks.is_main,
        resumed_at=progress.step if checkpoint else None,
    )
    telling = _telling(settings, ranks, pipeline, data, folder, resumed=checkpoint is not None)
    norms = BlockNorms(ranks, engine, parameters, shares.written) if settings.monitoring.block_norms else None
    parallelism = Parallelism.of(staged.layers, staged.bounds, staged.stages, ranks.data_ranks)
    telling |= {"norms": norms, "parallelism": parallelism}
    run = RunParts(settings, ranks, engine, optimizer, parameters, shares, folder, metrics, stop, ema, **telling)
    duties = _duties(run, pipeline, data, reader, noising, staged)
    if not checkpoint:
        return Trainer(run, batches, progress, duties)
    return Trainer(run, batches, progress, duties, checkpoint.folder, checkpoint.still_owed())


def _folder(settings: Settings, ranks: Ranks, config: Path, checkpoint: Checkpoint | None, progress: Progress) -> Path:
    """A new folder for the run, or that of its checkpoint."""
    if checkpoint is None:
        return run_folder.create(settings, ranks, config)
    if ranks.is_main:
        begin_branch(checkpoint.folder, checkpoint.progress.step)
    return run_folder.go_on(checkpoint.folder.parent, settings, ranks, config, progress.step)


def _tokens(pipeline: BasePipeline, shape: Sequence[Bucket]) -> int:
    """The image tokens of a sample and of its references."""
    whole = [pipeline.latent_shape(bucket.width, bucket.height, bucket.frames) for bucket in shape]
    latents = [pipeline.made_at_once(latent) for latent in whole]
    # Some models count one frame of a clip, others all.
    clips = [latent for latent in latents if len(latent) == CLIP_DIMENSIONS]
    stills = [latent for latent in latents if len(latent) != CLIP_DIMENSIONS]
    of_clips = (frames * pipeline.tokens((channels, 1, *size)) for channels, frames, *size in clips)
    return sum(map(pipeline.tokens, stills)) + sum(of_clips)


def _telling(
    settings: Settings, ranks: Ranks, pipeline: BasePipeline, data: Data, folder: Path, *, resumed: bool
) -> dict[str, Any]:
    """The parts of the run with which it is told how it does."""
    webhook = Webhook(settings.monitoring.webhook if ranks.is_main else None, folder)
    first = settings.eval_datasets[0].name if settings.eval_datasets else ""
    return {
        "tokens": cache(partial(_tokens, pipeline)),
        "patience": Patience(settings.eval_patience, f"{first}/loss"),
        "webhook": webhook,
        "page": _page(folder, data, resumed=resumed) if ranks.is_main else RunPage(),
    }


def _page(folder: Path, data: Data, *, resumed: bool) -> RunPage:
    """The page of the run, with what the log has said until now."""
    notes = kept_notes()
    if resumed:
        notes.go_on(folder)
    notes.how = "going on"
    notes.data = described([data.training, *data.evaluation])
    return RunPage(folder, notes)


def restore_or_start(
    settings: Settings,
    flags: ResumeFlags,
    checkpoint: Checkpoint | None,
    progress: Progress,
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
    shares: Shares | None = None,
) -> EMA | None:
    """The averages if the run has any; parameters and optimizer take the checkpoint's values.

    Args:
        progress: where the run begins.
        shares: which of the parameters `optimizer` has; default: all.
    """
    shares = shares or Shares(parameters)
    if checkpoint:
        checkpoint.load_weights(shares.held)
        shares.take_values()
        if not flags.reset_optimizer:
            checkpoint.load_optimizer(shares.stepped, optimizer, optimizers.find(settings.optimizer.type).retyped)
    ema = None
    if settings.ema:
        held = {"stepped": shares.stepped, "complete": shares.complete}
        ema = EMA(shares.held.items(), settings.ema, optimizer, since=progress.step, **held)
    if checkpoint:
        checkpoint.load_ema(ema)
    return ema


def _optimizer(settings: Settings, rates: Rates, parameters: Mapping[str, Parameter], epochs: Epochs) -> Optimizer:
    chosen = settings.optimizer
    groups = groups_of(
        parameters.items(),
        lr=chosen.lr,
        weight_decay=chosen.weight_decay,
        own_lr=rates.lr,
        own_decay=rates.weight_decay,
    )
    if not groups and not optimizers.find(chosen.type).sums:
        return optimizer_for_frozen_stage()
    # One that sums over all stages takes its steps together with them.
    samples = samples_of_step(epochs) if optimizers.counts_samples(chosen) else 1.0
    return optimizers.build(groups or groups_for_frozen_stage(chosen.lr), chosen, samples)


def samples_of_step(epochs: Epochs) -> float:
    """How many samples a step of the first epoch sees, in the mean."""
    steps = epochs.steps_in(0)
    return sum(epochs.examples(0, index) for index in range(steps)) / steps


def _engine(
    settings: Settings, ranks: Ranks, pipeline: BasePipeline, staged: StagedModel, optimizer: Optimizer, shares: Shares
) -> Engine:
    module = DenoiserPipeline(
        staged.layers,
        staged.bounds,
        pipeline.stream_type,
        pipeline.maths.loss,
        stages=staged.stages,
        recompute=settings.recomputed_every,
        host=HostInputs() if settings.offloads else None,
        seed=settings.seed,
        loss_terms=pipeline.loss_terms,
        swap=block_swap(settings, staged.homes),
    )
    engine = Engine(
        module,
        optimizer,
        accumulation=settings.gradient_accumulation_steps,
        clip_norm=settings.gradient_clipping,
        clip_by=settings.gradient_clipping_by,
        release=settings.optimizer.gradient_release,
        after_step=_limit_of_norms(settings, staged.stage_layers(ranks.stage)),
        teacher=teacher_of(pipeline, settings, staged),
        float32_gradients=sums_in_float32(settings),
        shares=shares,
        deepspeed=settings.deepspeed_config,
    )
    if optimizers.find(settings.optimizer.type).sums:
        group = None if shares.divided else engine.grid.get_pipe_parallel_group()
        optimizer.total = sums.over(numbers_of_all(engine.device, group))
    return engine


def _limit_of_norms(settings: Settings, layers: Sequence[Module]) -> Callable[[], None] | None:
    limit = getattr(settings.adapter, "scale_weight_norms", None)
    return partial(limit_norms, factors_in(layers), limit) if limit else None


def _batches(
    settings: Settings, ranks: Ranks, data: Data, epochs: Epochs, reader: SampleReader, noising: Noising
) -> TrainingBatches:
    text_encoders = [encoder.name for encoder in data.encoders if reads_text(encoder)]
    picker = VersionPicker(settings.seed, text_encoders, bool(data.live))
    folds_guidance = settings.model.folded_guidance is not None
    prepare = _pinned(noising) if ranks.device.type == "cuda" else noising.training
    return TrainingBatches(epochs, reader, picker, prepare, ranks.data_rank, with_empty=folds_guidance)


def _pinned(noising: Noising) -> Callable[[FeatureBatch, int], NoisedBatch]:
    """Micro-batches in locked memory, from which they go to the device while it computes, and the host waits for
    neither."""
    return lambda batch, epoch: map_tensors(torch.Tensor.pin_memory, noising.training(batch, epoch))


def _duties(
    run: RunParts,
    pipeline: BasePipeline,
    data: Data,
    reader: SampleReader,
    noising: Noising,
    staged: StagedModel,
) -> list[Duty]:
    """Evaluation, sampling and export, as the settings ask for them."""
    settings, ranks = run.settings, run.ranks
    micro_batch = partial(micro_batch_of, settings, evaluating=True)
    sets = {
        collection.source.name: EvaluationBatches(
            collection.samples, reader, micro_batch, ranks.data_ranks, ranks.data_rank
        )
        for collection in data.evaluation
    }
    # Those that stay loaded are used by the threads that read ahead: new prompts have others.
    encoders = pipeline.encoders_for(controls_of([data.training, *data.evaluation])) if data.live else data.encoders
    sampler = sample_model(pipeline, encoders, settings, ranks, data.cache_dir)
    # The main rank writes exports.
    about = _about(run, pipeline, data) if ranks.is_main else {}
    return make_duties(run, sets, noising.evaluation, sampler, export_plan(pipeline, settings, staged, about))


def _about(run: RunParts, pipeline: BasePipeline, data: Data) -> dict[str, str]:
    """What headers of exports say of the run; that of its data is kept in its folder too."""
    began = export_metadata.kept(run.folder).get(STARTED, repr(time.time()))
    of_data = export_metadata.of_samples(data.training.samples) | {STARTED: began}
    export_metadata.keep(run.folder, of_data)
    return about_run(pipeline, run.settings, of_data)
