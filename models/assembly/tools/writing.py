"""Writes what the tools have made: adapters in the layouts of all programs, and whole models."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from models.assembly.exports import architecture_of, part_folders
from models.assembly.tools.low_rank import Pair
from models.assembly.tools.model import TYPE, Model
from utils import adapters
from utils.adapters.kinds import ADAPTER, ADAPTER_FILE, COMFYUI, LAYOUT, AdapterFile, ExportWishes, Tensors
from utils.adapters.lora import A, B, LoraSettings, in_lycoris_names
from utils.adapters.lora_factors import FOLDED_SCALE, FOLDED_SCALES
from utils.adapters.peft_settings import HEADER, in_pefts_names
from utils.errors import UserError
from utils.run.durable import write_bytes
from utils.run.export_metadata import FINISHED, of_file
from utils.run.tensor_file import write_tensors

logger = logging.getLogger(__name__)

LAYOUTS = ("diffusers", COMFYUI, "peft", "lycoris")
OTHER_NAMES = {"kohya": COMFYUI}
"""What else a layout is called: ComfyUI reads kohya's names."""
ENDING = ".safetensors"
OF_ONE_FILE = frozenset(
    {HEADER, FOLDED_SCALE, FOLDED_SCALES, LAYOUT, "rank", "alpha", "format", "weights", "ss_output_name"}
    | {f"ss_network_{key}" for key in ("dim", "alpha", "args", "module")}
    | {
        "modelspec.hash_sha256",
        "modelspec.title",
        "modelspec.date",
        "modelspec.implementation",
        "modelspec.merged_from",
    }
    | {"sshs_model_hash", "sshs_legacy_hash"}
)
"""Keys of headers that say something of a file which is not so of what is made of it."""
OF_ONE_TRAINING = frozenset({"step", "ss_steps", "ss_epoch", FINISHED})
"""Keys that say nothing of what is made of several."""


@dataclass(frozen=True)
class Standing:
    """Stands for an adapted module where its scale is asked for, which is 1: it is in the factors."""

    scaling: Mapping[str, float] = field(default_factory=lambda: {ADAPTER: 1.0})
    lora_magnitude_vector: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where something is written, and how.

    Attributes:
        path: a file, if it ends in `.safetensors`; otherwise a folder, for files with the usual names.
        layout: one of `LAYOUTS`.
        dtype: of what is written; None for float32, or that of the weights.
    """

    path: Path
    layout: str = "diffusers"
    dtype: torch.dtype | None = None

    @property
    def is_file(self) -> bool:
        return self.path.suffix == ENDING

    def check(self) -> None:
        """Whether there is nothing yet, so that nothing is lost.

        Raises:
            UserError: there is.
        """
        if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
            raise UserError.of("is there already; name another place, or remove it", str(self.path), "--out")

    def file(self, usual: str) -> Path:
        """The path for a file with this usual name, in a folder that is made."""
        path = self.path if self.is_file else self.path / usual
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def write_lora(model: Model, pairs: Mapping[str, Pair], place: Place, metadata: Mapping[str, str]) -> None:
    """Writes a LoRA.

    Args:
        pairs: module -> its factors, without a further scale.

    Raises:
        UserError: there is nothing to write, or the layout has no place for a module.
    """
    if not pairs:
        raise UserError.of("nothing is left to write: there are no updates of layers", where="the adapter")
    factors: Tensors = {}
    for module, pair in pairs.items():
        factors |= {f"{module}{A}": pair.down, f"{module}{B}": pair.up}
    settings = LoraSettings(type="lora", rank=max(len(pair.down) for pair in pairs.values()))
    write_factors(model, "lora", factors, settings, place, metadata)


def write_factors(
    model: Model,
    kind: str,
    factors: Tensors,
    settings: Any,
    place: Place,
    metadata: Mapping[str, str],
    standing: Mapping[str, Standing] | None = None,
) -> None:
    """Writes an adapter of any kind by its factors.

    Args:
        standing: module -> what stands for it; default: one of scale 1.

    Raises:
        UserError: the layout has no place for it.
    """
    found, modules = adapters.find(kind), standing or dict.fromkeys(model.names.modules, Standing())
    # What PEFT is told is what diffusers is told too.
    formats = (COMFYUI,) if place.layout == COMFYUI else ("diffusers",)
    check_layout(model, kind, place.layout)
    parts = {part.name: part.own(factors) for part in part_folders(model.pipeline, model.denoiser)}
    wishes = ExportWishes(formats, replace(model.names, modules=modules), parts, metadata, place.dtype)
    try:
        files = found.to_files(factors, settings, wishes)
    except ValueError as error:
        raise UserError.of(str(error), where=f"--layout {place.layout}") from error
    if kind == "lora" and place.layout in ("peft", "lycoris"):
        in_names = in_pefts_names if place.layout == "peft" else in_lycoris_names
        rounded = {name: wishes.rounded(tensor) for name, tensor in factors.items()}
        ours = {key: text for key, text in files[ADAPTER_FILE].metadata.items() if key != HEADER}
        files[ADAPTER_FILE] = AdapterFile(in_names(rounded, wishes), ours)
    for name, file in files.items():
        if isinstance(file, AdapterFile):
            _write(place, name, file)
        elif place.layout == "peft" or not place.is_file:
            write_bytes(place.file(name).with_name(name), file.encode())


def check_layout(model: Model, kind: str, layout: str) -> None:
    """Whether an adapter of this kind can be written in this layout.

    Raises:
        UserError: it cannot.
    """
    found = adapters.find(kind)
    if layout == COMFYUI and (model.names.layout is None or COMFYUI not in found.formats):
        what = "such an adapter" if model.names.layout else "this model"
        raise UserError.of(f"ComfyUI's names for {what} are not known; take another", where="--layout comfyui")
    of_lycoris = found.read_by.startswith("diffusers itself reads no such adapter, LyCORIS")
    if (layout == "peft" and of_lycoris) or (layout == "lycoris" and kind == "ia3"):
        raise UserError.of(f"{found.name} is not written in this layout; take diffusers", where=f"--layout {layout}")


def _write(place: Place, name: str, file: AdapterFile) -> None:
    path = place.file(name)
    header = of_file(file.metadata, file.tensors, layout=place.layout, title=path.stem, stem=path.stem)
    write_tensors(path, file.tensors, header | {"format": "pt"})
    logger.info("written: %s (%d tensors)", path, len(file.tensors))


def inherited(headers: Iterable[Mapping[str, str]], model: Model) -> dict[str, str]:
    """What the header of something says that is made of files with these headers: that in which they agree, of which
    they are made, and the words that call up one of them.

    Raises:
        UserError: they are of models of different types.
    """
    headers = list(headers)
    types = {header[TYPE] for header in headers if TYPE in header} | {model.pipeline.options.type}
    if len(types) > 1:
        raise UserError.of(
            f"the headers say that they are of different types: {', '.join(sorted(types))}", where="files"
        )
    left_out = OF_ONE_FILE | (OF_ONE_TRAINING if len(headers) > 1 else frozenset())
    same = {
        key: text
        for key, text in (headers[0] if headers else {}).items()
        if key not in left_out and all(header.get(key) == text for header in headers)
    }
    merged = (
        [header["modelspec.title"] for header in headers if header.get("modelspec.title")] if len(headers) > 1 else []
    )
    architecture = architecture_of(model.pipeline)
    words = dict.fromkeys(word for word in _phrases(headers) if word)
    return {
        **same,
        **({"modelspec.merged_from": ", ".join(merged)} if merged else {}),
        **({"modelspec.trigger_phrase": ", ".join(words)} if words else {}),
        "modelspec.architecture": f"{architecture}/lora",
        TYPE: model.pipeline.options.type,
        "made_with": "penstock",
    }


def _phrases(headers: Iterable[Mapping[str, str]]) -> Iterator[str]:
    for header in headers:
        yield from header.get("modelspec.trigger_phrase", "").split(", ")
