"""Types of values: what the tables of the schema are made of."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator


class SettingsTable(BaseModel):
    """A table of a settings file: unknown keys are refused and `"10"` is no number."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
    binds_checkpoint: ClassVar[tuple[str, ...]] = ()
    """The keys that must not change on resuming, because the weights or the draws of a checkpoint depend on them."""

    tells_apart: ClassVar[tuple[str, ...]] = ()
    """The keys by which the runs of one folder are told apart, beside those: what is trained on what. A run may go on
    under other values of them, but not unasked."""

    def binding(self) -> dict[str, Any]:
        """The values of `binds_checkpoint`, as types that JSON has."""
        return {key: getattr(self, key) for key in self.binds_checkpoint}

    def telling(self) -> dict[str, Any]:
        """The values of `tells_apart`, as types that JSON has, paths absolute."""
        values = {key: getattr(self, key) for key in self.tells_apart}
        return {key: str(value.resolve()) if isinstance(value, Path) else value for key, value in values.items()}


def or_else(message: str) -> WrapValidator:
    """One `message` instead of one error for every member of a union."""

    def validate(value: Any, inner: Any) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise ValueError(message) from None

    return WrapValidator(validate)


def also_called(choice: Any, **others: str) -> Any:
    """`choice`, a Literal of texts, which also accepts the names that other trainers use for them."""

    def settle(value: Any) -> Any:
        return others.get(value, value) if isinstance(value, str) else value

    return Annotated[choice, BeforeValidator(settle, json_schema_input_type=Literal[(*get_args(choice), *others)])]


def _at_home(path: Path) -> Path:
    # Unlike Path.expanduser, this keeps the ~name of an unknown user, which is then reported as missing.
    return Path(os.path.expanduser(path))


_MINUTES = {"d": 24 * 60.0, "h": 60.0, "m": 1.0, "s": 1 / 60}


def _minutes_of(value: Any) -> Any:
    """The minutes that a text such as "3h50m" stands for; what is no text is left to other checks."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch("".join(rf"(?:([\d.]+)\s*{unit})?\s*" for unit in _MINUTES), value.strip().lower())
    if not found or not any(found.groups()):
        raise ValueError
    return sum(
        float(number) * minutes for number, minutes in zip(found.groups(), _MINUTES.values(), strict=True) if number
    )


Count = Annotated[int, Field(ge=1)]
Pieces = Annotated[int, Field(ge=2)]
AttentionKernels = Annotated[
    Literal["auto", "sdpa", "flash", "flash3", "xformers"],
    or_else(
        'must be "auto", "sdpa", "flash", "flash3" or "xformers"; SageAttention ("sage") has no backward pass to train '
        'with, and flex attention ("flex") no kernel unless it is compiled'
    ),
]
PipelineSchedule = Annotated[
    Literal["1f1b", "interleaved"],
    or_else('must be "1f1b" or "interleaved", for stages of a pipeline; the learning rate\'s is named by lr_scheduler'),
]
# TOML's 1e6 is a float, which stands for a very large number in other trainers' files.
LargeCount = Annotated[
    Count,
    BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value),
]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
OptionalRate = Annotated[float | None, Field(ge=0), AfterValidator(lambda rate: rate or None)]
"""A learning rate; 0 is none, which freezes what it is for."""
Duration = Annotated[
    Positive,
    BeforeValidator(_minutes_of, json_schema_input_type=Positive | str),
    or_else('must be a time as in "3h50m", or a number of minutes'),
]
"""In minutes."""
Share = Annotated[float, Field(ge=0, lt=1)]
Inner = Annotated[float, Field(gt=0, lt=1)]
"""A fraction between 0 and 1, without both."""
Part = Annotated[float, Field(ge=0, le=1)]
"""A fraction, 1 included."""
ClipBy = Literal["norm", "layer", "value"]
Steps = Annotated[
    Natural | Annotated[float, Field(gt=0, lt=1)],
    or_else("must be a number of steps as in 100, or a fraction of them as in 0.05"),
]
# TOML has neither paths nor tuples: these two alone are converted, from a text and from an array.
UserPath = Annotated[Path, Field(strict=False), AfterValidator(_at_home)]
Pair = Annotated[tuple[Count, Count], Field(strict=False)]
ResolutionBatch = Annotated[tuple[Count, Count], Field(strict=False)]
Betas = Annotated[tuple[Share, Share], Field(strict=False)]
Resolution = Annotated[Count | Pair, or_else("must be a side as in 512, or a size as in [768, 512]")]
AspectRatio = Annotated[Positive | Pair, or_else("must be a ratio as in 1.5, or a size as in [768, 512]")]
MicroBatches = Annotated[
    Count | Annotated[list[ResolutionBatch], Field(min_length=1)],
    or_else("must be a number, or pairs of a resolution and a number as in [[512, 4], [1024, 1]]"),
]
SwappedBlocks = Annotated[
    Natural | Annotated[list[Natural], Field(min_length=1)] | Literal["auto"],
    or_else('must be a number of blocks, a list with a number for each stage as in [10, 12], or "auto"'),
]
Recomputed = Annotated[
    bool | Literal["offload", "unsloth", "auto"],
    or_else('must be true, false, "offload", "unsloth" or "auto"'),
]
ZeroStage = Annotated[
    Annotated[int, Field(ge=0, le=3)],
    or_else("must be 0, 1, 2 or 3"),
]
SizeBucket = Annotated[
    tuple[Count, Count, Count],
    Field(strict=False),
    or_else("must be [width, height, frames] as in [512, 512, 33]"),
]
TimestepMethod = also_called(
    Literal["logit_normal", "uniform", "mode", "cosmap", "beta", "log_snr"],
    sigmoid="logit_normal",
    sigma="uniform",
    logsnr="log_snr",
)
LossType = also_called(Literal["mse", "mae", "huber", "smooth_l1", "pseudo_huber"], l2="mse", l1="mae")


NOT_IN_NAMES = '<>:"/\\|?*'
"""What names of files cannot have on some system."""


def _file_name(name: str) -> str:
    wrong = next((letter for letter in name if letter in NOT_IN_NAMES or not letter.isprintable()), None)
    if wrong:
        raise ValueError(f"is to be a part of names of files, and {wrong!r} cannot be in one; leave it out")
    if not name.strip(" .") or name != name.strip(" ") or name[0] in ".-" or name[-1] == "." or len(name) > 100:
        raise ValueError(
            "is to be a part of names of files: 1 to 100 letters, without spaces or dots at its ends, or a hyphen first"
        )
    return name


FileName = Annotated[str, AfterValidator(_file_name)]
"""A part of the name of a file or folder."""


def _only_weighs(value: Any) -> Any:
    """Other trainers use one key for how timesteps are drawn and for how their losses are weighted."""
    if value in ("uniform", "logit_normal", "mode"):
        raise ValueError(f'is how timesteps are drawn: write timestep_sample_method = "{value}" instead')
    return value


WeightingScheme = Annotated[Literal["none", "sigma_sqrt", "cosmap"], BeforeValidator(_only_weighs)]
