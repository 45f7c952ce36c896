"""What is trained in full beside an adapter: how its exports have it, and how it comes back from them.

ComfyUI's file has differences from the base, which ComfyUI adds. No program reads a whole weight in diffusers' file of
an adapter, so that a second one lies beside it for each part of the model, with its own names: as in
`pipeline.transformer.load_state_dict(load_file("trained_transformer.safetensors"), strict=False)`, before the adapter,
which gives the layers that it adapts other names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from utils.adapters import attach
from utils.adapters.differences import WholeUpdate, WholeValues
from utils.adapters.kinds import ADAPTER_FILE, COMFYUI_FILE, LAYOUT, AdapterFile, ExportWishes, Tensors, Update
from utils.errors import UserError

BESIDE = "trained_beside"
"""Where the header of an adapter's file names those beside it, as JSON."""
OF_PART = "trained_part"
"""Where the header of such a file says of which part of the model it is."""
ARCHITECTURE = "modelspec.architecture"
Files = Mapping[str, AdapterFile | str]


BEGINNING = "trained_"


def file_of(part: str) -> str:
    """The name of the file with what is trained in full of a part."""
    return f"{BEGINNING}{part}.safetensors"


def is_beside(name: str) -> bool:
    """Whether it is such a name."""
    return name.startswith(BEGINNING)


def beside_named(name: str, adapter: str) -> str:
    """What such a file is called beside an adapter's file with a name of its own."""
    return f"{Path(adapter).stem}_{name}"


def divided(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
    """What is exported, by name: the adapter's, and what is trained in full."""
    factors = {name: tensor for name, tensor in tensors.items() if attach.is_factor(name)}
    return factors, {name: tensor for name, tensor in tensors.items() if name not in factors}


def with_whole(files: Files, whole: Tensors, factors: Iterable[str], wishes: ExportWishes) -> Files:
    """The files of an adapter's export, with what is trained in full beside the adapter.

    Args:
        whole: its weights, by name.
        factors: the names of the adapter's factors.
        wishes: whose `parts` are those of `whole`.

    Raises:
        UserError: ComfyUI would take a part of it for another.
        ValueError: ComfyUI's layout has no place for a parameter.
    """
    made = dict(files)
    if "diffusers" in wishes.formats:
        beside = _by_part(whole, wishes)
        if ADAPTER_FILE in made:
            own = made[ADAPTER_FILE]
            made[ADAPTER_FILE] = replace(own, metadata={**own.metadata, BESIDE: json.dumps(sorted(beside))})
        made |= beside
    if COMFYUI_FILE in made:
        own = made[COMFYUI_FILE]
        _check_fused(whole, factors, wishes)
        made[COMFYUI_FILE] = replace(own, tensors={**own.tensors, **_differences(whole, wishes)})
    return made


def _by_part(whole: Tensors, wishes: ExportWishes) -> dict[str, AdapterFile]:
    found = {}
    for part, names in wishes.parts.items():
        own = {there: wishes.rounded(whole[name]) for there, name in names.items()}
        said = {**wishes.metadata, LAYOUT: "weights", OF_PART: part}
        if ARCHITECTURE in said:
            said[ARCHITECTURE] = said[ARCHITECTURE].removesuffix("/lora")
        if own:
            found[file_of(part)] = AdapterFile(own, said)
    return found


def _differences(whole: Tensors, wishes: ExportWishes) -> Tensors:
    """From the base as training had it, so that they are nothing where nothing was learned."""
    names = wishes.names
    changes = {
        name: value.float() - names.read(name).to(value.device, value.dtype).float() for name, value in whole.items()
    }
    # In float32, unless something else is asked for: 16 bits of a difference may give another weight of 16 bits.
    # float16 would lose small ones.
    dtype = wishes.dtype if wishes.dtype == torch.bfloat16 else torch.float32
    return {key: tensor.to(dtype) for key, tensor in names.layout.differences(changes, names.shapes).items()}


def _check_fused(whole: Tensors, factors: Iterable[str], wishes: ExportWishes) -> None:
    """Of a module in ComfyUI that is several of ours, a difference or an adapter counts, and not both."""
    adapted = {module for module in wishes.names.modules if any(name.startswith(f"{module}.") for name in factors)}
    for there, target in wishes.names.layout.targets(wishes.names.shapes):
        own = [name for name in (f"{module}.weight" for module in target.modules) if name in whole]
        other = next((module for module in target.modules if module in adapted), None)
        if own and other:
            raise UserError.of(
                f"names '{own[0]}', and '{other}' has an adapter; for ComfyUI both are one module, '{there}', of which "
                'it takes one or the other: name both, or neither, or set save_format = "diffusers"',
                where="[model] train",
            )


def beside(file: AdapterFile) -> Mapping[str, Path]:
    """The files with what was trained in full beside an adapter in diffusers' layout: by name.

    Raises:
        UserError: one is not there.
    """
    if file.path is None or BESIDE not in file.metadata:
        return {}
    try:
        names = json.loads(file.metadata[BESIDE])
        sound = isinstance(names, list) and all(isinstance(name, str) and Path(name).name == name for name in names)
    except ValueError:
        sound = False
    if not sound:
        raise UserError.of(f"`{BESIDE}` in its header is damaged; export it again", str(file.path))
    places = {name: _place(name, file.path) for name in names}
    if lost := [name for name, place in places.items() if not place.is_file()]:
        raise UserError.of(
            f"was trained together with weights in '{lost[0]}', which is not there; put it beside this file, or give "
            "the file for ComfyUI, which has both",
            str(file.path),
        )
    return places


def _place(name: str, adapter: Path) -> Path:
    """By the adapter's name, or by its own."""
    own = adapter.with_name(beside_named(name, adapter.name))
    return own if own.is_file() else adapter.with_name(name)


@torch.no_grad()
def load(denoiser: nn.Module, layers: Iterable[nn.Module], updates: Mapping[str, Update]) -> None:
    """Gives the parameters that `layers` hold what a file has for them, of those that are trained in full."""
    held = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for name, parameter in denoiser.named_parameters():
        update = updates.get(attach.base_name(name))
        if update is None or id(parameter) not in held:
            continue
        if isinstance(update, WholeValues):
            parameter.copy_(update.values)
        else:
            base = parameter.float()
            parameter.copy_((base + update.delta(base).to(base.device)).to(parameter.dtype))


def is_nothing(update: Update) -> bool:
    """Whether it changes nothing, as what a fused module's difference has for parts that were not trained."""
    return isinstance(update, WholeUpdate) and not update.values.any()
