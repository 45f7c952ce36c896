"""The names of learning-rate schedules, and which keys of a run each uses."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from utils.settings.values import or_else

Name = Literal[
    "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "step", "exponential", "rex", "wsd"
]
NAMES: tuple[str, ...] = get_args(Name)
"""The schedules that need no other library."""
_FALLING = tuple(name for name in NAMES if name != "constant")
OTHERS = "the dotted path of a class"
USED_BY: Mapping[str, tuple[str, ...]] = {
    "lr_min_ratio": _FALLING,
    "lr_num_cycles": ("cosine_with_restarts",),
    "lr_power": ("polynomial",),
    "lr_decay_steps": ("wsd",),
    "lr_step_size": ("step",),
    "lr_gamma": ("step", "exponential"),
    "lr_scheduler_args": (OTHERS,),
}
"""Key -> the schedules that use it."""
NEEDED_BY: Mapping[str, tuple[str, ...]] = {
    "lr_decay_steps": ("wsd",),
    "lr_step_size": ("step",),
    "lr_gamma": ("step", "exponential"),
}
"""Key without a default -> the schedules that need it."""
_SPELLINGS = {
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "cosine_hard_restarts": "cosine_with_restarts",
    "cosine_with_hard_restarts": "cosine_with_restarts",
    "warmup_stable_decay": "wsd",
}


def _settled(value: Any) -> Any:
    lower = value.lower() if isinstance(value, str) and "." not in value else value
    return _SPELLINGS.get(lower, lower) if isinstance(lower, str) else value


LrScheduler = Annotated[
    Name | Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")],
    or_else(f"must be one of {', '.join(NAMES)}, or {OTHERS} or function, as torch.optim.lr_scheduler.CyclicLR"),
    BeforeValidator(_settled, json_schema_input_type=Literal[(*NAMES, *_SPELLINGS)] | str),
]


def name_of(scheduler: str) -> str:
    """The name of a schedule in `USED_BY`."""
    return scheduler if scheduler in NAMES else OTHERS
