"""What every kind of adapter does, each by the same tests; and one that a file adds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models.foundation.checkpoints.adapter_files import read_factors, read_updates
from tests.utils.adapters.toy_denoiser import BLOCKS, Denoiser, denoiser, factors, initialised
from utils import adapters
from utils.adapters import attach, presets
from utils.adapters.kinds import AdapterFile, ExportWishes, ModelNames
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.run.tensor_file import write_tensors
from utils.settings.model_schema import torch_dtype
from utils.settings.schema import AdapterSettings

FOLDER = "transformer"
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"rank": 2},
        {"rank": 3, "alpha": 1.5},
        {"rank": 4, "alpha": 4.0, "rslora": True},
        {"rank": 2, "dora": True},
    ],
    "lokr": [
        {"factor": 2},
        {"factor": 2, "rank": 1, "alpha": 0.5},
        {"rank": 1, "alpha": 3.0, "decompose_both": True},
        {"factor": 1, "rank": 2, "alpha": 1.0, "full_matrix": True},
    ],
    "loha": [{"rank": 2}, {"rank": 2, "alpha": 1.0}],
    "oft": [{}, {"block_size": 2}, {"block_size": 6, "butterfly": True}],
    "ia3": [{}],
    "vera": [{"rank": 2}, {"rank": 4, "d_initial": 0.5, "projection_prng_key": 3}],
    "difference": [{}],
}
ADDED = """
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from utils.adapters.kinds import ADAPTER, AdapterFile, WithoutMore, without_scale
from utils.settings.model_schema import torch_dtype
from utils.settings.schema import AdapterSettings


class DifferenceSettings(AdapterSettings):
    type: Literal["difference"]


class Moved(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.scaling, self.out_features = base_layer, {ADAPTER: 1.0}, base_layer.out_features
        self.diff_w = nn.Parameter(torch.empty(base_layer.weight.shape, device="meta"))

    def forward(self, x):
        result = self.base_layer(x)
        return result + x @ self.diff_w.to(x.dtype).T if self.scaling[ADAPTER] else result


class WholeUpdate:
    def __init__(self, weight):
        self.weight = weight

    @property
    def shape(self):
        return tuple(self.weight.shape)

    fits_beside = True

    def delta(self, base):
        return self.weight.float()

    def kept(self, weight):
        return (self.weight * weight,)

    @staticmethod
    def applied(x, kept):
        return x @ kept.T


class Difference(WithoutMore):
    settings, name, mark = DifferenceSettings, "Difference", ".diff_"
    endings = {".diff_w": "diff_w"}

    def put(self, denoiser, names, settings):
        for name in names:
            parent, _, own = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), own, Moved(denoiser.get_submodule(name)))

    def base_of(self, module):
        return module.base_layer if isinstance(module, Moved) else None

    def reset(self, module, dtype):
        module.diff_w = nn.Parameter(torch.zeros(module.diff_w.shape, dtype=dtype))

    def scale_of(self, module):
        return 1.0

    def switched_off(self, module):
        return without_scale(module)

    def factors(self, entry, names, scale_of):
        return {f"{entry.target.modules[0]}.diff_w": entry.tensors["diff_w"]}

    def updates(self, entry, names):
        return {entry.target.modules[0]: WholeUpdate(entry.tensors["diff_w"])}

    def to_files(self, factors, settings, wishes):
        named = {f"{wishes.names.folder}.{name}": tensor for name, tensor in factors.items()}
        return {"difference.safetensors": AdapterFile(named, wishes.metadata)}


KINDS = (Difference(),)
"""


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A further file of the folder."""
    place = tmp_path / "kinds"
    place.mkdir()
    (place / "difference.py").write_text(ADDED)
    monkeypatch.setattr(adapters, "__path__", [*adapters.__path__, str(place)])
    yield
    sys.modules.pop("utils.adapters.difference", None)


CASES = [(name, keys) for name, variants in VARIANTS.items() for keys in variants]
pytestmark = pytest.mark.usefixtures("added")
each = pytest.mark.parametrize(("name", "keys"), CASES, ids=[f"{name}{n}" for n, (name, _) in enumerate(CASES)])


def settings(name: str, keys: dict[str, Any], **further: Any) -> AdapterSettings:
    return adapters.find(name).settings(type=name, **keys, **further)


def moved(chosen: AdapterSettings) -> Denoiser:
    """A denoiser whose adapter has an effect."""
    adapted = initialised(chosen)
    with torch.no_grad():
        for name, factor in factors(adapted).items():
            factor.add_(normal(tuple(factor.shape), 0, "moved", name), alpha=0.3)
    return adapted


def names_of(module: nn.Module) -> ModelNames:
    return ModelNames(FOLDER, attach.adaptable(module), None, presets.base_shapes(module))


def inputs() -> torch.Tensor:
    return normal((5, 4), 0, "x")


def exported(adapted: Denoiser, chosen: AdapterSettings, folder: Path) -> Path:
    """The one safetensors file of an export."""
    tensors = {name: tensor.detach() for name, tensor in factors(adapted).items()}
    parts = {FOLDER: {name: name for name in tensors}}
    wishes = ExportWishes(("diffusers",), names_of(adapted), parts, {"step": "3"})
    files = adapters.find(chosen.type).to_files(tensors, chosen, wishes)
    folder.mkdir()
    for name, file in files.items():
        if isinstance(file, AdapterFile):
            assert file.metadata["step"] == "3"
            write_tensors(folder / name, file.tensors, dict(file.metadata))
        else:
            (folder / name).write_text(file)
    (file,) = folder.glob("*.safetensors")
    return file


def test_every_kind_is_tested() -> None:
    assert VARIANTS.keys() == adapters.available().keys()


@each
def test_factors_alone_are_trained_and_names_of_others_stay(name: str, keys: dict[str, Any]) -> None:
    adapted = denoiser()
    attach.attach(adapted, BLOCKS, settings(name, keys, exclude=["out"]))
    marked = {n for n, _ in adapted.named_parameters() if adapters.find(name).mark in n}
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == marked
    assert {n for n, _ in adapted.named_parameters() if attach.is_factor(n)} == marked
    assert all(factor.is_meta for factor in factors(adapted).values())
    others = {attach.base_name(n) for n, _ in adapted.named_parameters() if not attach.is_factor(n)}
    assert others == {n for n, _ in denoiser().named_parameters()}
    assert {n for n in attach.adapted(adapted)} == {
        f"{block}.{part}" for block in ("first_blocks.0", "blocks.0", "blocks.1") for part in ("to_q", "to_k")
    }
    assert attach.adaptable(adapted).keys() == attach.adaptable(denoiser()).keys()


@each
def test_the_base_of_an_adapted_module_is_found(name: str, keys: dict[str, Any]) -> None:
    plain = denoiser()
    bases = dict(plain.named_modules())
    attach.attach(plain, BLOCKS, settings(name, keys))
    for module_name, (kind, module) in attach.adapted(plain).items():
        assert kind is adapters.find(name)
        assert adapters.base_of(module) is bases[module_name]
    assert adapters.base_of(plain.embed) is plain.embed


@each
def test_at_first_it_has_no_effect(name: str, keys: dict[str, Any]) -> None:
    assert torch.equal(initialised(settings(name, keys))(inputs()), denoiser()(inputs()))


@each
def test_first_values_are_the_same_however_the_denoiser_is_cut(name: str, keys: dict[str, Any]) -> None:
    dtype = "float32" if "dora" in keys else "bfloat16"
    chosen = settings(name, keys, dtype=dtype)
    whole, cut = factors(initialised(chosen)), denoiser().to("meta")
    cut.blocks[1] = denoiser().blocks[1]
    attach.attach(cut, BLOCKS, chosen)
    torch.manual_seed(99)
    attach.initialise(cut, [cut.blocks[1]], chosen, seed=0)
    for factor_name, factor in factors(cut).items():
        assert factor.is_meta != factor_name.startswith("blocks.1."), factor_name
        assert factor.is_meta or torch.equal(factor, whole[factor_name]), factor_name
        assert factor.is_meta or factor.dtype == torch_dtype(dtype)


@each
def test_switched_off_it_has_no_effect_and_comes_back(name: str, keys: dict[str, Any]) -> None:
    adapted, plain = moved(settings(name, keys)), denoiser()(inputs())
    effect = adapted(inputs())
    with pytest.raises(KeyError), attach.switched_off(adapted):
        assert torch.equal(adapted(inputs()), plain)
        raise KeyError
    assert torch.equal(adapted(inputs()), effect)
    assert (effect - plain).abs().mean() > 1e-3


@each
def test_an_export_is_read_again(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    chosen = settings(name, keys)
    adapted = moved(chosen)
    file = exported(adapted, chosen, tmp_path / "out")
    names = list(load_file(file))
    assert adapters.recognised(names) is adapters.find(name)
    again = initialised(chosen)
    read = read_factors(file, adapters.find(name), names_of(again), attach.scales(again))
    attach.load(again, [again], read, str(file))
    for factor_name, factor in factors(adapted).items():
        # Of IA3 the distance from 1 is trained, and a file has the sum.
        atol = 1e-7 if name == "ia3" else 0
        torch.testing.assert_close(factors(again)[factor_name], factor, rtol=0, atol=atol, msg=factor_name)


@pytest.mark.parametrize(("name", "keys"), [case for case in CASES if "alpha" in case[1]])
def test_it_is_read_into_a_run_of_another_alpha(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    chosen = settings(name, keys)
    adapted = moved(chosen)
    file = exported(adapted, chosen, tmp_path / "out")
    again = initialised(settings(name, {**keys, "alpha": 7.0}))
    read = read_factors(file, adapters.find(name), names_of(again), attach.scales(again))
    attach.load(again, [again], read, str(file))
    torch.testing.assert_close(again(inputs()), adapted(inputs()), rtol=1e-4, atol=1e-5)


def fused(plain: nn.Module, updates: Any, weight: float) -> None:
    presets.fuse(plain, [plain], updates, weight)


def beside(plain: nn.Module, updates: Any, weight: float) -> None:
    if not all(update.fits_beside for update in updates.values()):
        with pytest.raises(UserError, match="in a form that only fits into weights"):
            presets.check_beside(plain, updates, "a test")
        pytest.skip("it is no sum")
    presets.check_beside(plain, updates, "a test")
    presets.attach_frozen(plain, [plain], updates, weight)


@each
@pytest.mark.parametrize("bring", [fused, beside])
def test_what_it_adds_to_weights_has_its_effect(
    name: str, keys: dict[str, Any], bring: Callable[..., None], tmp_path: Path
) -> None:
    """As one that is there before training, also on top of another one and under an adapter that is trained."""
    chosen = settings(name, keys)
    adapted = moved(chosen)
    file = exported(adapted, chosen, tmp_path / "out")
    for plain in (denoiser(), initialised(settings("lora", {"rank": 1})), initialised(settings("lokr", {}))):
        updates = read_updates(file, names_of(plain))
        weights = {f"{module}.weight" for module in attach.adapted(adapted)}
        biases = {f"{module}.bias" for module in attach.adapted(adapted)} if name == "ia3" else set()
        assert updates.keys() == weights | biases
        presets.check_fits(plain, updates, str(file))
        # What is no sum depends on the weight that it finds.
        for weight in (0.25, 0.75) if all(update.fits_beside for update in updates.values()) else (1.0,):
            bring(plain, updates, weight)
        torch.testing.assert_close(plain(inputs()), adapted(inputs()), rtol=1e-4, atol=1e-5)


@each
def test_a_file_of_another_kind_is_told(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    file = exported(moved(settings(name, keys)), settings(name, keys), tmp_path / "out")
    there = adapters.find(name).name
    for other in adapters.available().values():
        if other is not adapters.find(name):
            with pytest.raises(UserError, match=f"no {other.name} factors in this file, it is a {there}; give a"):
                read_factors(file, other, names_of(denoiser()), {})


def test_a_file_of_no_known_kind_is_told(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x.on_input": torch.ones(2)})
    write_tensors(tmp_path / "b.safetensors", {"x.weight": torch.ones(2)})
    for file, told in (("a", "it is a IA3 of LyCORIS"), ("b", "its first tensor is 'x.weight'")):
        with pytest.raises(UserError, match=told):
            read_updates(tmp_path / f"{file}.safetensors", names_of(denoiser()))


@each
def test_what_binds_a_checkpoint_is_a_key(name: str, keys: dict[str, Any]) -> None:
    chosen = settings(name, keys)
    assert {"type", "include", "exclude"} <= chosen.binding().keys() <= type(chosen).model_fields.keys()


def test_an_unknown_type_is_told() -> None:
    known = "'difference', 'ia3', 'loha', 'lokr', 'lora', 'oft', 'vera'"
    with pytest.raises(ValueError, match=f"no adapter is called 'lohx'; known: {known}"):
        adapters.find("lohx")
    choice = adapters.choice()
    assert choice.find("difference") is choice.classes["difference"]


@each
def test_float32_factors_multiply_in_the_type_of_their_input(name: str, keys: dict[str, Any]) -> None:
    """As factors that are rounded before; what is kept for the backward pass is of that type, the gradient is not."""
    adapted = moved(settings(name, keys))
    rounded = moved(settings(name, keys))
    for module, kind in ((adapted, torch.float32), (rounded, torch.bfloat16)):
        for parameter_name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(kind if attach.is_factor(parameter_name) else torch.bfloat16)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x_BD = normal((100, 4), 0, "x").bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = adapted(x_BD)
    expected = rounded(x_BD)
    assert distance(result, expected) < 0.02
    assert not [tensor.shape for tensor in kept if tensor.dtype == torch.float32 and len(tensor) == 100]
    result.float().square().mean().backward()
    expected.float().square().mean().backward()
    for factor, other in zip(factors(adapted).values(), factors(rounded).values(), strict=True):
        assert factor.grad is not None and factor.grad.dtype == torch.float32
        assert distance(factor.grad, other.grad) < 0.05


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    return ((one.float() - other.float()).abs().max() / other.float().abs().max()).item()


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "difference"])
@pytest.mark.parametrize("key", ["", "dropout", "rank_dropout", "module_dropout", "dylora_unit"])
def test_what_draws_random_numbers_in_training_says_so(name: str, key: str) -> None:
    """Else no seed would be set for it: a recomputed block would leave out something else in its second run, and no run
    would repeat another."""
    from utils.parallel.pipeline import draws_random_numbers

    settings = adapters.find(name).settings
    if key and key not in settings.model_fields:
        return
    drawn = {key: 1 if key == "dylora_unit" else 0.5} if key else {}
    adapted = initialised(settings(type=name, **{**VARIANTS[name][0], **drawn}))
    x = normal((5, 4), 0, "x")
    before = torch.get_rng_state()
    adapted(x)
    assert torch.equal(torch.get_rng_state(), before) is not bool(key)
    assert draws_random_numbers(adapted) is bool(key)
