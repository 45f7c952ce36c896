"""Rules about several keys of a run. They see the sound keys of a file even when others are broken."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

from utils.errors import Problem
from utils.settings.export_rules import EXPORT_RULES, names_are_used
from utils.settings.model_schema import QuantisedType
from utils.settings.paths import missing, unwritable
from utils.settings.rule import SettingsRule, at
from utils.settings.schema import Settings
from utils.settings.stage_rules import STAGE_RULES, micro_batches_overlap
from utils.settings.step_rules import STEP_RULES

EVAL_KEYS = (
    "eval_every_n_steps",
    "eval_every_n_epochs",
    "eval_every_n_examples",
    "eval_patience",
    "eval_micro_batch_size_per_gpu",
    "eval_image_micro_batch_size_per_gpu",
)
SAMPLE_CADENCES = ("sample_every_n_steps", "sample_every_n_epochs", "sample_before_first_step")
SAMPLE_SOURCES = ("prompts", "samples", "prompt_file")
TRAINING_NAME = "train"
BATCH_KEYS = (
    "micro_batch_size_per_gpu",
    "image_micro_batch_size_per_gpu",
    "eval_micro_batch_size_per_gpu",
    "eval_image_micro_batch_size_per_gpu",
)
BUFFERS = 2
"""The blocks for which a GPU has room while their weights are swapped."""
WANDB_KEYS = ("wandb_api_key", "wandb_tracker_name", "wandb_run_name")
# Keys of [model] that only some values of another make use of.
USED_WITH: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {
    ("sigmoid_scale", "logit_mean"): ("timestep_sample_method", ("logit_normal", "log_snr")),
    ("mode_scale",): ("timestep_sample_method", ("mode",)),
    ("beta_alpha", "beta_beta"): ("timestep_sample_method", ("beta",)),
    ("huber_c", "huber_schedule", "huber_scale"): ("loss_type", ("huber", "smooth_l1", "pseudo_huber")),
}


def check_rules(
    settings: Settings, world_size: int | None, file: str = "", broken: frozenset[str] = frozenset()
) -> list[Problem]:
    """The problems of a run started as `world_size` processes; None for any number that fits.

    Rules that read one of the `broken` keys ("epochs", "model.shift", or a whole table, "model") are left out, because
    the values of those keys are unknown.
    """
    return [
        replace(problem, file=file)
        for rule in _RULES
        if not any(_is_broken(key, broken) for key in rule.keys)
        for problem in rule.check(settings, world_size)
    ]


def _is_broken(key: str, broken: frozenset[str]) -> bool:
    """Whether the value of a key, or of a key of its table, is unknown; "adapter.*" is every key of a table."""
    table, _, own = key.partition(".")
    return table in broken or key in broken or (own == "*" and any(name.startswith(f"{table}.") for name in broken))


def remarks_on_run(settings: Settings, file: str = "") -> list[Problem]:
    """What a sound run's file says in vain, and does no harm with."""
    return [replace(remark, file=file) for rule in _HARMLESS for remark in rule(settings)]


def _recomputed_blocks_are_asked_for(settings: Settings, _: int) -> Iterator[Problem]:
    if settings.activation_checkpointing_every_n_blocks > 1 and not settings.activation_checkpointing:
        yield at(
            "key `activation_checkpointing_every_n_blocks`",
            "is for activation_checkpointing only; set that, or leave this out",
        )


def _one_shift(settings: Settings, _: int) -> Iterator[Problem]:
    if settings.model.flux_shift and settings.model.shift is not None:
        yield at("[model] shift", "excludes flux_shift = true; leave out one of them")


def _model_has_a_folder(settings: Settings, _: int) -> Iterator[Problem]:
    model = settings.model
    if model.diffusers_path is None:
        if model.transformer_path is None and not (model.from_scratch and model.architecture):
            yield at(
                "[model] diffusers_path",
                "is required: give the model's folder in diffusers' layout. Without one, transformer_path, vae_path "
                "and text_encoders name single files",
            )
        return
    for key in ("architecture", "tokenizer_path"):
        if getattr(model, key) is not None:
            yield at(
                f"[model] {key}", "is for single files without a folder, and diffusers_path gives one; leave it out"
            )
    if os.path.isfile(model.diffusers_path):
        yield at(
            "[model] diffusers_path",
            f"{model.diffusers_path} is a file, and the model's folder in diffusers' layout is needed; a file with the "
            "denoiser's weights goes into transformer_path, beside it",
        )


def _parent_is_kept(settings: Settings, _: int) -> Iterator[Problem]:
    if settings.regularisation_target == "parent" and settings.adapter is None:
        message = '"parent" needs [adapter]: a full fine-tune does not keep the model that it began with'
        yield at("key `regularisation_target`", message)
    elif settings.regularisation_target == "parent" and settings.model.train:
        message = '"parent" is the model without its adapter, and [model] train changes that one too; leave out one'
        yield at("key `regularisation_target`", message)


def _one_teacher(settings: Settings, _: int) -> Iterator[Problem]:
    if settings.regularisation_target == "parent" and settings.model.folded_guidance is not None:
        message = 'moves every target, and regularisation_target = "parent" gives other ones; leave out one of them'
        yield at("[model] folded_guidance", message)


def _output_can_be_written(settings: Settings, _: int) -> Iterator[Problem]:
    yield from unwritable("key `output_dir`", settings.output_dir)


def _dataset_exists(settings: Settings, _: int) -> Iterator[Problem]:
    yield from missing("key `dataset`", settings.dataset)


def _eval_paths_exist(settings: Settings, _: int) -> Iterator[Problem]:
    for number, entry in enumerate(settings.eval_datasets):
        if entry.config is not None:
            yield from missing(f"key `eval_datasets[{number}].config`", entry.config)


def _eval_data_is_named(settings: Settings, _: int) -> Iterator[Problem]:
    for number, entry in enumerate(settings.eval_datasets):
        if (entry.config is None) == (entry.fraction is None):
            yield at(
                f"key `eval_datasets[{number}]`",
                "needs `config` or `fraction`: its own file, or a part of the training set; one of them",
            )
    if sum(entry.fraction or 0.0 for entry in settings.eval_datasets) >= 1:
        yield at("key `eval_datasets`", "the fractions are 1 together, so that nothing is left to train")


def _model_path_exists(key: str) -> SettingsRule:
    def check(settings: Settings, _: int) -> Iterator[Problem]:
        path = getattr(settings.model, key)
        for problem in missing(f"[model] {key}", path):
            yield replace(problem, message=f"{problem.message}{_if_on_the_hub(path)}")

    return SettingsRule((f"model.{key}",), check)


def _if_on_the_hub(path: Path) -> str:
    """What to do with a name on Hugging Face, which has an owner and a name, and which is not downloaded here."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) or path.suffix in (".safetensors", ".gguf"):
        return ""
    return (
        f". If that is a name on Hugging Face, download it first: hf download {path} --local-dir models/{path.name}, "
        f"and write models/{path.name} here, with the folder that you chose"
    )


def _text_encoder_paths_exist(settings: Settings, _: int) -> Iterator[Problem]:
    for number, encoder in enumerate(settings.model.text_encoders):
        yield from missing(f"[model] text_encoders[{number}].path", encoder.path)


def _adapter_path_exists(settings: Settings, _: int) -> Iterator[Problem]:
    if settings.adapter is not None:
        yield from missing("[adapter] init_from_existing", settings.adapter.init_from_existing)


def _adapter_agrees(settings: Settings, _: int) -> Iterator[Problem]:
    if settings.adapter is not None:
        for key, problem in settings.adapter.problems(settings.model):
            yield at(f"[adapter] {key}", problem)


def _preset_paths_exist(settings: Settings, _: int) -> Iterator[Problem]:
    for number, preset in enumerate(settings.model.preset_adapters, start=1):
        yield from missing(f"[[model.preset_adapters]] {number} path", preset.path)


def _float16_is_not_trained(settings: Settings, _: int) -> Iterator[Problem]:
    tables = {"[model]": settings.model, "[adapter]": settings.adapter}
    for table, chosen in tables.items():
        for key in ("dtype", "transformer_dtype"):
            if getattr(chosen, key, None) == "float16":
                yield at(
                    f"{table} {key}", "float16 overflows in training without loss scaling; use bfloat16 or float32"
                )


def _quantised_base_has_adapter(settings: Settings, _: int) -> Iterator[Problem]:
    chosen = settings.model.transformer_dtype
    if chosen in get_args(QuantisedType) and settings.adapter is None:
        yield at(
            "[model] transformer_dtype",
            f'"{chosen}" is for a base that stays as it is, under an [adapter]; add one, or use bfloat16 or float32 '
            "for a full fine-tune",
        )


def _patience_has_evaluations(settings: Settings, _: int) -> Iterator[Problem]:
    every = [key for key in EVAL_KEYS if key.startswith("eval_every") and getattr(settings, key)]
    if settings.eval_patience and settings.eval_datasets and not every:
        yield at("key `eval_patience`", "counts evaluations, and there is none before the end; set eval_every_n_steps")


def _eval_names_differ(settings: Settings, _: int) -> Iterator[Problem]:
    names = [entry.name for entry in settings.eval_datasets]
    for number, name in enumerate(names):
        if name == TRAINING_NAME:
            yield at(f"key `eval_datasets[{number}].name`", f'"{name}" is what the training set is called')
        if name in names[:number]:
            yield at(f"key `eval_datasets[{number}].name`", f'"{name}" names an entry above too')


def _eval_keys_have_data(settings: Settings) -> Iterator[Problem]:
    if not settings.eval_datasets:
        for key in EVAL_KEYS:
            if getattr(settings, key) is not None:
                yield at(f"key `{key}`", "not used: there is nothing to evaluate without eval_datasets")


def _one_batch_a_resolution(key: str) -> SettingsRule:
    def check(settings: Settings, _: int) -> Iterator[Problem]:
        sizes = getattr(settings, key)
        sides = [side for side, _ in sizes] if isinstance(sizes, list) else []
        if twice := next((side for side in sides if sides.count(side) > 1), None):
            yield at(f"key `{key}`", f"has the resolution {twice} twice; keep one of them")

    return SettingsRule((key,), check)


def _prompts_have_a_cadence(settings: Settings, _: int) -> Iterator[Problem]:
    sampling = settings.sampling
    given = [key for key in SAMPLE_CADENCES if getattr(sampling, key)]
    sources = [key for key in SAMPLE_SOURCES if getattr(sampling, key)]
    if sources and not given:
        yield at(f"[sampling] {sources[0]}", f"are drawn at no time; set one of {', '.join(SAMPLE_CADENCES)}")
    if given and not sources:
        yield at(f"[sampling] {given[0]}", "there is nothing to draw; add prompts, or leave it out")
    if sampling.clip_path and not sources:
        yield at("[sampling] clip_path", "there is nothing to score; add prompts, or leave it out")


def _sampling_paths_exist(settings: Settings, _: int) -> Iterator[Problem]:
    for key in ("prompt_file", "clip_path"):
        yield from missing(f"[sampling] {key}", getattr(settings.sampling, key))


def _is_used(key: str, chooser: str, values: tuple[str, ...]) -> SettingsRule:
    """A key with its default value is allowed anywhere, because resolved settings contain every key."""

    def check(settings: Settings, _: int) -> Iterator[Problem]:
        model = settings.model
        if _is_changed(settings, key) and getattr(model, chooser) not in values:
            fitting = " or ".join(f'"{value}"' for value in values)
            yield at(f"[model] {key}", f"is for {chooser} = {fitting} only; set that, or leave this out")

    return SettingsRule((f"model.{key}", f"model.{chooser}"), check)


def _discount_has_levels(settings: Settings, _: int) -> Iterator[Problem]:
    if _is_changed(settings, "multires_noise_discount") and not settings.model.multires_noise_iterations:
        yield at(
            "[model] multires_noise_discount", "is for multires_noise_iterations only; set that, or leave this out"
        )


def _is_changed(settings: Settings, key: str) -> bool:
    """Whether a key of [model] differs from its default."""
    return getattr(settings.model, key) != type(settings.model).model_fields[key].default


def _wandb_is_enabled(settings: Settings) -> Iterator[Problem]:
    monitoring = settings.monitoring
    for key in WANDB_KEYS:
        if not monitoring.enable_wandb and getattr(monitoring, key) is not None:
            yield at(f"[monitoring] {key}", "not used without enable_wandb = true")


def _blocks_are_swapped(settings: Settings) -> Iterator[Problem]:
    if settings.disable_block_swap_for_eval and not settings.swaps:
        yield at("key `disable_block_swap_for_eval`", "not used without blocks_to_swap")


def _swap_saves_memory(settings: Settings) -> Iterator[Problem]:
    swapped = settings.blocks_to_swap
    numbers = [] if swapped == "auto" else swapped if isinstance(swapped, list) else [swapped]
    if settings.adapter and not settings.divides_weights and any(0 < number <= BUFFERS for number in numbers):
        message = "saves nothing where it is 1 or 2, since two blocks' room stays on the GPU; write 3 or more, or 0"
        yield at("key `blocks_to_swap`", message)


_HARMLESS = (
    micro_batches_overlap,
    _eval_keys_have_data,
    _wandb_is_enabled,
    _blocks_are_swapped,
    _swap_saves_memory,
    names_are_used,
)
_RULES = (
    *STAGE_RULES,
    *STEP_RULES,
    *EXPORT_RULES,
    SettingsRule(
        ("activation_checkpointing", "activation_checkpointing_every_n_blocks"), _recomputed_blocks_are_asked_for
    ),
    SettingsRule(("dataset",), _dataset_exists),
    SettingsRule(("eval_datasets",), _eval_paths_exist),
    SettingsRule(("eval_datasets",), _eval_data_is_named),
    SettingsRule(("eval_datasets",), _eval_names_differ),
    SettingsRule(("eval_datasets", "eval_patience"), _patience_has_evaluations),
    SettingsRule(("model", "adapter"), _float16_is_not_trained),
    SettingsRule(("model.transformer_dtype", "adapter"), _quantised_base_has_adapter),
    SettingsRule(("model.shift", "model.flux_shift"), _one_shift),
    *(_is_used(key, *chosen) for keys, chosen in USED_WITH.items() for key in keys),
    SettingsRule(("model.multires_noise_discount", "model.multires_noise_iterations"), _discount_has_levels),
    SettingsRule(("regularisation_target", "adapter", "model.train"), _parent_is_kept),
    SettingsRule(("regularisation_target", "model.folded_guidance"), _one_teacher),
    SettingsRule(("output_dir",), _output_can_be_written),
    # Of a model that is unknown, and of one whose folder has diffusion-pipe's name, that is told already.
    SettingsRule(
        (
            "model.type",
            "model.ckpt_path",
            "model.diffusers_path",
            "model.transformer_path",
            "model.architecture",
            "model.tokenizer_path",
        ),
        _model_has_a_folder,
    ),
    *(_one_batch_a_resolution(key) for key in BATCH_KEYS),
    *(_model_path_exists(key) for key in ("diffusers_path", "transformer_path", "vae_path", "tokenizer_path")),
    SettingsRule(("model.text_encoders",), _text_encoder_paths_exist),
    SettingsRule(("adapter.init_from_existing",), _adapter_path_exists),
    SettingsRule(("adapter.*", "model.preset_adapters"), _adapter_agrees),
    SettingsRule(("model.preset_adapters",), _preset_paths_exist),
    SettingsRule(tuple(f"sampling.{key}" for key in (*SAMPLE_SOURCES, *SAMPLE_CADENCES)), _prompts_have_a_cadence),
    SettingsRule(("sampling.prompt_file", "sampling.clip_path"), _sampling_paths_exist),
)
