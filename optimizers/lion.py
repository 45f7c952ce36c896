"""Lion, which steps by the sign of a momentum (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms")."""

from functools import partial
from typing import Literal

from optimizers.eight_bits import eight_bit_bytes, in_eight_bits
from optimizers.kinds import OptimizerKind
from optimizers.libraries import as_it_is, nothing_is_kept
from optimizers.optimi import compensated, optimi, optimi_bytes
from utils.settings.schema import OptimizerSettings
from utils.settings.values import Betas


class LionSettings(OptimizerSettings):
    """`type = "lion"`: steps by the sign of a momentum, with half of Adam's state; `lr` is to be 3 to 10 times
    smaller."""

    type: Literal["lion"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.9, 0.99)
    """Of the mean whose sign is the step, and of the mean that is kept."""


class Lion8bitSettings(LionSettings):
    """`type = "lion8bit"`: Lion with its state in 8 bits: the least state of all. Needs a GPU."""

    type: Literal["lion8bit"]
    """Algorithm; upper and lower case are alike."""


class PagedLion8bitSettings(LionSettings):
    """`type = "paged_lion8bit"`: as "lion8bit"; state that the GPU has no room for moves to the machine's memory."""

    type: Literal["paged_lion8bit"]
    """Algorithm; upper and lower case are alike."""


KINDS = (
    OptimizerKind(
        LionSettings, optimi("Lion"), partial(optimi_bytes, 1), not_on={}, retyped=compensated, library="torch-optimi"
    ),
    *(
        OptimizerKind(
            settings,
            in_eight_bits(name),
            partial(eight_bit_bytes, 1),
            not_on={"cpu": 'runs on GPUs only; use "lion"'},
            retyped=as_it_is,
            library="bitsandbytes",
            loses_small_steps=nothing_is_kept,
        )
        for settings, name in ((Lion8bitSettings, "Lion8bit"), (PagedLion8bitSettings, "PagedLion8bit"))
    ),
)
