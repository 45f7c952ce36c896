"""Whole models: adapters merged into one, and an adapter that is the difference of two."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from models.assembly.exports import architecture_of, part_folders
from models.assembly.tools.adapters import Changes, Given, is_layer, read, tell_kept
from models.assembly.tools.low_rank import Cut, of_difference
from models.assembly.tools.model import Model
from models.assembly.tools.writing import Place, inherited, write_lora
from models.foundation.checkpoints.adapter_files import file_in, header_of
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.headers import read_header
from utils.adapters.kinds import COMFYUI, Tensors
from utils.errors import UserError
from utils.run.export import ExportPlan, write_files
from utils.run.tensor_file import write_tensors

logger = logging.getLogger(__name__)

PART_BYTES = 2 * 2**30


def merge_into_base(model: Model, given: Given, place: Place) -> None:
    """Writes the model with adapters added to its weights, as a full fine-tune is exported: a folder of diffusers and,
    where its names are known, ComfyUI's file. What is read at a time is two gigabytes; as much as the model takes is
    needed beside its place on the disk meanwhile.

    Raises:
        UserError: an adapter cannot be read, or is no one of this model.
    """
    changes = read(model, given)
    metadata = inherited([header_of(file_in(path)) for path, _ in given], model)
    metadata["modelspec.architecture"] = architecture_of(model.pipeline)
    layout = model.pipeline.original_layout
    plan = ExportPlan(
        adapter=None,
        names=None,
        dtype=None,
        formats=("diffusers", *([COMFYUI] if layout else [])),
        layouts={COMFYUI: layout.to_original} if layout else {},
        folders=part_folders(model.pipeline, model.denoiser),
    )
    parts = place.path.with_name(f"{place.path.name}.parts")
    parts.mkdir(parents=True)
    try:
        tensors: Tensors = {}
        for number, group in enumerate(_groups(_changed(model, changes, place.dtype))):
            write_tensors(parts / f"{number}.safetensors", group)
            # They are mapped, and not read.
            tensors |= load_file(parts / f"{number}.safetensors")
        place.path.mkdir(parents=True, exist_ok=True)
        write_files(place.path, tensors, plan, metadata, place.path.name)
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    logger.info("written: %s (%d of %d tensors are changed)", place.path, len(changes), len(tensors))
    if layout and model.pipeline.comfyui_note:
        logger.info(model.pipeline.comfyui_note)


def _changed(model: Model, changes: Changes, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the model, those that are changed in float32 meanwhile."""
    for name in model.names.shapes:
        values = model.source.read(name)
        kept = dtype or values.dtype
        if updates := changes.get(name, ()):
            values = values.float()
            for update, weight in updates:
                values = values + weight * update.delta(values).to(values.device)
        yield name, values.to(kept)
    for name, read_one in model.pipeline.weights.beside().items():
        values = read_one()
        yield name, values.to(dtype or values.dtype)


def _groups(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[Tensors]:
    group: Tensors = {}
    for name, tensor in tensors:
        group[name] = tensor
        if sum(one.nbytes for one in group.values()) >= PART_BYTES:
            yield group
            group = {}
    if group:
        yield group


def extract(model: Model, tuned: Path, place: Place, cut: Cut) -> None:
    """Writes the nearest LoRA to the difference of two checkpoints of a model, with that of the text encoders which a
    LoRA of this model may have, where both places have them. What a LoRA cannot have, and what is not compared, is
    told.

    Args:
        tuned: a file or folder of the trained denoiser's weights, a whole checkpoint, or a folder with parts, as an
            export is.

    Raises:
        UserError: the weights are no ones of this model, or are the same.
    """
    both = [part for part in model.texts_in(tuned) if part in model.texts_of_base()]
    model = model.training(both)
    after = model.with_weights(tuned)
    _tell_compared(after, tuned, both)
    pairs, kept, total, others = {}, 0.0, 0.0, []
    for name in model.names.shapes:
        difference = after.weight(name) - model.weight(name)
        if not difference.any():
            continue
        if not is_layer(model, name):
            others.append(name)
            continue
        pair, own, whole = of_difference(difference, cut)
        pairs[name.removesuffix(".weight")] = pair
        kept, total = kept + own, total + whole
    if not (pairs or others):
        raise UserError.of("has the same weights as the base: there is no difference", str(tuned))
    if others:
        logger.warning(
            "%d parameters differ that a LoRA does not change (norms, biases, tables), and are left out: %s%s",
            len(others),
            ", ".join(others[:5]),
            " ..." if len(others) > 5 else "",
        )
    tell_kept(pairs, kept, total)
    write_lora(model, pairs, place, inherited([], model))


def _tell_compared(after: Model, tuned: Path, texts: Sequence[TextPart]) -> None:
    """Names the parts of a place that are compared, and those that are not."""
    folder = after.pipeline.denoiser_folder
    compared = [folder, *(part.folder for part in texts)]
    if tuned.is_dir():
        parts = {path.name for path in tuned.iterdir() if path.is_dir()} if (tuned / folder).is_dir() else set()
        beside = sorted(parts - set(compared))
    else:
        keys, layout = read_header(tuned, with_gguf=True).files, after.pipeline.original_layout
        own = [layout.prefix(keys) if layout and layout.recognises(keys) else ""]
        own += [part.names.prefix for part in texts]
        beside = sorted({_group(key) for key in keys if not key.startswith(tuple(own))})
    if beside:
        logger.warning("of %s only %s is compared; not %s", tuned, ", ".join(compared), ", ".join(beside))


def _group(key: str) -> str:
    """The part of a whole checkpoint that a tensor belongs to: the beginning of its name."""
    return re.match(r"[^.]*(\.[a-z_]+\.\d+)?", key)[0]
