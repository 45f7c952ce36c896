"""The learning rate and the weight decay of each trained parameter, by its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch

from torch import nn

from models.base import BasePipeline
from utils.adapters import attach
from utils.adapters.magnitudes import MAGNITUDE
from utils.errors import Problem, UserError
from utils.settings.schema import PART_RATES, ParameterRule, Settings

FEED_FORWARD = re.compile(r"(.+_)?(ff|ffn|mlp|feed_forward)(_.+)?")
MODULATION = re.compile(r"(.+_)?(mod|modulation|adaln|adaln_modulation)|scale_shift_table", re.IGNORECASE)
ATTENTION = re.compile(r"attn\d?|self_attn|(self_)?attention")
TABLE = re.compile(r"emb|table|token")
"""What the parameters are called that are tables of positions, of modulation or of further tokens."""


class Rates:
    """Rates and decays by the settings, for parameters of a denoiser with its adapter, if it has one.

    The first that applies counts: a rule of `[optimizer]`, a rule of `[adapter]`, the rate of a part of the blocks,
    that of a part of the model (`unet_lr`), that of all. With `loraplus_lr_ratio` the second factors of a LoRA have a
    multiple of it (Hayou et al. 2024, "LoRA+").
    """

    def __init__(self, settings: Settings, pipeline: BasePipeline, denoiser: nn.Module) -> None:
        self._settings = settings.optimizer
        self._pipeline = pipeline
        self._part_rates = {key: rate for key in PART_RATES if (rate := getattr(settings.optimizer, key)) is not None}
        self._factor_of_second = getattr(settings.adapter, "loraplus_lr_ratio", None) or 1.0
        adapter = settings.adapter
        self._by_module = attach.rates_by_rule(denoiser, adapter) if adapter and adapter.rules else {}
        self._undecayed = frozenset(undecayed(denoiser))

    def lr(self, name: str) -> float:
        """The learning rate of a parameter."""
        second = self._factor_of_second if ".lora_B." in f".{name}." else 1.0
        return second * self._lr(name)

    def _lr(self, name: str) -> float:
        rule = self._rule(name)
        if rule is not None and rule.lr is not None:
            return rule.lr
        if name in self._by_module:
            return self._by_module[name]
        for key, rate in self._part_rates.items():
            if PARTS[key](self._pipeline, name):
                return rate
        own = self._pipeline.learning_rate(name)
        return self._settings.lr if own is None else own

    def weight_decay(self, name: str) -> float:
        """The weight decay of a parameter."""
        rule = self._rule(name)
        if rule is not None and rule.weight_decay is not None:
            return rule.weight_decay
        return 0.0 if name in self._undecayed else self._settings.weight_decay

    def _rule(self, name: str) -> ParameterRule | None:
        return next((rule for rule in self._settings.rules if _matches(rule, name)), None)

    def check(self, denoiser: nn.Module) -> None:
        """Whether every rule and every rate is used, of those of its parameters that are not frozen yet.

        Raises:
            UserError: lists what matches nothing, or freezes what cannot be frozen.
        """
        problems = list(self._problems([attach.base_name(name) for name in _trained(denoiser)]))
        if problems:
            raise UserError(problems)

    def check_alike(self, names: Iterable[str], optimizer_type: str) -> None:
        """Whether these parameters all have the same rate, as optimizers need it that find one for all.

        Raises:
            UserError: they do not; names one that differs.
        """
        rates = {name: self.lr(name) for name in names}
        other = next((name for name, rate in rates.items() if rate != self._settings.lr), None)
        if other is not None:
            raise UserError.of(
                f'"{optimizer_type}" finds one learning rate for all, and {other} has its own, {rates[other]:g}: leave '
                "that out, or take another optimizer",
                where="[optimizer] type",
            )

    def _problems(self, names: list[str]) -> Iterator[Problem]:
        taken = {id(self._rule(name)) for name in names}
        for number, rule in enumerate(self._settings.rules, start=1):
            place = f"[[optimizer.rules]] {number}"
            if not any(_matches(rule, name) for name in names):
                message = f'pattern "{rule.pattern}" matches nothing; the trained parameters are called like {names[0]}'
                yield Problem("", place, message)
            elif id(rule) not in taken:
                yield Problem("", place, f'all that pattern "{rule.pattern}" matches is matched by rules above it')
            if rule.lr is None and rule.weight_decay is None:
                yield Problem("", place, "says nothing; give it lr or weight_decay")
        for key in self._part_rates:
            if not any(PARTS[key](self._pipeline, name) for name in names):
                yield Problem("", f"[optimizer] {key}", "nothing that is trained belongs to this part; leave it out")
        frozen = [name for name in names if self.lr(name) == 0]
        if factor := next(filter(attach.is_factor, frozen), None):
            message = f"a rate of 0 freezes '{factor}'; leave it out of the adapter, by [adapter] exclude"
            yield Problem("", "[optimizer]", message)
        elif len(frozen) == len(names):
            yield Problem("", "[optimizer]", "its rates of 0 freeze all that would be trained")


def freeze(denoiser: nn.Module, rates: Rates) -> None:
    """Freezes the parameters whose rate is 0."""
    for name, parameter in _trained(denoiser).items():
        if rates.lr(attach.base_name(name)) == 0:
            parameter.requires_grad_(False)


def _trained(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}


def undecayed(denoiser: nn.Module) -> Iterator[str]:
    """Names of the parameters that weight decay is not for: it would pull a norm's scale from 1 to 0, and limits no
    growth that a bias or a looked-up vector could have."""
    for prefix, module in denoiser.named_modules():
        of_vectors = isinstance(module, nn.Embedding) or "Norm" in type(module).__name__
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            is_table = leaf != "weight" and not attach.is_factor(name) and TABLE.search(leaf)
            # The lengths of a convolution's rows have its dimensions.
            if of_vectors or parameter.ndim < 2 or is_table or MAGNITUDE in name:
                yield attach.base_name(name)


def _matches(rule: ParameterRule, name: str) -> bool:
    return fnmatch(name, f"*{rule.pattern}*")


def _is_in_blocks(pipeline: BasePipeline, name: str) -> bool:
    return attach.is_within(name, (*pipeline.blocks, *pipeline.convolutional_blocks))


def _attends(pipeline: BasePipeline, name: str, *, to_text: bool) -> bool:
    steps = name.split(".")
    crosses = any(step in pipeline.cross_attention for step in steps)
    if to_text or crosses:
        return to_text and crosses
    return any(ATTENTION.fullmatch(step) for step in steps)


def _feeds_forward(pipeline: BasePipeline, name: str) -> bool:
    return not _modulates(pipeline, name) and any(FEED_FORWARD.fullmatch(step) for step in name.split("."))


def _modulates(pipeline: BasePipeline, name: str) -> bool:
    steps = name.split(".")
    in_norm = any(
        "norm" in one and (other.startswith("linear") or MODULATION.fullmatch(other))
        for one, other in zip(steps, steps[1:], strict=False)
    )
    return in_norm or any(MODULATION.fullmatch(step) for step in steps)


def _in_blocks(belongs: Callable[[BasePipeline, str], bool]) -> Callable[[BasePipeline, str], bool]:
    return lambda pipeline, name: _is_in_blocks(pipeline, name) and belongs(pipeline, name)


PARTS: Mapping[str, Callable[[BasePipeline, str], bool]] = {
    "self_attn_lr": _in_blocks(lambda pipeline, name: _attends(pipeline, name, to_text=False)),
    "cross_attn_lr": _in_blocks(lambda pipeline, name: _attends(pipeline, name, to_text=True)),
    "mlp_lr": _in_blocks(_feeds_forward),
    "mod_lr": _in_blocks(_modulates),
}
"""Key of `[optimizer]` -> whether a parameter belongs to the part of a block that it is for."""
