"""Rules about the keys that say how weights are stepped: the optimizer's and those of its learning rate."""

from collections.abc import Iterator

from utils.errors import Problem
from utils.settings.lr_schedules import NEEDED_BY, OTHERS, USED_BY, name_of
from utils.settings.rule import SettingsRule, at
from utils.settings.schema import PART_RATES, Settings

OF_PARTS = "_lr"
"""The ending of the keys of `[model]` that are rates of its parts."""
DIVIDES_GRADIENTS = 2
"""The `zero_stage` that does so, and leaves weights alone."""


def _gradients_at_home_are_not_divided(settings: Settings, _: int) -> Iterator[Problem]:
    if settings.swaps_trained and settings.blocks_to_swap != "auto" and settings.zero_stage == DIVIDES_GRADIENTS:
        weights_too = ", or 3, which divides their weights too" if settings.pipeline_stages == 1 else ""
        message = (
            "is not for swapped blocks of a full fine-tune, whose gradients are in the machine's memory anyway: set "
            f"zero_stage = 1{weights_too}; or leave out blocks_to_swap"
        )
        yield at("key `zero_stage`", message)


def _weights_are_divided_in_one_stage(settings: Settings, _: int) -> Iterator[Problem]:
    if not settings.divides_weights:
        return
    if settings.pipeline_stages > 1:
        stage = 1 if settings.swaps_trained else DIVIDES_GRADIENTS
        yield at(
            "key `zero_stage`",
            f"divides weights among data ranks, and pipeline_stages divide them already: set zero_stage = {stage}, or "
            "pipeline_stages = 1",
        )
    if settings.disable_block_swap_for_eval:
        yield at(
            "key `disable_block_swap_for_eval`",
            "would give each GPU all weights that zero_stage = 3 divides; leave out one of them",
        )


def _released_gradients_are_not_needed(settings: Settings, _: int) -> Iterator[Problem]:
    """A step within the backward pass would be another one with these keys."""
    if not settings.optimizer.gradient_release:
        return
    place = "[optimizer] gradient_release"
    if settings.gradient_accumulation_steps > 1:
        yield at(place, "steps with each micro-batch; set gradient_accumulation_steps = 1, or leave it out")
    if settings.gradient_clipping and settings.gradient_clipping_by == "norm":
        yield at(
            place,
            "steps before the norm of the whole gradient is known; set gradient_clipping = 0, or gradient_clipping_by "
            '= "layer" or "value", or leave it out',
        )
    for key in ("zero_stage", "offload_optimizer", "swaps_trained"):
        if getattr(settings, key):
            name = "blocks_to_swap of a full fine-tune" if key == "swaps_trained" else key
            yield at(place, f"is not for {name}, which has other ways for gradients; leave out one of them")


def _schedule_uses(key: str) -> SettingsRule:
    """A key with its default value is allowed anywhere, because resolved settings contain every key."""

    def check(settings: Settings, _: int) -> Iterator[Problem]:
        value, users, name = getattr(settings, key), USED_BY[key], name_of(settings.lr_scheduler)
        if value != Settings.model_fields[key].default and name not in users:
            fitting = " or ".join(user if user == OTHERS else f'"{user}"' for user in users)
            yield at(f"key `{key}`", f"is for lr_scheduler = {fitting} only; set that, or leave this out")
        if value is None and name in NEEDED_BY.get(key, ()):
            yield at(f"key `{key}`", f'is needed by lr_scheduler = "{name}"; add it')

    return SettingsRule((key, "lr_scheduler"), check)


def _limited_norms_stay(settings: Settings, _: int) -> Iterator[Problem]:
    if getattr(settings.adapter, "scale_weight_norms", None) and settings.offload_optimizer:
        yield at(
            "[adapter] scale_weight_norms",
            "limits factors on the GPU, and offload_optimizer steps copies of them; leave out one of them",
        )


def _one_rate_has_no_others(settings: Settings, _: int) -> Iterator[Problem]:
    """A constant rate is that of all parameters; those of their own would be lost in it."""
    if settings.force_constant_lr is None:
        return
    optimizer, adapter = settings.optimizer, settings.adapter
    own = {
        "[optimizer] rules": any(rule.lr for rule in optimizer.rules),
        **{f"[optimizer] {key}": getattr(optimizer, key) for key in PART_RATES},
        "[adapter] rules": any(rule.lr for rule in adapter.rules) if adapter else False,
        "[adapter] loraplus_lr_ratio": getattr(adapter, "loraplus_lr_ratio", None),
    }
    for place, is_given in own.items():
        if is_given:
            message = "gives some parameters a rate of their own, and force_constant_lr one to all; leave one out"
            yield at(place, message)
    for key in [key for key in type(settings.model).model_fields if key.endswith(OF_PARTS)]:
        # Of a text encoder it says that this is trained, so that the same rate is no contradiction.
        if (rate := getattr(settings.model, key)) and rate != settings.force_constant_lr:
            message = (
                f"is {rate:g}, and force_constant_lr gives {settings.force_constant_lr:g} to all; write the same here, "
                "or leave one out"
            )
            yield at(f"[model] {key}", message)


STEP_RULES = (
    SettingsRule(("force_constant_lr", "optimizer", "adapter.*", "model.*"), _one_rate_has_no_others),
    SettingsRule(("adapter.*", "offload_optimizer"), _limited_norms_stay),
    SettingsRule(("blocks_to_swap", "adapter", "zero_stage"), _gradients_at_home_are_not_divided),
    SettingsRule(
        ("zero_stage", "pipeline_stages", "disable_block_swap_for_eval", "blocks_to_swap", "adapter"),
        _weights_are_divided_in_one_stage,
    ),
    SettingsRule(
        (
            "optimizer.gradient_release",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "gradient_clipping_by",
            "zero_stage",
            "offload_optimizer",
            "blocks_to_swap",
            "adapter",
        ),
        _released_gradients_are_not_needed,
    ),
    *(_schedule_uses(key) for key in USED_BY),
)
