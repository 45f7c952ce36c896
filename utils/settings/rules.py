"""What several keys must agree on. Rules see what is sound of a file even when some of its keys are not."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from utils.settings.errors import Problem
from utils.settings.schema import DatasetSettings, Settings

EVAL_CADENCES = ("eval_every_n_steps", "eval_every_n_epochs", "eval_every_n_examples")
SAMPLE_CADENCES = ("sample_every_n_steps", "sample_every_n_epochs", "sample_before_first_step")
TRAINING_NAME = "train"
WANDB_KEYS = ("wandb_api_key", "wandb_tracker_name", "wandb_run_name")
RATIO_KEYS = ("min_ar", "max_ar", "num_ar_buckets")


def check_rules(
    settings: Settings, world_size: int, file: str = "", broken: frozenset[str] = frozenset()
) -> list[Problem]:
    """The problems of a run started as `world_size` processes.

    Rules that look at one of the `broken` keys ("epochs", "model.shift", or a whole table, "model") are
    left out: what those say is not known.
    """
    return [
        replace(problem, file=file)
        for rule in _RULES
        if not any(key in broken or key.split(".")[0] in broken for key in rule.keys)
        for problem in rule.check(settings, world_size)
    ]


def check_evaluation_set(
    dataset: DatasetSettings, read: Mapping[Path, DatasetSettings], training: Sequence[Path], file: str
) -> list[Problem]:
    """The problems of a dataset file beside the training set's: a run has one cache, where the training set says."""
    cache_dir = next((read[path].cache_dir for path in training if path in read), None)
    if dataset.cache_dir in (None, cache_dir):
        return []
    message = f"a run has one cache, set by the training set's file ({cache_dir or 'not set there'}); leave it out here"
    return [Problem(file, "key `cache_dir`", message)]


def check_dataset(dataset: DatasetSettings, file: str = "", broken: frozenset[str] = frozenset()) -> list[Problem]:
    """The problems of a dataset file; as for `check_rules`."""
    problems = [] if "directory" in broken else list(_directories_exist(dataset))
    # The size keys work together, across file and directories: with one unknown, none can be judged.
    if not broken:
        for rule in (_sizes_are_given_once, _sizes_make_sense, _ratios_are_used):
            problems += rule(dataset)
    return [replace(problem, file=file) for problem in problems]


@dataclass(frozen=True)
class Rule:
    """A check, and the keys that it looks at."""

    keys: tuple[str, ...]
    check: Callable[[Settings, int], Iterable[Problem]]


def _at(place: str, message: str) -> Problem:
    return Problem("", place, message)


def _split_fits_method(settings: Settings, _: int) -> Iterator[Problem]:
    split, stages, place = settings.partition_split, settings.pipeline_stages, "key `partition_split`"
    if settings.partition_method != "manual":
        if split is not None:
            yield _at(place, 'is for partition_method = "manual" only; set that, or leave this out')
    elif split is None:
        yield _at(place, f'is required by partition_method = "manual": {stages - 1} layer numbers')
    elif len(split) != stages - 1:
        yield _at(place, f"needs {stages - 1} layer numbers for pipeline_stages = {stages}; given: {split}")
    elif any(first >= second for first, second in pairwise(split)):
        yield _at(place, f"must rise from each number to the next; given: {split}")


def _stages_divide_world(settings: Settings, world_size: int) -> Iterator[Problem]:
    stages = settings.pipeline_stages
    if world_size % stages:
        fitting = [str(count) for count in range(1, world_size + 1) if world_size % count == 0]
        yield _at(
            "key `pipeline_stages`",
            f"{stages} does not divide the {world_size} processes of this launch; launch a multiple of "
            f"{stages} (deepspeed --num_gpus={stages} train.py ...), or set it to {' or '.join(fitting)}",
        )


def _one_shift(settings: Settings, _: int) -> Iterator[Problem]:
    if settings.model.flux_shift and settings.model.shift is not None:
        yield _at("[model] shift", "excludes flux_shift = true; leave out one of them")


def _weights_have_a_source(settings: Settings, _: int) -> Iterator[Problem]:
    model = settings.model
    if model.diffusers_path is None and model.transformer_path is None:
        yield _at("[model]", "needs diffusers_path (a folder) or transformer_path (the denoiser's weights)")


def _scratch_has_a_configuration(settings: Settings, _: int) -> Iterator[Problem]:
    model, path = settings.model, settings.model.transformer_path
    if not model.from_scratch or model.diffusers_path is not None or path is None:
        return
    if path.is_file() and path.suffix != ".json":
        yield _at(
            "[model] from_scratch",
            "needs the denoiser's configuration: set diffusers_path, or transformer_path to a folder or file "
            f"with it; {path} has weights only",
        )


def _dataset_exists(settings: Settings, _: int) -> Iterator[Problem]:
    yield from _missing("key `dataset`", settings.dataset)


def _eval_paths_exist(settings: Settings, _: int) -> Iterator[Problem]:
    for number, entry in enumerate(settings.eval_datasets):
        yield from _missing(f"key `eval_datasets[{number}].config`", entry.config)


def _model_path_exists(key: str) -> Rule:
    def check(settings: Settings, _: int) -> Iterator[Problem]:
        return _missing(f"[model] {key}", getattr(settings.model, key))

    return Rule((f"model.{key}",), check)


def _text_encoder_paths_exist(settings: Settings, _: int) -> Iterator[Problem]:
    for number, encoder in enumerate(settings.model.text_encoders):
        yield from _missing(f"[model] text_encoders[{number}].path", encoder.path)


def _adapter_path_exists(settings: Settings, _: int) -> Iterator[Problem]:
    if settings.adapter is not None:
        yield from _missing("[adapter] init_from_existing", settings.adapter.init_from_existing)


def _float16_is_not_trained(settings: Settings, _: int) -> Iterator[Problem]:
    tables = {"[model]": settings.model, "[adapter]": settings.adapter}
    for table, chosen in tables.items():
        for key in ("dtype", "transformer_dtype"):
            if getattr(chosen, key, None) == "float16":
                yield _at(
                    f"{table} {key}", "float16 overflows in training without loss scaling; use bfloat16 or float32"
                )


def _eval_names_differ(settings: Settings, _: int) -> Iterator[Problem]:
    names = [entry.name for entry in settings.eval_datasets]
    for number, name in enumerate(names):
        if name == TRAINING_NAME:
            yield _at(f"key `eval_datasets[{number}].name`", f'"{name}" is what the training set is called')
        if name in names[:number]:
            yield _at(f"key `eval_datasets[{number}].name`", f'"{name}" names an entry above too')


def _eval_cadence_has_data(settings: Settings, _: int) -> Iterator[Problem]:
    if not settings.eval_datasets:
        for key in EVAL_CADENCES:
            if getattr(settings, key) is not None:
                yield _at(f"key `{key}`", "there is nothing to evaluate; add eval_datasets, or leave it out")


def _prompts_have_a_cadence(settings: Settings, _: int) -> Iterator[Problem]:
    sampling = settings.sampling
    given = [key for key in SAMPLE_CADENCES if getattr(sampling, key)]
    if sampling.prompts and not given:
        yield _at("[sampling] prompts", f"are drawn at no time; set one of {', '.join(SAMPLE_CADENCES)}")
    if given and not sampling.prompts:
        yield _at(f"[sampling] {given[0]}", "there is nothing to draw; add prompts, or leave it out")


def _wandb_is_enabled(settings: Settings, _: int) -> Iterator[Problem]:
    monitoring = settings.monitoring
    for key in WANDB_KEYS:
        if not monitoring.enable_wandb and getattr(monitoring, key) is not None:
            yield _at(f"[monitoring] {key}", "needs enable_wandb = true; set that, or leave this out")


def _missing(place: str, path: Path | None) -> Iterator[Problem]:
    if path is not None and not path.exists():
        base = "" if path.is_absolute() else f" (seen from {Path.cwd()})"
        yield _at(place, f"there is no {path}{base}")


def _directories_exist(dataset: DatasetSettings) -> Iterator[Problem]:
    for number, directory in enumerate(dataset.directory):
        for key in ("path", "control_path"):
            path = getattr(directory, key)
            place = f"key `directory[{number}].{key}`"
            if path is not None and path.is_file():
                yield _at(place, f"{path} is a file; a folder is needed")
            else:
                yield from _missing(place, path)


def _sizes_are_given_once(dataset: DatasetSettings) -> Iterator[Problem]:
    tables = [("", dataset), *((f"directory[{n}].", entry) for n, entry in enumerate(dataset.directory))]
    for prefix, table in tables:
        for key, excluded in (("size_buckets", ("resolutions", *RATIO_KEYS)), ("ar_buckets", RATIO_KEYS)):
            both = [other for other in excluded if other in table.model_fields_set]
            if getattr(table, key) is not None and both:
                yield _at(f"key `{prefix}{key}`", f"excludes {', '.join(both)} of the same table")


def _sizes_make_sense(dataset: DatasetSettings) -> Iterator[Problem]:
    for number, directory in enumerate(dataset.directory):
        effective = dataset.resolved(directory)
        place = f"key `directory[{number}]`"
        if not effective.resolutions and not effective.size_buckets:
            yield _at(place, "has no size; set resolutions (or size_buckets) for the file or for it")
        if effective.min_ar > effective.max_ar:
            yield _at(place, f"min_ar {effective.min_ar} is above max_ar {effective.max_ar}")


def _ratios_are_used(dataset: DatasetSettings) -> Iterator[Problem]:
    if any(dataset.resolved(directory).enable_ar_bucket for directory in dataset.directory):
        return
    for key in (*RATIO_KEYS, "ar_buckets"):
        if key in dataset.model_fields_set:
            yield _at(f"key `{key}`", "needs enable_ar_bucket = true; set that, or leave this out")


_RULES = (
    Rule(("partition_split", "partition_method", "pipeline_stages"), _split_fits_method),
    Rule(("pipeline_stages",), _stages_divide_world),
    Rule(("dataset",), _dataset_exists),
    Rule(("eval_datasets",), _eval_paths_exist),
    Rule(("eval_datasets",), _eval_names_differ),
    Rule(("model", "adapter"), _float16_is_not_trained),
    Rule(("eval_datasets", *EVAL_CADENCES), _eval_cadence_has_data),
    Rule(("model.shift", "model.flux_shift"), _one_shift),
    Rule(("model.diffusers_path", "model.transformer_path"), _weights_have_a_source),
    Rule(("model.from_scratch", "model.diffusers_path", "model.transformer_path"), _scratch_has_a_configuration),
    *(_model_path_exists(key) for key in ("diffusers_path", "transformer_path", "vae_path")),
    Rule(("model.text_encoders",), _text_encoder_paths_exist),
    Rule(("adapter.init_from_existing",), _adapter_path_exists),
    Rule(("sampling.prompts", *(f"sampling.{key}" for key in SAMPLE_CADENCES)), _prompts_have_a_cadence),
    Rule(("monitoring.enable_wandb", *(f"monitoring.{key}" for key in WANDB_KEYS)), _wandb_is_enabled),
)
