"""Rules about a dataset file: how its keys fit each other, the files that they name, and the run."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from utils.errors import Problem
from utils.settings.dataset_schema import DataKeys, DatasetSettings, DirectorySettings
from utils.settings.paths import missing, unwritable
from utils.settings.schema import Settings

RATIO_KEYS = ("min_ar", "max_ar", "num_ar_buckets")
TABLES = (".csv", ".json", ".jsonl", ".parquet", ".arrow")
TAR = ".tar"
MASK_KEYS = ("mask_probability", "unmasked_weight", "normalize_masked_area")
TRAINING_KEYS = (
    "num_repeats",
    "start_epoch",
    "end_epoch",
    "start_step",
    "end_step",
    "uncond_fraction",
    "uncond_fraction_per_encoder",
    "uncond_every_n_epochs",
    "mask_probability",
    "is_regularisation_data",
    "augment_variants",
)
Holds = Callable[[DirectorySettings], bool]


@dataclass(frozen=True)
class Use:
    """Keys that have an effect only in directories for which `holds` is true; `message` is for all others."""

    keys: tuple[str, ...]
    holds: Holds
    message: str


@dataclass(frozen=True)
class Conflict:
    """Keys that contradict each other in a directory for which `holds` is true. `message` is formatted with the
    directory's values by key."""

    keys: tuple[str, ...]
    holds: Holds
    message: str


def check_dataset(dataset: DatasetSettings, file: str = "", broken: frozenset[str] = frozenset()) -> list[Problem]:
    """The problems of a dataset file.

    Rules that read one of its `broken` keys are left out, because the values of those keys are unknown.
    """
    problems = [] if "directory" in broken else list(_directories_exist(dataset))
    problems += [] if "cache_dir" in broken else list(_cache_can_be_written(dataset))
    problems += [] if "default_mask_file" in broken else list(_mask_files_exist(dataset, "directory" not in broken))
    # The other keys work together, across file and directories: with one unknown, none can be judged.
    if not broken:
        problems += [*_without_size(dataset), *_conflicts(dataset), *_unused(dataset, _USES), *_unbalanced(dataset)]
    return [replace(problem, file=file) for problem in problems]


def remarks_on_dataset(dataset: DatasetSettings, file: str = "") -> list[Problem]:
    """What a sound dataset file says in vain, and does no harm with."""
    return [replace(remark, file=file) for remark in _unused(dataset, _HARMLESS)]


def check_evaluation_set(
    dataset: DatasetSettings,
    read: Mapping[Path, DatasetSettings],
    training: Sequence[Path],
    file: Path,
    broken: frozenset[str] = frozenset(),
) -> list[Problem]:
    """The further problems of an evaluation set's file. The training set may be evaluated too; then there are none."""
    if file.resolve() in [path.resolve() for path in training]:
        return []
    problems = []
    cache_dir = next((read[path].cache_dir for path in training if path in read), None)
    if dataset.cache_dir not in (None, cache_dir):
        said = f"set by the training set's file ({cache_dir or 'not set there'})"
        problems.append(Problem("", "key `cache_dir`", f"a run has one cache, {said}; leave it out here"))
    for key in sorted({"cache_keep_days", "cache_keep_gb"} & dataset.model_fields_set):
        problems.append(Problem("", f"key `{key}`", "a run has one cache, which the training set's file rules"))
    if not broken:
        message = "is for training: evaluation shows each sample once, and always alike; leave it out"
        problems += _unused(dataset, [Use(TRAINING_KEYS, lambda _: False, message)])
    return [replace(problem, file=str(file)) for problem in problems]


def check_with_run(settings: Settings, dataset: DatasetSettings, file: str, broken: frozenset[str]) -> list[Problem]:
    """Whether a sound dataset file and its run fit; rules that read `broken` keys of the run are left out."""
    uses = [use for key, use in _uses_in(settings).items() if key not in broken]
    return [replace(problem, file=file) for problem in _unused(dataset, uses)]


def check_training_set(settings: Settings, dataset: DatasetSettings, file: str) -> list[Problem]:
    """What the run requires of its training set, as problems of the run's file."""
    with_teacher_target = any(dataset.resolved(entry).is_regularisation_data for entry in dataset.directory)
    if settings.regularisation_target == "data" or with_teacher_target:
        return []
    message = f"no directory of {settings.dataset} has is_regularisation_data = true; set it there, or leave this out"
    return [Problem(file, "key `regularisation_target`", message)]


def _uses_in(settings: Settings) -> dict[str, Use]:
    """By key of the run: the dataset keys whose use depends on its value."""
    uses = {}
    if (epochs := settings.epochs) is not None:
        uses["epochs"] = Use(
            ("start_epoch",),
            lambda directory: directory.start_epoch <= epochs,
            f"begins after the last epoch of the run, which has epochs = {epochs}",
        )
    if (steps := settings.max_steps) is not None:
        uses["max_steps"] = Use(
            ("start_step",),
            lambda directory: directory.start_step < steps,
            f"begins after the last step of the run, which has max_steps = {steps}",
        )
    return uses


def _unused(dataset: DatasetSettings, uses: Sequence[Use]) -> Iterator[Problem]:
    """The keys that have no effect where they are written.

    A key at the top of the file must have an effect in at least one of the directories that inherit it, not in all.
    """
    directories = [(entry, dataset.resolved(entry)) for entry in dataset.directory]
    for key in dict.fromkeys(key for use in uses for key in use.keys):
        heirs = [resolved for entry, resolved in directories if key not in entry.model_fields_set]
        written = [("", dataset, heirs)]
        written += [(f"directory[{n}].", entry, [resolved]) for n, (entry, resolved) in enumerate(directories)]
        for prefix, table, concerned in written:
            if not _asks(table, key) or not concerned:
                continue
            idle = [use for use in uses if key in use.keys and not any(map(use.holds, concerned))]
            if idle:
                yield Problem("", f"key `{prefix}{key}`", idle[0].message)


def _asks(table: DataKeys, key: str) -> bool:
    """Whether a table asks for something with a key. A default value does not ask, except for the aspect ratios:
    whoever writes those expects buckets."""
    return key in table.model_fields_set and (
        key in RATIO_KEYS or getattr(table, key) != DataKeys.model_fields[key].default
    )


def _conflicts(dataset: DatasetSettings) -> Iterator[Problem]:
    """Each conflict, at the directory that writes one of its keys; once per file if all are at its top."""
    told = set()
    for number, entry in enumerate(dataset.directory):
        resolved = dataset.resolved(entry)
        for conflict in _CONFLICTS:
            if not conflict.holds(resolved):
                continue
            own = [key for key in conflict.keys if key in entry.model_fields_set]
            shared = [key for key in conflict.keys if key in dataset.model_fields_set]
            where = f"key `directory[{number}].{own[0]}`" if own else f"key `{shared[0]}`"
            if where not in told:
                told.add(where)
                yield Problem("", where, conflict.message.format_map(dict(resolved)))


def _without_size(dataset: DatasetSettings) -> Iterator[Problem]:
    for number, entry in enumerate(dataset.directory):
        resolved = dataset.resolved(entry)
        if not resolved.resolutions and not resolved.size_buckets:
            message = "has no size; set resolutions (or size_buckets) for the file or for it"
            yield Problem("", f"key `directory[{number}]`", message)


def _unbalanced(dataset: DatasetSettings) -> Iterator[Problem]:
    """Regularisation data without other data, or with repeats that have no effect."""
    kept = [n for n, entry in enumerate(dataset.directory) if dataset.resolved(entry).is_regularisation_data]
    if len(kept) == len(dataset.directory):
        prefix = "" if dataset.is_regularisation_data else f"directory[{kept[0]}]."
        message = "is true of all directories; leave it out where the subject itself is, or add a directory with it"
        yield Problem("", f"key `{prefix}is_regularisation_data`", message)
    elif len(kept) == 1 and _asks(dataset.directory[kept[0]], "num_repeats"):
        message = (
            "changes nothing: the only directory of regularisation data is used as often as all others together; leave "
            "it out"
        )
        yield Problem("", f"key `directory[{kept[0]}].num_repeats`", message)


def _cache_can_be_written(dataset: DatasetSettings) -> Iterator[Problem]:
    if dataset.cache_dir is not None:
        yield from unwritable("key `cache_dir`", dataset.cache_dir)


def _directories_exist(dataset: DatasetSettings) -> Iterator[Problem]:
    for number, directory in enumerate(dataset.directory):
        where, path = f"key `directory[{number}].path`", directory.path
        yield from missing(where, path)
        if os.path.isfile(path) and path.suffix.lower() not in (*TABLES, TAR):
            known = ", ".join((*TABLES, TAR))
            yield Problem("", where, f"{path} is a file, and none of {known}; give one of those, or a folder")
        several = isinstance(directory.control_path, list)
        for index, control in enumerate(directory.control_paths):
            key = f"control_path[{index}]" if several else "control_path"
            yield from _no_folder(f"key `directory[{number}].{key}`", control)
        yield from _no_folder(f"key `directory[{number}].mask_path`", directory.mask_path)


def _no_folder(where: str, path: Path | None) -> Iterator[Problem]:
    yield from missing(where, path)
    if path is not None and os.path.isfile(path):
        yield Problem("", where, f"{path} is a file; a folder is needed")


def _mask_files_exist(dataset: DatasetSettings, with_directories: bool) -> Iterator[Problem]:
    tables = [("", dataset)]
    if with_directories:
        tables += [(f"directory[{number}].", entry) for number, entry in enumerate(dataset.directory)]
    for prefix, table in tables:
        where, path = f"key `{prefix}default_mask_file`", table.default_mask_file
        yield from missing(where, path)
        if path is not None and os.path.isdir(path):
            yield Problem("", where, f"{path} is a folder; a picture is needed. A folder of masks goes into mask_path")


def _ending(directory: DirectorySettings) -> str:
    """The extension of a `path` that is a file; "" for a folder."""
    return directory.path.suffix.lower() if os.path.isfile(directory.path) else ""


def _may_have_masks(directory: DirectorySettings) -> bool:
    given = directory.alpha_mask or directory.mask_path or directory.default_mask_file
    return bool(given) or _may_be_listed(directory.path)


def _may_be_listed(path: Path) -> bool:
    """Whether the data may be in tables or tars, which can name masks themselves."""
    if not os.path.isdir(path):
        return True
    try:
        return any(name.lower().endswith((*TABLES, TAR)) for name in os.listdir(path))
    except OSError:
        return True


def _has_clips(directory: DirectorySettings) -> bool:
    if directory.size_buckets:
        return any(frames > 1 for _, _, frames in directory.size_buckets)
    return any(frames > 1 for frames in directory.frame_buckets)


def _varies(directory: DirectorySettings) -> bool:
    """Whether each version of a file draws random numbers."""
    draws_clip = directory.video_clip_mode == "single_random" and _has_clips(directory)
    return directory.crop == "random" or directory.flip or any(directory.color_jitter or ()) or draws_clip


def _changes_tags(directory: DirectorySettings) -> bool:
    return bool(directory.cache_shuffle_num or directory.tag_dropout or directory.shuffle_capitalization)


def _captions_are_read(directory: DirectorySettings) -> bool:
    return directory.instance_prompt is None and directory.caption_source in ("auto", "file")


# Keys that other trainers' files have beside what overrides them.
_HARMLESS = (
    Use(RATIO_KEYS, lambda directory: not directory.size_buckets, "not used beside size_buckets"),
    Use(RATIO_KEYS, lambda directory: not directory.ar_buckets, "not used beside ar_buckets"),
    Use(RATIO_KEYS, lambda directory: directory.enable_ar_bucket, "not used without enable_ar_bucket = true"),
    Use(("cache_shuffle_delimiter",), _changes_tags, "not used: tags stay as they are written"),
)
# Of several for one key, the first that does not hold is told.
_USES = (
    Use(
        ("keep_tokens",),
        _changes_tags,
        "is for tags that are changed, and none are: set cache_shuffle_num to cache that many orders of them, or "
        "tag_dropout or shuffle_capitalization, or leave this out",
    ),
    Use(
        ("resolutions", "enable_ar_bucket", "frame_buckets", "ar_buckets"),
        lambda directory: not directory.size_buckets,
        "is not used beside size_buckets, which are complete; leave out one of them",
    ),
    Use(
        ("ar_buckets",),
        lambda directory: directory.enable_ar_bucket,
        "needs enable_ar_bucket = true; set that, or leave this out",
    ),
    Use(
        ("flip", "color_jitter"),
        lambda directory: directory.augment_variants > 1,
        "is drawn for each of augment_variants, of which there is one; set that, as in augment_variants = 4",
    ),
    Use(
        ("augment_variants",),
        _varies,
        'would be all the same: set crop = "random", flip, color_jitter, or, of clips, video_clip_mode = '
        '"single_random"; or leave this out',
    ),
    Use(
        ("framerate", "video_clip_mode"),
        _has_clips,
        "is for clips, and no bucket has more than one frame; set frame_buckets, as in [1, 33], or leave this out",
    ),
    Use(
        ("caption_extension", "caption_column", "multiple_captions"),
        _captions_are_read,
        "is for captions that are read, and instance_prompt or caption_source gives others; leave out one of them",
    ),
    Use(
        MASK_KEYS,
        _may_have_masks,
        "is for masks, and there are none; set mask_path, alpha_mask or default_mask_file, or leave this out",
    ),
    Use(
        ("default_mask_file",),
        lambda directory: not directory.alpha_mask,
        "is not used beside alpha_mask, by which each picture has its own; leave out one of them",
    ),
    Use(
        ("control_resolution", "control_fit"),
        lambda directory: bool(directory.control_paths or directory.data_file_keys),
        "is for control images, and there are none; set control_path or data_file_keys, or leave this out",
    ),
    Use(
        ("recursive",),
        lambda directory: not _ending(directory) or bool(directory.control_paths or directory.mask_path),
        "is for folders, and `path` is a file; leave it out",
    ),
    Use(
        ("file_column", "caption_column", "image_column", "filter"),
        lambda directory: _ending(directory) != TAR,
        "is for tables, and `path` is a .tar; leave it out",
    ),
    Use(
        ("image_column",),
        lambda directory: _ending(directory) not in TABLES or _ending(directory) in (".parquet", ".arrow"),
        "is for tables that hold the pictures themselves, .parquet and .arrow; for one that names files, set "
        "file_column",
    ),
    Use(
        ("caption_extension",),
        lambda directory: _ending(directory) not in TABLES,
        "is for captions in files of their own, and `path` is a table; set caption_column, or leave this out",
    ),
)
_CONFLICTS = (
    Conflict(
        ("min_ar", "max_ar"),
        lambda directory: directory.min_ar > directory.max_ar,
        "min_ar {min_ar} is above max_ar {max_ar}",
    ),
    Conflict(
        ("min_resolution", "max_resolution"),
        lambda directory: (directory.min_resolution or 0) > (directory.max_resolution or float("inf")),
        "min_resolution {min_resolution} is above max_resolution {max_resolution}, which leaves no file",
    ),
    Conflict(
        ("end_epoch", "start_epoch"),
        lambda directory: directory.end_epoch is not None and directory.end_epoch < directory.start_epoch,
        "end_epoch {end_epoch} is before start_epoch {start_epoch}: these samples would never be used",
    ),
    Conflict(
        ("end_step", "start_step"),
        lambda directory: directory.end_step is not None and directory.end_step <= directory.start_step,
        "end_step {end_step} is not after start_step {start_step}: these samples would never be used",
    ),
    Conflict(
        ("alpha_mask", "mask_path"),
        lambda directory: directory.alpha_mask and directory.mask_path is not None,
        "masks come from the alpha channel or from {mask_path}; leave out mask_path, or set alpha_mask = false for "
        "this directory",
    ),
    Conflict(
        ("image_column", "file_column"),
        lambda directory: None not in (directory.image_column, directory.file_column),
        "a table holds the pictures (image_column) or names their files (file_column); leave out one of them",
    ),
    Conflict(
        ("instance_prompt", "caption_source"),
        lambda directory: directory.instance_prompt is not None and directory.caption_source != "auto",
        'instance_prompt is the caption of all files, and caption_source = "{caption_source}" asks for others; give '
        "each directory one of them",
    ),
)
