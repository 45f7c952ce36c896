"""Configurations of diffusers' and transformers' classes: are their values of the types that the class takes, and what
a class makes of them.

Without this a text where a number belongs is an error from deep within a library, and `"false"` is true.
"""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from models.foundation.checkpoints.stock import of_diffusers
from utils.device_memory import lacks_memory
from utils.errors import UserError
from utils.json_files import ANEW, is_of, read_json, shown

logger = logging.getLogger(__name__)

SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"
OTHERWISE = {
    **dict.fromkeys(("axes_dim_rope", "axes_lens"), tuple[int, int, int]),
    "max_resolution": tuple[int, int],
    "interpolation_scale": float | None,
}
"""Lists that are taken apart here; and what is 2.0 in published models, where a class says `int`."""
PROCESSOR_FILE = "preprocessor_config.json"
_SIZES = int | dict[str, int] | None
_COLOUR = tuple[float, float, float]
PROCESSOR_KINDS = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_center_crop"), bool | None),
    **dict.fromkeys(("image_mean", "image_std"), _COLOUR | None),
    **dict.fromkeys(("size", "crop_size"), _SIZES),
    **dict.fromkeys(("patch_size", "merge_size", "temporal_patch_size"), Annotated[int, 1]),
    **dict.fromkeys(("min_pixels", "max_pixels", "resample"), int | None),
    "rescale_factor": float | None,
}
"""The types of the settings of image processors."""


@cache
def kinds_of(cls: type) -> Mapping[str, Any]:
    """The types of the values that a class of diffusers takes from its configuration, by key, as `check_types` knows
    them. They follow from its annotations, and from its defaults where it has none."""
    parameters = {key: one for key, one in inspect.signature(cls.__init__).parameters.items() if key != "self"}
    hints = get_type_hints(cls.__init__)
    kinds = {}
    for key, parameter in parameters.items():
        kind = _checked(hints[key] if key in hints else _kind_of(parameter.default))
        # Published configurations have null for what is off, such as the `upcast_attention` of SDXL.
        may_be_null = parameter.default is None or kind is bool
        kind = Union[kind, None] if may_be_null else kind  # noqa: UP007
        # Of a default that is no value of it, the annotation says nothing.
        has_other = parameter.default is not parameter.empty and not is_of(parameter.default, kind)
        kinds[key] = OTHERWISE.get(key, Any if has_other else kind)
    return kinds


def _kind_of(default: Any) -> Any:
    """The type of values of which this is one."""
    if isinstance(default, list | tuple) and default:
        return list[_kind_of(default[0])]
    if isinstance(default, bool | str):
        return type(default)
    return float if isinstance(default, int | float) else Any


def _checked(kind: Any) -> Any:
    """The type, where it can be trusted: sizes are not negative; for numbers that may be missing some classes say
    `bool | None`."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is int:
        return Annotated[int, 0]
    if origin in (Union, types.UnionType):
        return Any if set(inner) == {bool, type(None)} else Union[tuple(map(_checked, inner))]  # noqa: UP007
    # How many there are is wrong in some annotations.
    return list[inner[0]] if origin in (list, tuple) and inner else kind


def check_processor(folder: Path) -> None:
    """Whether the settings of an image processor are of the types that they should be.

    Raises:
        UserError: they are missing or damaged.
    """
    read_json(folder / PROCESSOR_FILE, kinds=PROCESSOR_KINDS)


@contextmanager
def explained(file: Path, what: str) -> Iterator[None]:
    """Turns what a library raises about a configuration into a message that names the file.

    Args:
        what: what is made of it.

    Raises:
        UserError: anything was raised but a UserError, which passes, and a lack of memory.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    # Libraries decide which errors they raise; some raise a bare Exception.
    except Exception as error:
        if lacks_memory(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError.of(f"no {what} can be made of this ({said}); {ANEW}", str(file)) from error


def made_of(class_name: str, config: Mapping[str, Any], file: Path, **further: Any) -> Any:
    """What the class of diffusers makes of a configuration that was read from `file`.

    Args:
        further: arguments beside the configuration.

    Raises:
        UserError: it can make nothing of it.
    """
    cls = of_diffusers(class_name)
    # A scheduler's has those of other schedulers, for which it may be exchanged.
    unused = [] if file.name == SCHEDULER_FILE.name else [key for key in config if key not in kinds_of(cls)]
    if unused := [key for key in unused if not key.startswith("_")]:
        logger.warning("%s: %s has no use for %s: is a key misspelt?", file, class_name, ", ".join(map(shown, unused)))
    with explained(file, class_name):
        return cls.from_config(config, **further)


def stock_scheduler(folder: Path, class_name: str) -> Any:
    """The scheduler of a diffusers folder, as this class, with the settings that the folder has.

    Raises:
        UserError: they are missing or damaged.
    """
    file = folder / SCHEDULER_FILE
    config = read_json(file, kinds=kinds_of(of_diffusers(class_name)))
    return made_of(class_name, config, file)
