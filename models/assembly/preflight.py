"""Checks a run before anything is loaded; `--check` also prints what it will do."""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch

import optimizers
from models.assembly import plan
from models.assembly.base_files import verify
from models.assembly.data import cache_folder, check_data, choices_of, controls_of, encoders_of
from models.assembly.exports import check_exports, check_outputs
from models.assembly.memory import Planner
from models.assembly.rates import Rates
from models.assembly.room import card_of, memory_of
from models.assembly.sample_checks import check_encoders
from models.assembly.stage import StagedModel, load_existing_adapter, partition, read_presets
from models.base import BasePipeline
from models.foundation.checkpoints.folders import problems_of
from optimizers import schedules
from utils.collector import without_collector
from utils.dataset.collection import (
    Collection,
    Source,
    collect,
    shortfalls,
    too_many_failures,
    with_truncated,
    without_failures,
)
from utils.dataset.decoding_check import undecodable
from utils.dataset.encoders import Encoder, items_wanted
from utils.dataset.encoding import CacheReport
from utils.dataset.manifest import Scan
from utils.diffusion.training import faults
from utils.errors import Problem, UserError
from utils.parallel.attention import check_kernels, check_library
from utils.parallel.compiling import check_compiler
from utils.ranks import Ranks
from utils.run.metrics import check_account
from utils.run.progress import Progress
from utils.run.trainer import last_step_of
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)

LOOKED_AT = {
    "stat": "only their headers were read, and pictures may still prove to be broken when they are decoded; "
    'verify = "content" decodes all of them here too',
    "content": "all of them were decoded",
}
"""What `--check` has looked at, by the run's `verify`."""
VALUES = {"log_snr": 'timestep_sample_method = "log_snr"'}
"""How an option is written if only one of its values makes demands."""


def check_run(
    settings: Settings, ranks: Ranks, pipeline: BasePipeline, trains: bool = True, *, elsewhere: bool = False
) -> StagedModel:
    """Whether everything except the data fits, so that hours of encoding do not end in a mistake that could have been
    found before; tells what may surprise. Returns the denoiser without weights, adapted and cut as the settings ask.

    Args:
        trains: whether the run trains, and has metrics to file.
        elsewhere: whether it may be for another machine: what only a GPU can do is a warning then, where there is none.

    Raises:
        UserError: lists what does not fit.
    """
    if ranks.is_main and trains:
        check_account(settings.monitoring)
    on_device = partial(_check_device, ranks.device, elsewhere=elsewhere)
    on_device(lambda device: check_optimizer(settings, device))
    staged = check_model(settings, pipeline)
    if optimizers.find(settings.optimizer.type).sums:
        rates = Rates(settings, pipeline, staged.denoiser)
        rates.check_alike(staged.trained(staged.layers), settings.optimizer.type)
    optimizers.warn_of_lost_steps(settings.optimizer, staged.trained(staged.layers))
    on_device(lambda device: check_kernels(settings.attention, staged.denoiser, device.type, pipeline.dtype))
    # Libraries that are built for a GPU are not to be had without one, and this compiler is not that machine's.
    here = partial(_check_here, ranks.device, elsewhere=elsewhere)
    here(partial(check_library, settings.attention))
    if settings.compile:
        here(partial(check_compiler, ranks.device.type))
    for option, remark in pipeline.remarks():
        logger.warning("[model] %s: %s", option, remark)
    return staged


def _check_device(device: torch.device, check: Callable[[torch.device], None], *, elsewhere: bool) -> None:
    """Whether the device can do something; see `check_run`."""
    _check_here(device, partial(check, device), elsewhere=elsewhere, on_gpu=partial(check, torch.device("cuda")))


def _check_here(
    device: torch.device,
    check: Callable[[], None],
    *,
    elsewhere: bool,
    on_gpu: Callable[[], None] = lambda: None,
) -> None:
    """Whether this machine has something; see `check_run`.

    Args:
        on_gpu: the same of a machine with a GPU, as far as it can be known.
    """
    try:
        check()
    except UserError as error:
        if not elsewhere or device.type == "cuda":
            raise
        on_gpu()
        for problem in error.problems:
            logger.warning("%s: %s; the plan is for a machine with a GPU", problem.where, problem.message)


def check_optimizer(settings: Settings, device: torch.device) -> None:
    """Whether the optimizer can run on this process's device, or where it is to run, and with the run's schedule, which
    there is.

    Raises:
        UserError: it cannot; says why, and what to do.
    """
    if settings.offload_optimizer:
        optimizers.check(settings.optimizer, "cpu", "offload_optimizer lets the processor take the steps: ")
    if settings.swaps_trained and settings.blocks_to_swap != "auto":
        reason = "the processor takes the steps of swapped blocks of a full fine-tune: "
        optimizers.check(settings.optimizer, "cpu", reason)
    optimizers.check(settings.optimizer, device)
    schedules.check(settings)
    optimizers.check_schedule(settings)
    optimizers.check_steps(settings)
    optimizers.warn_of_sums(settings)


@without_collector()
def check_model(settings: Settings, pipeline: BasePipeline) -> StagedModel:
    """Whether the model's files fit it, what is trained, and what is made of it; all that can be known without data and
    weights. Returns the denoiser without weights, adapted and cut as the settings ask.

    Raises:
        UserError: lists what does not fit.
    """
    if pipeline.block_format:
        pipeline.block_format.check("[model] transformer_dtype")
    pipeline.check()
    staged = partition(pipeline, settings, pipeline.weights.build_empty())
    check_layers(pipeline, staged)
    read_presets(pipeline, staged.denoiser)
    load_existing_adapter(pipeline, settings, staged, layers=[])
    check_outputs(pipeline, settings)
    check_exports(pipeline, settings, staged)
    return staged


def check_layers(pipeline: BasePipeline, staged: StagedModel) -> None:
    """Whether the layers hold all that the denoiser's configuration asks for.

    Raises:
        UserError: they do not, since the model is a variant that is not trained here.
    """
    held = {id(parameter) for layer in staged.layers for parameter in layer.parameters()}
    left = [name for name, parameter in staged.denoiser.named_parameters() if id(parameter) not in held]
    if left:
        problem = pipeline.parts.misfit(
            f"asks for '{left[0]}' and {len(left) - 1} more tensors that this model's type does not use; such a "
            "variant is not trained here"
        )
        raise UserError([problem])


def show_plan(settings: Settings, ranks: Ranks, pipeline: BasePipeline, sources: Sequence[Source], scan: Scan) -> None:
    """Prints the plan of the run, once.

    Raises:
        UserError: lists all problems of the model's files and of the data.
    """
    staged, collections = None, []

    def check() -> None:
        nonlocal staged
        staged = check_run(settings, ranks, pipeline, elsewhere=True)
        verify(settings, pipeline, scan.index.parent, Ranks(), scan.raise_if_stopping)

    def look() -> None:
        found = collect(sources, pipeline.media, scan, **choices_of(settings, pipeline))
        collections.extend(_decoded(found, settings, scan) if settings.verify == "content" else found)

    problems = problems_of([check, look])
    if problems:
        raise UserError(problems)
    described = describe(settings, ranks, pipeline, staged, collections)
    if ranks.is_main:
        sys.stdout.write(f"{described}\n\nfiles: {LOOKED_AT[settings.verify]}\n")


def _decoded(found: Sequence[Collection], settings: Settings, scan: Scan) -> list[Collection]:
    """The collections without the files that cannot be decoded.

    Raises:
        UserError: there are more of those than the settings allow.
    """
    samples = [sample for collection in found for sample in collection.samples]
    failures = undecodable(samples, scan.raise_if_stopping)
    cleaned = without_failures(found, [CacheReport("check", 0, 0, 0, 0, failures=tuple(failures))])
    if problems := too_many_failures(cleaned, settings.max_failed_fraction):
        raise UserError(problems)
    return cleaned


def describe(
    settings: Settings,
    ranks: Ranks,
    pipeline: BasePipeline,
    staged: StagedModel,
    collections: Sequence[Collection],
) -> str:
    """What the run will do with the collected data, as text."""
    encoders = encoders_of(pipeline, collections)
    check_encoders(encoders, controls_of(collections), pipeline, settings)
    check_data(pipeline, collections)
    told = shortfalls(with_truncated(collections, encoders, lambda: None))
    epochs = plan.epochs_of(settings, ranks, pipeline, collections[0].samples)
    schedules.warn_of_warmup(settings, last_step_of(settings, epochs, Progress()))
    trained, evaluated = plan.buckets_of(collections[0]), plan.buckets_of(*collections[1:])
    planner = Planner(settings, pipeline, staged, encoders, trained, ranks.data_ranks, evaluated)
    cache_dir = cache_folder(settings, [collection.source for collection in collections])
    sections = [
        *plan.sections(settings, ranks, pipeline, staged, collections, cache_dir),
        *(["\n".join(told)] if told else []),
        plan.memory_text(planner, memory_of(settings, ranks), card_of(ranks), caches=True),
        _cache_size(encoders, collections),
    ]
    return "\n\n".join(sections)


def _cache_size(encoders: Sequence[Encoder], collections: Sequence[Collection]) -> str:
    samples = [sample for collection in collections for sample in collection.samples]
    size = 0
    for encoder in encoders:
        # All items of one size take the same space.
        buckets = Counter(bucket for _, bucket in items_wanted(encoder, samples))
        for bucket, count in buckets.items():
            shapes = encoder.feature_shapes(bucket).values()
            size += count * sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
    return f"estimated cache on disk: {size / 2**20:.1f} MiB"


def check_training(pipeline: BasePipeline, file: str = "") -> None:
    """Whether the model's objective can honour what the options ask of timesteps, noise and loss.

    Args:
        file: where the options are written.

    Raises:
        UserError: it cannot, or some of them contradict each other.
    """
    found = faults(pipeline.options, pipeline.objective, pipeline.resolution_shift)
    problems = [Problem(file, f"[model] {VALUES.get(key, key)}".rstrip(), reason) for key, reason in found]
    if problems:
        raise UserError(problems)
