"""What PEFT was told about an adapter, as files of diffusers and PEFT have it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from utils.adapters.kinds import AdapterFile, ExportWishes, Tensors
from utils.errors import UserError
from utils.json_files import ANEW, check_types, parsed_json, read_json, shown

HEADER, CONFIG_FILE = "lora_adapter_metadata", "adapter_config.json"
"""Where diffusers and PEFT keep an adapter's settings: a key of the header, and a file beside it."""
PEFT_KINDS = {
    "lora_alpha": float | None,
    "use_rslora": bool | None,
    "alpha_pattern": dict[str, float] | None,
}
"""The types of what is read of PEFT's settings."""


def peft_settings(file: AdapterFile, module: str) -> Mapping[str, Any]:
    """What PEFT was told about a part's adapter: from the header, where diffusers keeps it for each part, or from the
    configuration beside the file."""
    known = _in_header(file)
    if not known:
        config = file.path and file.path.with_name(CONFIG_FILE)
        return _checked(read_json(config), str(config)) if config and config.is_file() else {}
    parts = sorted({key.rpartition(".")[0] for key in known}, key=lambda part: part.startswith("text_encoder"))
    # Names of modules begin with the part if several are trained; else it is the denoiser's, of whatever name.
    part = next((part for part in parts if part and module.startswith(f"{part}.")), parts[0])
    own = {key.rpartition(".")[2]: value for key, value in known.items() if key.rpartition(".")[0] == part}
    return _checked(own, str(file.path or ""), f"`{HEADER}` in its header")


def _in_header(file: AdapterFile) -> dict[str, Any]:
    """What diffusers keeps in the header, of all parts.

    Raises:
        ValueError: it is no object of JSON.
    """
    try:
        known = parsed_json(file.metadata.get(HEADER, "{}"))
    except ValueError as error:
        raise ValueError(f"`{HEADER}` in its header is not JSON ({error}); {ANEW}") from error
    if not isinstance(known, dict):
        raise ValueError(f"`{HEADER}` in its header is {shown(known)}, and an object of settings is meant; {ANEW}")
    return known


def _checked(known: Mapping[str, Any], file: str, where: str = "") -> Mapping[str, Any]:
    """PEFT's settings, whose types are those of PEFT.

    Raises:
        UserError: they are not; names the key.
    """
    check_types(known, PEFT_KINDS, file, ANEW, where)
    alphas = {"lora_alpha": known.get("lora_alpha") or 0.0, **(known.get("alpha_pattern") or {})}
    for key, alpha in alphas.items():
        if not math.isfinite(alpha):
            raise UserError.of(f"the alpha of `{key}` is {alpha}, and a finite number is meant; {ANEW}", file, where)
        try:
            re.compile(key)
        except re.error as error:
            raise UserError.of(f"`{key}` is no pattern of names ({error}); {ANEW}", file, where) from error
    return known


def in_pefts_names(tensors: Tensors, wishes: ExportWishes) -> Tensors:
    """Tensors as PEFT's files have them; where several modules are trained as one, after the name of each, since a file
    of PEFT is for one module."""
    several = len([part for part, names in wishes.parts.items() if names]) > 1
    return {
        f"{f'{part}.' if several else ''}base_model.model.{own}": tensors[name]
        for part, names in wishes.parts.items()
        for own, name in names.items()
        if name in tensors
    }
