"""Every optimizer as the rest of the house meets it, and one that a file adds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimizers
from optimizers.saved_state import FORM, packed
from utils.errors import UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import Settings

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
LIBRARIES = ("bitsandbytes", "optimi", "prodigyplus", "pytorch_optimizer", "schedulefree", "transformers")
LR = 0.3
"""So much that bfloat16 shows a step that begins with a tenth of it."""
TYPES = list(permutations([torch.float32, torch.bfloat16, torch.float16], 2))
"""Of a parameter, before and after."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEYS: dict[str, list[dict[str, Any]]] = {
    "adamw": [{}, {"rounding": "kahan"}, {"rounding": "stochastic"}, {"rounding": "nearest"}],
    "sgd": [{}, {"momentum": 0.9}],
    "adafactor": [{}, {"beta1": 0.9}],
    "automagic": [{"min_lr": 0.1, "max_lr": 0.5, "lr_bump": 0.1}],
    "dadaptadagrad": [{"d0": 0.1}],
    "dadaptadam": [{"d0": 0.1}],
    "dadaptlion": [{"d0": 0.1}],
    "dadaptsgd": [{"d0": 10.0, "momentum": 0.5}],
    "genericoptim": [
        {"betas": (0.5, 0.9)},
        {"momentum_type": "none", "second_moment_type": "muon"},
        {"momentum_type": "none", "second_moment_type": "none"},
        {"momentum_type": "subspace", "second_moment_type": "subset_norm", "rank": 2, "update_proj_gap": 1},
        {"momentum_type": "subspace", "second_moment_type": "muon", "rank": 2, "proj_type": "topk"},
        {"momentum_type": "subspace", "second_moment_type": "adam", "rank": 2, "proj_type": "uniform"},
        {"momentum_type": "subspace", "second_moment_type": "subset_norm", "subset_size": 7, "proj_type": "srht"},
    ],
    "prodigy": [{"d0": 0.1}, {"d0": 0.1, "slice_p": 3}],
    "prodigy_plus_schedule_free": [{"d0": 0.5}, {"d0": 0.5, "use_schedulefree": False, "factored": False}],
    "radam_schedule_free": [{"silent_sgd_phase": False}],
    "soap": [{"eps": 1e-3}],
}
"""Keys by which an optimizer's state differs, or with which it begins at once."""
CASES = [(name, keys) for name in optimizers.available() for keys in KEYS.get(name, [{}])]
# bitsandbytes keeps small parameters in 32 bits, and has a scale for each block of 256 elements of others.
SHAPES = [(3, 5), (64, 64), (70, 59), (16, 3, 3, 3), (7,), ()]
ADDED = """
from typing import Literal

import torch

from optimizers.kinds import OptimizerKind
from utils.settings.schema import OptimizerSettings
from utils.settings.values import Positive


class RpropSettings(OptimizerSettings):
    type: Literal["rprop"]
    largest_step: Positive = 50.0


def build(groups, lr, weight_decay, largest_step):
    return torch.optim.Rprop(groups, lr=lr, step_sizes=(1e-6, largest_step))


def retyped(parameter, value, state):
    return {key: kept.to(parameter.dtype) for key, kept in state.items()}


def state_bytes(settings, parameter):
    return 2 * parameter.nbytes


KINDS = (OptimizerKind(RpropSettings, build, state_bytes, {"cuda": "stays home"}, retyped),)
"""


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A further file of the folder."""
    (tmp_path / "rprop.py").write_text(ADDED)
    monkeypatch.setattr(optimizers, "__path__", [*optimizers.__path__, str(tmp_path)])
    yield
    sys.modules.pop("optimizers.rprop", None)


def takes_room(key: str, tensor: torch.Tensor) -> bool:
    """Whether it is no count of steps, which is on the CPU, and none of bitsandbytes' tables of 8-bit numbers, which
    are the same for all parameters."""
    return tensor.dtype != torch.int64 and key != "step" and "qmap" not in key and not key.endswith(FORM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "keys"), CASES)
def test_state_takes_what_is_said(name: str, keys: dict[str, Any], dtype: torch.dtype) -> None:
    kind = optimizers.find(name)
    settings = kind.settings(type=name, lr=LR, **keys)
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype, device=DEVICE)) for shape in SHAPES]
    optimizer = optimizers.made([{"params": parameters}], settings)
    for _ in range(2):
        # SOAP's first step moves nothing.
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    for parameter in parameters:
        tensors = {
            name: one for key, value in optimizer.state[parameter].items() for name, one in packed(key, value).items()
        }
        kept = sum(tensor.nbytes for key, tensor in tensors.items() if takes_room(key, tensor))
        assert optimizers.state_bytes(settings, parameter) == kept, tuple(parameter.shape)
        assert parameter.float().mean() < 1


@pytest.mark.parametrize(("old", "new"), TYPES, ids=str)
# A way of rounding changes what there is at its next step: see test_rounding.
@pytest.mark.parametrize(("name", "keys"), [case for case in CASES if "rounding" not in case[1]])
def test_state_follows_the_type_of_its_parameter(
    name: str, keys: dict[str, Any], old: torch.dtype, new: torch.dtype
) -> None:
    """It is of the types and sizes that it would have had from the start, and another step moves the parameter."""
    kind = optimizers.find(name)
    settings = kind.settings(type=name, lr=LR, **keys)

    def stepped(dtype: torch.dtype) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        parameters = [nn.Parameter(torch.ones(shape, dtype=dtype, device=DEVICE)) for shape in SHAPES]
        optimizer = optimizers.made([{"params": parameters}], settings)
        step(optimizer, parameters)
        return optimizer, parameters

    def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()

    def types(state: dict[str, Any]) -> dict[str, Any]:
        return {key: getattr(value, "dtype", type(value)) for key, value in state.items()}

    (before, was), (after, now) = stepped(old), stepped(new)
    for first, second in zip(was, now, strict=True):
        expected = types(after.state[second])
        after.state[second] = kind.retyped(second, first.detach().float(), before.state[first])
        assert types(after.state[second]) == expected
    values = [parameter.detach().clone() for parameter in now]
    step(after, now)
    # SOAP moves weights in directions of its own.
    means = [(parameter.float().mean(), value.float().mean()) for parameter, value in zip(now, values, strict=True)]
    assert all(after < before for after, before in means)


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("automagic", {"lr": 0.1}, r"\[optimizer\] lr.*0.1 must be from min_lr, 1e-07, to max_lr, 0.001"),
        ("adafactor", {"lr": 0.1, "warmup_init": True}, r"\[optimizer\] warmup_init.*relative_step = true"),
    ],
)
def test_keys_that_do_not_go_together_are_told(name: str, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        optimizers.check(optimizers.find(name).settings(type=name, **keys), "cpu")


@pytest.mark.parametrize("name", optimizers.available())
def test_a_device_that_does_not_do_is_told(name: str) -> None:
    kind = optimizers.find(name)
    settings = kind.settings(type=name, lr=1e-4)
    for device in ("cpu", "cuda"):
        if device in kind.not_on:
            with pytest.raises(UserError, match=rf'\[optimizer\] type.*"{name}" {kind.not_on[device]}'):
                optimizers.check(settings, device)
        else:
            optimizers.check(settings, device)


def test_types_are_found_in_any_case_and_unknown_ones_told() -> None:
    assert optimizers.find("AdamW8bit") is optimizers.find("adamw8bit")
    assert optimizers.find("optimi-lion") is optimizers.find("lion")
    assert optimizers.find("AdamWScheduleFree") is optimizers.find("adamw_schedule_free")
    with pytest.raises(ValueError, match='no optimizer is called "AdamX"; known: .*adamw, .*sgd'):
        optimizers.find("AdamX")


def test_importing_all_optimizers_imports_no_third_partys() -> None:
    optimizers.available()
    for name, module in list(sys.modules.items()):
        if name.startswith("optimizers."):
            names = [
                getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in vars(module).values()
            ]
            assert not any(name.partition(".")[0] in LIBRARIES for name in names), name


def test_a_file_adds_an_optimizer(added: None) -> None:
    names = list(optimizers.available())
    assert "rprop" in names and names.index("adamw") < names.index("rprop") < names.index("sgd")
    choice = optimizers.choice()
    settings = choice.find("Rprop")(type="rprop", lr=0.1, largest_step=2.0)
    assert choice.classes["rprop"] is type(settings)
    weight = nn.Parameter(torch.ones(3))
    assert optimizers.state_bytes(settings, weight) == 24
    optimizers.check(settings, "cpu")
    with pytest.raises(UserError, match="stays home"):
        optimizers.check(settings, "cuda")
    if DEVICE == "cpu":
        optimizer = optimizers.build([{"params": [weight]}], settings)
        assert optimizer.param_groups[0]["step_sizes"] == (1e-6, 2.0)


def test_what_a_file_added_is_gone_with_it() -> None:
    assert "rprop" not in optimizers.available()


@pytest.mark.parametrize(("name", "keys"), CASES)
def test_parameters_that_are_stepped_one_by_one_go_where_they_go_together(name: str, keys: dict[str, Any]) -> None:
    """Where `gradient_release` does so. Those that average or sum are refused without being tried."""
    kind, ends = optimizers.find(name), []
    for alone in (False, True):
        draw = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
        optimizer = optimizers.made([{"params": parameters}], kind.settings(type=name, lr=LR, **keys))
        for _ in range(3):
            gradients = [torch.randn(parameter.shape, generator=draw) for parameter in parameters]
            pairs = list(zip(parameters, gradients, strict=True))
            for some in [[pair] for pair in pairs] if alone else [pairs]:
                for parameter, gradient in some:
                    parameter.grad = gradient
                optimizer.step()
                optimizer.zero_grad()
        ends.append(parameters)
    same = all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert same if kind.steps_alone else not same or kind.averages or kind.sums


def test_an_optimizer_that_steps_all_together_releases_no_gradients() -> None:
    def settings(name: str) -> Settings:
        optimizer = {"type": name, "lr": 1e-3, "gradient_release": True}
        chosen = optimizers.find(name).settings(**optimizer)
        return Settings(output_dir="a", dataset="b", model=ModelSettings(type="flux"), optimizer=chosen)

    optimizers.check_steps(settings("adamw"))
    with pytest.raises(UserError, match=r"\[optimizer\] gradient_release: .soap. has to step all .* one of .*adamw, "):
        optimizers.check_steps(settings("soap"))


KEEPS = ("master", "kahan_comp", "compensation")


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        *((name, {}) for name in optimizers.available()),
        *(("adamw", {"rounding": rounding}) for rounding in ("kahan", "stochastic", "nearest")),
        ("prodigy_plus_schedule_free", {"stochastic_rounding": False}),
        ("torch.optim.Adamax", {}),
    ],
)
def test_what_loses_small_steps_says_so(name: str, keys: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """By many steps of which each is less than half of what bfloat16 tells apart."""
    kind = optimizers.find(name)
    # Those that find their rate begin with one of 1e-6.
    settings = kind.settings(type=name, lr=1.0 if kind.sums else 1e-5, weight_decay=0.0, **keys)
    weight = nn.Parameter(torch.ones(64, 80, dtype=torch.bfloat16))
    optimizer = optimizers.made([{"params": [weight]}], settings)
    for _ in range(30):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    state = optimizer.state[weight]
    kept = [key for key in KEEPS if key in state and not torch.equal(state[key].float(), weight.float())]
    moved = bool((weight != 1).any()) or any(bool(state[key].any()) for key in kept)
    assert moved != kind.loses_small_steps(settings)
    optimizers.warn_of_lost_steps(settings, {"a": weight, "b": nn.Parameter(torch.ones(3))})
    assert ('"a" first' in caplog.text and "1 of 2 trained tensors" in caplog.text) != moved
    caplog.clear()
    optimizers.warn_of_lost_steps(settings, {"b": nn.Parameter(torch.ones(3))})
    assert not caplog.text
