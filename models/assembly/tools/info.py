"""What a file of weights is, from its header and the names and sizes of its tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from models.assembly.tools.model import TYPE
from models.foundation.checkpoints.headers import Header, opened, read_header
from models.foundation.checkpoints.recognition import owner_of_names
from utils import adapters
from utils.adapters.differences import ENDINGS as DIFFERENCES
from utils.adapters.kinds import ALPHA, DORA_SCALE, LAYOUT
from utils.adapters.lora import ENDINGS as OF_LORA
from utils.adapters.lora_factors import DOWN
from utils.adapters.magnitudes import MAGNITUDE
from utils.errors import UserError, printable
from utils.settings.choices import type_of

LAYOUTS = {
    "lora_unet_": "kohya's names, as ComfyUI reads them",
    "lora_te": "kohya's names, as ComfyUI reads them",
    "lora_transformer_": "OneTrainer's names",
    "lycoris_": "LyCORIS's names",
    "base_model.model.": "PEFT's names",
    "diffusion_model.": "the publisher's names, as ComfyUI reads them",
    "transformer.": "diffusers' names",
    "unet.": "diffusers' names",
    "text_encoder": "diffusers' names",
}
"""What the names of an adapter's tensors begin with -> whose names they are."""
RANKED = {DOWN: 0, "hada_w1_b": 0, "lokr_w2_b": 0, "lokr_w1_b": 0}
"""Parts of an adapter whose first dimension is the rank."""
LONGEST = 300
"""Letters of a value that are shown."""


def describe(path: Path) -> str:
    """What there is in a file, or in each file of a folder.

    Raises:
        UserError: there is no file of weights, or it is damaged.
    """
    if not path.exists():
        raise UserError.of("no such file or folder", str(path))
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    if not files:
        raise UserError.of("no safetensors file is in this folder", str(path))
    return "\n\n".join("\n".join(_lines(file)) for file in files)


def _lines(file: Path) -> Iterator[str]:
    header = read_header(file)
    with opened(file) as one:
        metadata = one.metadata() or {}
        dtypes = Counter(one.get_slice(key).get_dtype() for key in header.shapes)
        alphas = {
            key: one.get_tensor(key).float().item() for key in _ending(header, f".{ALPHA}") if not header.shapes[key]
        }
    yield str(file)
    size = file.stat().st_size / 2**20
    yield f"  size:      {size:.1f} MiB, {len(header.shapes)} tensors of {', '.join(dtypes)}"
    kinds = _kinds(header)
    yield f"  kind:      {', '.join(kinds) if kinds else 'weights of a model, no adapter'}"
    yield f"  model:     {_model(metadata, header)}"
    if kinds:
        yield f"  names:     {_names(header)}"
        yield from _of_adapter(header, metadata, alphas)
    for key in sorted(metadata):
        yield f"  {printable(key)} = {_shown(metadata[key])}"
    if not metadata:
        yield "  (no metadata)"


def _kinds(header: Header) -> list[str]:
    """What kinds of adapters it has, each with the number of its modules, and how many differences beside them."""
    found = []
    for kind in adapters.available().values():
        modules = {key[: -len(ending)] for ending in kind.endings for key in header.shapes if key.endswith(ending)}
        if modules:
            lengths = any(key.endswith(f".{DORA_SCALE}") or f".{MAGNITUDE}" in key for key in header.shapes)
            dora = " with DoRA" if type_of(kind.settings) == "lora" and lengths else ""
            found.append(f"{kind.name}{dora} of {len(modules)} modules")
    if whole := sum(key.endswith(tuple(DIFFERENCES)) for key in header.shapes):
        found.append(f"whole differences of {whole} parameters")
    return found


def _ending(header: Header, ending: str) -> list[str]:
    return [key for key in header.shapes if key.endswith(ending)]


def _names(header: Header) -> str:
    found = Counter(
        next((whose for beginning, whose in LAYOUTS.items() if key.startswith(beginning)), "other names")
        for key in header.shapes
    )
    return ", ".join(found)


def _model(metadata: Mapping[str, str], header: Header) -> str:
    said = [
        metadata[key]
        for key in (TYPE, "base_model", "modelspec.architecture", "ss_base_model_version")
        if key in metadata
    ]
    if said:
        return printable(", ".join(dict.fromkeys(said)))
    owner = owner_of_names(key.rpartition(".")[0] for key in header.shapes)
    return f"not said; by its names, {owner}" if owner else "not said, and not known by its names"


def _of_adapter(header: Header, metadata: Mapping[str, str], alphas: Mapping[str, float]) -> Iterator[str]:
    if ranks := list(_ranks(header)):
        yield f"  rank:      {_counted(ranks)}"
    if alphas:
        yield f"  alpha:     {_counted(list(alphas.values()))}"
    else:
        yield f"  alpha:     {metadata.get('alpha') or 'none in the file, which stands for the rank'}"
    if LAYOUT in metadata:
        yield f"  layout:    {printable(metadata[LAYOUT])}"


def _counted(values: Sequence[float]) -> str:
    """Values, with how often there is each if there are several."""
    counted = sorted(Counter(values).items())
    return ", ".join(f"{value:g} ({count} times)" if len(counted) > 1 else f"{value:g}" for value, count in counted)


def _ranks(header: Header) -> Iterator[int]:
    endings = {
        ending: part for kind in adapters.available().values() for ending, part in kind.endings.items()
    } | OF_LORA
    longest_first = sorted(endings, key=len, reverse=True)
    for key, shape in header.shapes.items():
        part = next((endings[ending] for ending in longest_first if key.endswith(ending)), None)
        if part in RANKED and shape:
            yield shape[RANKED[part]]


def _shown(text: str) -> str:
    """A value in one line, JSON's tables in a few words."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict) and len(text) > LONGEST:
        first = ", ".join(map(str, list(value)[:8]))
        return f"{{{printable(first)}{', ...' if len(value) > 8 else ''}}}, {len(text)} letters of JSON"
    shown = printable(text)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]} ... ({len(shown)} letters)"
