"""The names of tensors in files of adapters, in the spellings of all programs.

A name is what a module is called, and an ending that says which tensor of an adapter it is: such as
`lora_unet_double_blocks_0_img_mlp_0` and `.lora_down.weight`. What a module is called is a prefix, and its name in
diffusers or in the files of the model's publisher, with dots or with _ for dots.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from utils import adapters
from utils.adapters.differences import ENDINGS as OF_DIFFERENCES
from utils.adapters.kinds import SHARED, AdapterFile, AdapterKind, Entry, ModelNames, Target, Tensors

PEFT_PREFIX = "base_model.model."
DOTTED = ("", "transformer.", "unet.", "diffusion_model.", "model.diffusion_model.")
# Two underlines: VideoX-Fun.
UNDERSCORED = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")
OF_PROCESSORS = ".processor."
"""What old versions of diffusers have within the names of attention's layers."""
TEXT_MODEL = "text_model."
"""What the names of a CLIP's modules begin with in most files, and not in all versions of transformers."""


@dataclass(frozen=True)
class Contents:
    """A file, taken apart.

    Attributes:
        entries: of modules that the model has, each with its kind; None for whole differences of weights.
        beside: names of modules that it has and that are not loaded.
        strangers: names of modules that it does not have.
        unread: names of tensors that belong to no kind of adapter that is known here.
    """

    entries: list[tuple[AdapterKind | None, Entry]] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def contents(file: AdapterFile, names: ModelNames) -> Contents:
    """What a file has for which module. Every tensor is in one of the lists."""
    tensors, unread = _by_module(file.tensors)
    spellings = Spellings(names)
    # Modules that diffusers and the publisher call by each other's names have those of the file's other modules.
    publishers = spellings.are_publishers(module for module, _ in tensors)
    found, beside = Contents(unread=unread), set(_modules_and_parameters(names.beside))
    for (module, kind), own in tensors.items():
        target = spellings.find(module, publishers)
        if target is None:
            found.strangers.append(module)
        elif beside.issuperset(target.modules):
            found.beside.append(module)
        else:
            found.entries.append((kind, Entry(module, target, own, file)))
    return found


def _by_module(tensors: Tensors) -> tuple[dict[tuple[str, AdapterKind | None], Tensors], list[str]]:
    """The tensors of each module and kind, and the names that have no known ending or none to which they belong."""
    known = {ending: (kind, part) for kind in adapters.available().values() for ending, part in kind.endings.items()}
    known |= {ending: (None, part) for ending, part in OF_DIFFERENCES.items()}
    endings = sorted([*known, *SHARED], key=len, reverse=True)
    found: dict[tuple[str, AdapterKind | None], Tensors] = {}
    shared, unread = {}, []
    once = {ending: kind for kind in adapters.available().values() for ending in kind.once}
    of_all: dict[str, AdapterKind] = {}
    for key, tensor in tensors.items():
        if owner := next((kind for ending, kind in once.items() if key.endswith(ending)), None):
            of_all[key] = owner
            continue
        ending = next((ending for ending in endings if key.endswith(ending)), None)
        module = key.removesuffix(ending or "")
        if ending in SHARED:
            shared[key] = (module, SHARED[ending], tensor)
            continue
        own = found.setdefault((module, known[ending][0]), {}) if ending else None
        if own is None or known[ending][1] in own:
            unread.append(key)
        else:
            own[known[ending][1]] = tensor
    for key, (module, part, tensor) in shared.items():
        owners = [own for (name, kind), own in found.items() if name == module and kind is not None]
        if len(owners) == 1:
            owners[0][part] = tensor
        else:
            unread.append(key)
    kinds = {kind for _, kind in found}
    return found, [*unread, *(key for key, kind in of_all.items() if kind not in kinds)]


class Spellings:
    """What a model's modules and parameters are called in files."""

    def __init__(self, names: ModelNames):
        self.names, self.has_parts = names, names.has_parts
        own = tuple(f"{prefix}{names.folder}." for prefix in ("", PEFT_PREFIX))
        after_peft = tuple(f"{PEFT_PREFIX}{prefix}" for prefix in DOTTED)
        before_peft = tuple(f"{part}.{PEFT_PREFIX}" for part in ("transformer", "unet", names.folder))
        self.dotted = (*own, *DOTTED, *after_peft, *before_peft)
        self.underscored = (*UNDERSCORED, f"lycoris_{names.folder.replace('.', '_')}_")
        # Name -> what it is in diffusers, and what it is in the publisher's files; one of them may be None.
        self.with_dots: dict[str, list[Target | None]] = {}
        self.with_lines: dict[str, list[Target | None]] = {}
        self.whole: dict[str, Target] = {}
        shapes = {**names.shapes, **names.beside}
        for name in _modules_and_parameters(shapes):
            self._add_own(name)
        for there, target in names.layout.targets(shapes) if names.layout else ():
            self._add(there, target, column=1)

    def find(self, name: str, publishers: bool) -> Target | None:
        """What a file's module is here; None if it is unknown.

        Args:
            publishers: whether names that diffusers and the publisher both have are the publisher's.
        """
        if name in self.whole:
            return self.whole[name]
        ours, theirs = self._columns(name)
        return theirs or ours if publishers else ours or theirs

    def are_publishers(self, names: Iterable[str]) -> bool:
        """Whether these names of a file are the publisher's and not diffusers', as far as they tell."""
        columns = [self._columns(name) for name in names]
        return any(ours is None and theirs for ours, theirs in columns) or not any(
            ours and theirs is None for ours, theirs in columns
        )

    def _columns(self, name: str) -> tuple[Target | None, Target | None]:
        plain = name.replace(OF_PROCESSORS, ".")
        for known, prefixes in ((self.with_dots, self.dotted), (self.with_lines, self.underscored)):
            for prefix in prefixes:
                rest = plain.removeprefix(prefix)
                # Old names of diffusers end before the number of the layer in a list of one.
                for spelled in (rest, f"{rest}.0", f"{rest}_0") if rest.endswith("to_out") else (rest,):
                    if plain.startswith(prefix) and spelled in known:
                        ours, theirs = known[spelled]
                        return ours, theirs
        return None, None

    def _add_own(self, name: str) -> None:
        part, _, rest = name.partition(".")
        if not self.has_parts:
            self._add(name, Target((name,)), column=0)
        elif part == self.names.folder:
            self._add(rest, Target((name,)), column=0)
        else:
            self._add_of_part(part, rest, Target((name,)))

    def _add(self, name: str, target: Target, column: int) -> None:
        for known, spelled in ((self.with_dots, name), (self.with_lines, name.replace(".", "_"))):
            known.setdefault(spelled, [None, None])[column] = target

    def _add_of_part(self, part: str, name: str, target: Target) -> None:
        """A module that is trained beside the denoiser, such as a text encoder's."""
        given = self.names.layout.part_prefixes.get(part, ()) if self.names.layout else ()
        without = name.removeprefix(TEXT_MODEL)
        for spelled in (without, f"{TEXT_MODEL}{without}"):
            for prefix in (f"{part}.", f"{PEFT_PREFIX}{part}.", f"{part}.{PEFT_PREFIX}", f"lycoris_{part}_", *given):
                self.whole[prefix + (spelled if prefix.endswith(".") else spelled.replace(".", "_"))] = target


def _modules_and_parameters(shapes: Mapping[str, object]) -> Iterator[str]:
    """Modules with parameters, and the parameters that are no weights of a module."""
    for name in shapes:
        module, _, own = name.rpartition(".")
        if own in ("weight", "bias"):
            yield module
        if own != "weight":
            yield name
