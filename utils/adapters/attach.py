"""Attaches an adapter to a denoiser: the part that is common to all kinds of adapters.

Outside this folder a parameter has one name, without the additions of adapted modules (see `kinds.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch, fnmatchcase

import torch
from torch import nn

from utils import adapters
from utils.adapters import mixed
from utils.adapters.kinds import ADAPTER, AdapterKind
from utils.diffusion import seeds
from utils.errors import UserError
from utils.settings.model_schema import torch_dtype
from utils.settings.schema import AdapterSettings


def base_name(name: str) -> str:
    """A parameter's name without the additions of adapters, as in an adapter's file."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.", ".")


def is_factor(name: str) -> bool:
    """Whether a parameter with this name belongs to an adapter."""
    return any(kind.mark in name for kind in adapters.available().values())


def is_within(name: str, blocks: Sequence[str]) -> bool:
    """Whether a module lies in one of these lists of blocks, which may be patterns of names of lists."""
    return any(fnmatchcase(name, f"{block}.*") for block in blocks)


def targets(
    denoiser: nn.Module, blocks: Sequence[str], settings: AdapterSettings, in_full: Collection[str] = ()
) -> list[str]:
    """Names of the Linears, and of convolutions if requested, that lie in the denoiser's repeated blocks and pass the
    patterns.

    Args:
        blocks: names of lists of blocks, or patterns of such names.
        in_full: parameters that are trained themselves; an adapter of such a weight would be one thing twice.

    Raises:
        UserError: none is left.
    """
    kinds = (nn.Linear, nn.Conv2d) if settings.convolutions else nn.Linear
    modules = [
        name for name, module in denoiser.named_modules() if isinstance(module, kinds) and is_within(name, blocks)
    ]
    chosen = [name for name in modules if _chosen(denoiser, name, settings)]
    if not chosen:
        raise UserError.of(
            f"include = {settings.include}, exclude = {settings.exclude} leave nothing to adapt; the model's modules "
            f"are called like {modules[0]}",
            where="[adapter]",
        )
    left = [name for name in chosen if f"{name}.weight" not in in_full]
    if not left:
        raise UserError.of(
            f"has the weights of all {len(chosen)} modules that are to be adapted, so that no adapter is left; name "
            "fewer, or leave out [adapter]",
            where="[model] train",
        )
    return left


def _chosen(denoiser: nn.Module, name: str, settings: AdapterSettings) -> bool:
    included = not settings.include or any(matches(denoiser, name, pattern) for pattern in settings.include)
    return included and not any(matches(denoiser, name, pattern) for pattern in settings.exclude)


def matches(denoiser: nn.Module, name: str, pattern: str) -> bool:
    """Whether a glob pattern may match anywhere in a module's name, or is the class of a module around it."""
    if fnmatch(name, f"*{pattern}*"):
        return True
    parts = name.split(".")
    wholes = (denoiser.get_submodule(".".join(parts[:count])) for count in range(1, len(parts)))
    return any(fnmatchcase(type(whole).__name__, pattern) for whole in wholes)


def attach(
    denoiser: nn.Module,
    blocks: Sequence[str],
    settings: AdapterSettings,
    ranks: Mapping[str, int] | None = None,
    in_full: Collection[str] = (),
) -> None:
    """Freezes the denoiser and adds factors to its target modules, still without values (on the meta device).

    Args:
        ranks: module -> the rank of its update; modules without one are not adapted. Default: all targets, with the
            rank of the settings.
        in_full: names of parameters that are trained themselves, and not frozen.
    """
    names = targets(denoiser, blocks, settings, in_full)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(name in in_full)
    for own, chosen in by_rule(denoiser, names, settings):
        kind = adapters.find(chosen.type)
        if ranks is None:
            kind.put(denoiser, own, chosen)
            continue
        for rank in sorted(set(ranks.values())):
            of_rank = [name for name in own if ranks.get(name) == rank]
            kind.put(denoiser, of_rank, chosen.model_copy(update={"rank": rank}))
    # In their own type already, so that what they take can be counted.
    for name, parameter in denoiser.named_parameters():
        if is_factor(name):
            parameter.data = parameter.data.to(torch_dtype(settings.dtype))


def by_rule(
    denoiser: nn.Module, names: Sequence[str], settings: AdapterSettings
) -> list[tuple[list[str], AdapterSettings]]:
    """Modules that are adapted alike, each with the settings of its rule.

    Raises:
        UserError: a rule matches nothing, or nothing that no rule before it matches; or the rules leave nothing.
    """
    taken: list[list[str]] = [[] for _ in settings.rules]
    others, matched = [], set()
    for name in names:
        numbers = [number for number, rule in enumerate(settings.rules) if matches(denoiser, name, rule.pattern)]
        matched.update(numbers)
        (taken[numbers[0]] if numbers else others).append(name)
    for number, (rule, own) in enumerate(zip(settings.rules, taken, strict=True)):
        if not own:
            nothing = f"matches nothing; modules are called like {names[0]}"
            why = "matches only what rules above it match" if number in matched else nothing
            raise UserError.of(f'pattern "{rule.pattern}" {why}', where=f"[[adapter.rules]] {number + 1}")
    ruled = [
        (own, chosen)
        for rule, own, chosen in zip(settings.rules, taken, mixed.of_rules(settings), strict=True)
        if rule.rank != 0
    ]
    found = [(own, chosen) for own, chosen in [*ruled, (others, settings)] if own]
    if not found:
        raise UserError.of("the ranks of 0 leave nothing to adapt", where="[[adapter.rules]]")
    return found


def rates_by_rule(denoiser: nn.Module, settings: AdapterSettings) -> dict[str, float]:
    """The learning rates of the parameters for which a rule has one, by name."""
    rates = {}
    for name, (_, module) in adapted(denoiser).items():
        rule = next((rule for rule in settings.rules if matches(denoiser, name, rule.pattern)), None)
        if rule is not None and rule.lr is not None:
            own_names = (f"{name}.{own}" for own, _ in module.named_parameters())
            rates |= dict.fromkeys(map(base_name, filter(is_factor, own_names)), rule.lr)
    return rates


def adapted(denoiser: nn.Module) -> dict[str, tuple[AdapterKind, nn.Module]]:
    """The adapted modules by name, each with the kind of adapter that it has."""
    found = {name: (adapters.kind_of(module), module) for name, module in denoiser.named_modules()}
    return {name: (kind, module) for name, (kind, module) in found.items() if kind is not None}


def adaptable(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The modules for which an adapter may have been made, including adapted ones, by name; without the inner modules
    of adapted ones."""
    inner = tuple(f"{name}." for name in adapted(denoiser))
    return {
        name: module
        for name, module in denoiser.named_modules()
        if (hasattr(module, "out_features") or isinstance(module, nn.Conv2d)) and not name.startswith(inner)
    }


@contextmanager
def switched_off(denoiser: nn.Module) -> Iterator[None]:
    """A context in which the denoiser computes the same as without its adapter, bit for bit."""
    with ExitStack() as switches:
        for kind, module in adapted(denoiser).values():
            switches.enter_context(kind.switched_off(module))
        yield


@contextmanager
def at_strength(denoiser: nn.Module, strength: float) -> Iterator[None]:
    """A context in which what the adapter changes is multiplied by `strength`: 1 is as it is trained, and 0 the same as
    without it, bit for bit."""
    with ExitStack() as changed:
        for kind, module in adapted(denoiser).values() if strength != 1.0 else ():
            changed.enter_context(kind.at_strength(module, strength) if strength else kind.switched_off(module))
        yield


def initialise(denoiser: nn.Module, layers: Iterable[nn.Module], settings: AdapterSettings, seed: int) -> None:
    """Gives the factors in `layers` their first values, drawn from (seed, module name), so that they do
    not depend on how the denoiser is cut."""
    held = {id(module) for layer in layers for module in layer.modules()}
    dtype = torch_dtype(settings.dtype)
    for name, (kind, module) in adapted(denoiser).items():
        if id(module) in held:
            with torch.random.fork_rng(devices=[]):
                seeds.seed_devices(seeds.derive(seed, "adapter", name))
                kind.reset(module, dtype)


def scales(denoiser: nn.Module) -> dict[str, float]:
    """The scale of each adapted module, by name."""
    return {name: kind.scale_of(module) for name, (kind, module) in adapted(denoiser).items()}


def load(denoiser: nn.Module, layers: Iterable[nn.Module], tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Copies an adapter's factors, under our names, into those held by `layers`.

    Raises:
        UserError: a tensor has no counterpart, or another shape (another rank or another model).
    """
    parameters = {base_name(name): p for name, p in denoiser.named_parameters() if is_factor(name)}
    check_fits({name: tuple(p.shape) for name, p in parameters.items()}, tensors, source)
    held = {id(parameter) for layer in layers for parameter in layer.parameters()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if id(parameters[name]) in held:
                parameters[name].copy_(tensor)


def check_fits(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Whether an adapter's tensors fit this configuration; see `load`."""
    for name, tensor in tensors.items():
        if name not in shapes:
            raise UserError.of(
                f"'{name}' has no counterpart; this adapter was made for another model or other modules "
                "([adapter] include/exclude)",
                source,
            )
        if tuple(tensor.shape) != shapes[name]:
            raise UserError.of(
                f"'{name}' is {list(tensor.shape)}, this run's is {list(shapes[name])}; set [adapter] rank, and what "
                "else gives factors their size, to that of the file, or leave init_from_existing out",
                source,
            )
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise UserError.of(
            f"'{missing[0]}' and {len(missing) - 1} more are not in this adapter; adapt the same "
            "modules ([adapter] include/exclude)",
            source,
        )
