"""The plan of a run: what is trained, in how many steps, with how much memory, and where things go. `--check` prints
it; every run logs it once, before weights are loaded."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from models.assembly.cut import CUT, cut_text, with_cut
from models.assembly.data import Data
from models.assembly.exports import formats_of
from models.assembly.fitting import KEYS, fit
from models.assembly.memory import Planner
from models.assembly.prompts import sample_bucket
from models.assembly.rates import Rates
from models.assembly.room import NO_LIMIT, check_plans, of_plans, raise_together, smallest
from models.assembly.stage import StagedModel
from models.base import BasePipeline
from models.foundation.layers.ensemble import Ensemble
from utils import adapters
from utils.adapters import attach, in_full, mixed
from utils.dataset.bucket_table import format_table
from utils.dataset.collection import Collection
from utils.dataset.encoders import Encoder
from utils.dataset.epochs import Epochs, micro_batch_of
from utils.dataset.samples import Bucket, Sample
from utils.errors import Problem, UserError
from utils.quantised.linear import parameter_count
from utils.ranks import Ranks, gather
from utils.run.checkpoint import Checkpoint, StartingPoint
from utils.run.notes import NOTE
from utils.run.progress import Progress
from utils.run.trainer import last_step_of
from utils.settings.plain import as_toml
from utils.settings.sample_requests import requests_of
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

UNITS = ("steps", "epochs", "examples", "minutes")
"""What the intervals of evaluation, samples, exports and checkpoints are counted in."""


def epochs_of(settings: Settings, ranks: Ranks, pipeline: BasePipeline, samples: Sequence[Sample]) -> Epochs:
    """All epochs of the run. The work of a sample is counted in positions of its latent and of its references'."""
    micro_batch = partial(micro_batch_of, settings)
    return Epochs(
        samples,
        micro_batch,
        ranks.data_ranks,
        settings.gradient_accumulation_steps,
        settings.seed,
        work=partial(_positions, pipeline),
    )


def _positions(pipeline: BasePipeline, shape: Sequence[Bucket]) -> float:
    latents = [pipeline.latent_shape(bucket.width, bucket.height, bucket.frames) for bucket in shape]
    return float(sum(math.prod(pipeline.made_at_once(latent)[1:]) for latent in latents))


def settled(
    settings: Settings,
    ranks: Ranks,
    pipeline: BasePipeline,
    staged: StagedModel,
    data: Data,
    checkpoint: Checkpoint | None = None,
    restart_data: bool = False,
) -> Settings:
    """The settings with values in the place of "auto" and with their cut, the same on all ranks; the main rank logs the
    run's plan.

    Args:
        staged: without weights.
        checkpoint: from which the run goes on; None for a new run.
        restart_data: whether it begins its epoch's data anew.

    Raises:
        UserError: nothing fits the GPUs.
    """
    memory, card = smallest(settings, ranks, "memory")
    chosen, problems = {}, []
    if ranks.is_main:
        cached = [data.training, *data.evaluation], data.cache_dir
        trained, evaluated = buckets_of(data.training), buckets_of(*data.evaluation)
        planner = Planner(settings, pipeline, staged, data.encoders, trained, ranks.data_ranks, evaluated)
        try:
            plan = [
                *sections(settings, ranks, pipeline, staged, *cached, checkpoint, restart_data=restart_data),
                memory_text(planner, memory, card),
            ]
            logger.info("plan:\n%s", "\n\n".join(plan), extra={NOTE: "plan"})
            settings = fit(planner, memory)
        except UserError as error:
            problems = error.problems
        chosen = {key: getattr(settings, key) for key in (*KEYS, *CUT)}
    raise_together(ranks, "plan", problems)
    return settings.model_copy(update=gather(ranks, "settled", chosen)[0])


def check_room(
    settings: Settings,
    ranks: Ranks,
    pipeline: BasePipeline,
    staged: StagedModel,
    collections: Sequence[Collection],
    encoders: Sequence[Encoder],
) -> None:
    """Whether the smallest card has room for training, before hours of encoding. All ranks call it together; see
    `settled` for the arguments.

    Raises:
        UserError: nothing fits, or the weights of a stage alone are larger than the card.
    """
    memory, card = smallest(settings, ranks, "room/memory")
    if memory == NO_LIMIT:
        return
    problems: list[Problem] = []
    if ranks.is_main:
        trained, evaluated = buckets_of(collections[0]), buckets_of(*collections[1:])
        planner = Planner(settings, pipeline, staged, encoders, trained, ranks.data_ranks, evaluated)
        try:
            chosen = fit(planner, memory)
        except UserError as error:
            problems = error.problems
        else:
            plans = planner.plans(chosen, planner.swapped(chosen))
            problems = [problem for problem, is_sure in of_plans(planner, chosen, plans, memory, card) if is_sure]
    raise_together(ranks, "room", problems)


def buckets_of(*collections: Collection) -> dict[Bucket, float]:
    """The sizes that their samples have, in order, and how often an epoch shows them."""
    samples = [sample for collection in collections for sample in collection.samples]
    shown = dict.fromkeys(sorted({sample.bucket for sample in samples}), 0.0)
    for sample in samples:
        shown[sample.bucket] += sample.repeats
    return shown


def sections(
    settings: Settings,
    ranks: Ranks,
    pipeline: BasePipeline,
    staged: StagedModel,
    collections: Sequence[Collection],
    cache_dir: Path,
    checkpoint: Checkpoint | None = None,
    *,
    restart_data: bool = False,
) -> list[str]:
    """The parts of the plan as text, without its memory; see `settled` for the arguments.

    Args:
        collections: the training data, and what is evaluated.
    """
    training, *evaluated = collections
    epochs = epochs_of(settings, ranks, pipeline, training.samples)
    begin = StartingPoint(Progress(), epochs)
    if checkpoint:
        begin = checkpoint.starting_point(epochs, restart_data=restart_data)
    total = last_step_of(settings, begin.epochs, begin.progress)
    named = f"_{settings.run_name}" if settings.run_name else ""
    facts = {
        "model": f"{settings.model.type}, {pipeline.parts.denoiser_path}",
        "training": _trained(settings, pipeline, staged),
        "parameters": _parameters(staged),
        "optimizer": _optimizer(settings, pipeline, staged),
        "processes": f"{ranks.world_size} = {ranks.stages} stages x {ranks.data_ranks} data ranks",
        **_divided(settings, ranks),
        "global batch": _global_batch(settings, ranks, training),
        "steps": f"{epochs.steps_in(0)} per epoch, {total} in all",
        "run folder": str(checkpoint.folder.parent if checkpoint else settings.output_dir / f"<date and time>{named}"),
    }
    if checkpoint:
        at = f"at step {begin.progress.step}, epoch {begin.progress.epoch + 1}"
        facts["goes on from"] = "; ".join(filter(None, [f"{checkpoint.folder.name}, {at}", begin.remark]))
    facts |= {"cache": str(cache_dir), **dict(_outputs(pipeline, settings))}
    return [
        "\n".join(f"{name + ':':<14}{value}" for name, value in facts.items()),
        format_table(epochs.table()),
        *(f"evaluation '{one.source.name}': {len(one.samples)} samples" for one in evaluated),
    ]


def memory_text(planner: Planner, memory: float | None, card: float | None = None, *, caches: bool = False) -> str:
    """The cut and the plan of memory, and what they lead to where the settings leave it open. Warns of phases for which
    there probably is no room.

    Args:
        memory: of the smallest GPU in bytes, or what the settings name in its place; None if it is not known.
        card, caches: see `check_plans`.

    Raises:
        UserError: nothing fits.
    """
    settings = planner.settings
    open_keys = [key for key in KEYS if getattr(settings, key) == "auto"]
    unknown = open_keys and memory is None
    chosen = with_cut(planner, settings) if unknown else fit(planner, memory or 0.0)
    plans = planner.plans(chosen, planner.swapped(chosen))
    if memory is not None:
        check_plans(planner, chosen, plans, memory, card, caches=caches)
    lines = [planner.text(chosen, plans)]
    if unknown:
        lines.append(f"{' and '.join(open_keys)}: set memory_budget_gb to see what a GPU would get")
    else:
        lines += (f"{key} = {as_toml(getattr(chosen, key))}, chosen for this" for key in open_keys)
    cut = cut_text(planner, chosen)
    return "\n".join([*([cut, ""] if cut else []), *lines])


def _trained(settings: Settings, pipeline: BasePipeline, staged: StagedModel) -> str:
    adapter, denoiser = settings.adapter, staged.denoiser
    parts = ", ".join(denoiser.configs) if isinstance(denoiser, Ensemble) else pipeline.denoiser_folder
    if adapter is None:
        some = f"{_in_full(staged)} of " if settings.model.train else ""
        return f"full fine-tune of {some}{parts}, since there is no [adapter]"
    rank = adapter.model_dump().get("rank")
    by_rules = ", or as the rules say," if any(rule.rank for rule in adapter.rules) else ""
    of_rank = f" of rank {rank}{by_rules}" if rank else ""
    begins = f", which begins as {adapter.init_from_existing}" if adapter.init_from_existing else ""
    kinds = Counter(kind.name for kind, _ in attach.adapted(denoiser).values())
    of_most = adapters.find(adapter.type).name
    counted = [f"{name}{of_rank if name == of_most else ''} on {count} modules" for name, count in kinds.items()]
    beside = f", and {_in_full(staged)} in full" if settings.model.train else ""
    return f"{' and '.join(counted)} of {parts}{begins}{beside}"


def _in_full(staged: StagedModel) -> str:
    """What is trained itself, in few words."""
    names = list(in_full.divided(staged.trained(staged.layers))[1])
    return f"{len(names)} tensors ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"


def _parameters(staged: StagedModel) -> str:
    trained = sum(p.numel() for p in staged.denoiser.parameters() if p.requires_grad)
    return f"{parameter_count(staged.denoiser):,} in all, {trained:,} trained"


def _optimizer(settings: Settings, pipeline: BasePipeline, staged: StagedModel) -> str:
    name = settings.optimizer.type + (" in the machine's memory" if settings.offload_optimizer else "")
    if settings.force_constant_lr is not None:
        return f"{name}, lr {settings.force_constant_lr:g} at every step"
    rates_of = Rates(settings, pipeline, staged.denoiser)
    rates = [f"{rate:g}" for rate in dict.fromkeys(map(rates_of.lr, staged.trained(staged.layers)))]
    by_part = " by part" if len(rates) > 1 else ""
    warmup = settings.warmup_steps
    length = f"{100 * warmup:g} % of the" if isinstance(warmup, float) else warmup
    warm_up = f", after {length} steps of warm-up" if warmup else ""
    return f"{name}, lr {', '.join(rates)}{by_part}, {settings.lr_scheduler}{warm_up}"


def _divided(settings: Settings, ranks: Ranks) -> dict[str, str]:
    """What the data ranks divide, if they are to divide anything."""
    stage, data_ranks = settings.zero_stage, ranks.data_ranks
    if not stage:
        return {}
    if data_ranks == 1:
        return {"zero_stage": f"{stage} changes nothing here: there is 1 data rank (processes / pipeline_stages)"}
    weights = "frozen weights of the blocks" if settings.adapter else "trained weights of the blocks"
    what = {1: "optimizer state", 2: "optimizer state and gradients", 3: f"optimizer state, gradients and {weights}"}
    return {"zero_stage": f"{stage}, {what[stage]} divided among {data_ranks} data ranks"}


def _global_batch(settings: Settings, ranks: Ranks, training: Collection) -> str:
    sizes = sorted({micro_batch_of(settings, bucket) for bucket in buckets_of(training)})
    accumulated = settings.gradient_accumulation_steps
    each = " or ".join(str(size) for size in sizes)
    total = f" = {sizes[0] * accumulated * ranks.data_ranks}" if len(sizes) == 1 else ", by size"
    return f"{each} per micro-batch x {accumulated} accumulated x {ranks.data_ranks} data ranks{total}"


def _outputs(pipeline: BasePipeline, settings: Settings) -> Iterator[tuple[str, str]]:
    """What the run leaves, and when."""
    kind, sampling = "adapter" if settings.adapter else "model", settings.sampling
    exported = [*_intervals(settings, "save", epochs=settings.export_epochs), "at the end"]
    averages = {"beside": ", and its average", "instead": "'s average"}[settings.ema.export] if settings.ema else ""
    layouts = " and ".join(formats_of(pipeline, settings))
    read_by = mixed.read_by(settings.adapter) if settings.adapter else ""
    read_by = f"; {read_by}" if read_by and "diffusers" in formats_of(pipeline, settings) else ""
    if settings.adapter and settings.model.train and "diffusers" in layouts:
        read_by += "; what is trained in full lies beside, in trained_<part>.safetensors, for load_state_dict"
    kept = f"; those of the newest {settings.keep_exports} steps are kept" if settings.keep_exports else ""
    yield "exports", f"{', '.join(exported)}: the {kind}{averages}, for {layouts}{read_by}{kept}"
    saved = _intervals(settings, "checkpoint")
    kept = f"; the newest {settings.keep_checkpoints} are kept" if settings.keep_checkpoints else ""
    yield "checkpoints", f"{', '.join([*saved, 'at the end'])}{kept}" if saved else "only if the run is stopped"
    if settings.eval_datasets:
        before = ["before the first step"] if settings.eval_before_first_step else []
        yield "evaluation", ", ".join([*before, *_intervals(settings, "eval"), "at the end"])
    if requests := requests_of(sampling, pipeline.guided_by_second_prediction):
        before = ["before the first step"] if sampling.sample_before_first_step else []
        when = ", ".join([*before, *_intervals(sampling, "sample"), "at the end"])
        sizes = Counter(_size(sample_bucket(pipeline, one.settings)) for one in requests)
        yield "samples", f"{when}: {', '.join(f'{count} of {size}' for size, count in sizes.items())}"


def _size(bucket: Bucket) -> str:
    size = f"{bucket.width} x {bucket.height}"
    return size if bucket.frames == 1 else f"{size} x {bucket.frames}"


def _intervals(table: object, prefix: str, **settled: int | None) -> list[str]:
    """The intervals that a table of settings gives, or that follow from it, as in "every 100 steps"."""
    given = {unit: getattr(table, f"{prefix}_every_n_{unit}", None) for unit in UNITS} | settled
    return [f"every {unit[:-1]}" if n == 1 else f"every {n:g} {unit}" for unit, n in given.items() if n]
