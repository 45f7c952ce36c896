"""VeRA: as PEFT has it; its matrices, which all modules share; files that do not go together with a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from models.foundation.checkpoints.adapter_files import read_factors, read_updates
from tests.utils.adapters.test_kinds import exported, inputs, moved, names_of
from tests.utils.adapters.toy_denoiser import BLOCKS, denoiser, factors, initialised
from utils import adapters
from utils.adapters import attach, presets
from utils.adapters.kinds import ADAPTER_FILE, ExportWishes, ModelNames
from utils.adapters.vera import VeraLayer, VeraSettings
from utils.errors import UserError
from utils.quantised.formats import FORMATS
from utils.quantised.linear import quantise
from utils.settings.model_schema import ModelSettings


def vera(**keys: Any) -> VeraSettings:
    return VeraSettings(**{"type": "vera", "rank": 3, **keys})


def test_peft_draws_and_computes_the_same(tmp_path: Path) -> None:
    """From the file, and by itself of the same key."""
    adapted = moved(vera(projection_prng_key=5))
    exported(adapted, vera(projection_prng_key=5), tmp_path / "out")
    theirs = PeftModel.from_pretrained(denoiser(), tmp_path / "out").eval()
    torch.testing.assert_close(theirs(inputs()), adapted(inputs()), rtol=1e-4, atol=1e-6)
    config = VeraConfig(r=3, target_modules=["to_q", "to_k", "out"], projection_prng_key=5)
    fresh = get_peft_model(denoiser(), config)
    shared = next(module.projections for module in adapted.modules() if isinstance(module, VeraLayer))
    for name in ("vera_A", "vera_B"):
        assert torch.equal(getattr(fresh.base_model, name)["default"], shared.get_buffer(name))


def test_files_of_peft_are_gone_on_from_and_are_presets(tmp_path: Path) -> None:
    theirs = get_peft_model(denoiser(), VeraConfig(r=3, target_modules=["to_q", "to_k", "out"], projection_prng_key=1))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "vera_lambda" in name:
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    theirs.save_pretrained(tmp_path)
    expected = theirs(inputs())
    again = initialised(vera(projection_prng_key=1))
    read = read_factors(tmp_path, adapters.find("vera"), names_of(again), attach.scales(again))
    attach.load(again, [again], read, "a test")
    torch.testing.assert_close(again(inputs()), expected, rtol=1e-4, atol=1e-6)
    plain = denoiser()
    presets.fuse(plain, [plain], read_updates(tmp_path, names_of(plain)), 1.0)
    torch.testing.assert_close(plain(inputs()), expected, rtol=1e-4, atol=1e-5)


def test_matrices_are_one_for_all_and_no_part_of_what_is_saved() -> None:
    adapted = initialised(vera(rules=[{"pattern": "to_q", "dropout": 0.5}]))
    layers = [module for module in adapted.modules() if isinstance(module, VeraLayer)]
    assert len(layers) == 9 and len({id(layer.projections) for layer in layers}) == 1
    adapted.to(torch.float64)
    assert len({layer.projections.vera_A.data_ptr() for layer in layers}) == 1
    assert not any("vera_A" in name for name in adapted.state_dict())
    assert {name.rpartition(".")[2] for name in factors(adapted)} == {"vera_lambda_d", "vera_lambda_b"}


def test_sizes_are_those_of_the_largest_module(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5))])

    def made() -> Two:
        torch.manual_seed(0)
        return Two()

    adapted, chosen = made(), vera(rules=[{"pattern": "0.1", "dropout": 0.1}])
    attach.attach(adapted, ["blocks"], chosen)
    attach.initialise(adapted, [adapted], chosen, 0)
    with torch.no_grad():
        for factor in factors(adapted).values():
            factor.copy_(torch.linspace(-1, 1, len(factor)))
    tensors = load_file(exported(adapted, chosen, tmp_path / "out"))
    assert (tensors["base_model.vera_A"].shape, tensors["base_model.vera_B"].shape) == ((3, 8), (8, 3))
    x = torch.randn(2, 4)
    theirs = PeftModel.from_pretrained(made(), tmp_path / "out").base_model.model.blocks[0].eval()
    torch.testing.assert_close(theirs(x), adapted.eval().blocks[0](x), rtol=1e-4, atol=1e-5)
    updates = read_updates(tmp_path / "out", names_of(made()))
    plain = made()
    presets.fuse(plain, [plain], updates, 1.0)
    torch.testing.assert_close(plain.blocks[0](x), adapted.eval().blocks[0](x), rtol=1e-4, atol=1e-5)


def test_each_of_several_parts_has_matrices_of_its_own_size(tmp_path: Path) -> None:
    """In one file, of which PEFT takes one part at a time."""
    model = nn.ModuleDict({"unet": nn.Sequential(nn.Linear(4, 8)), "text_encoder": nn.Sequential(nn.Linear(3, 5))})
    attach.attach(model, ["*"], chosen := vera())
    attach.initialise(model, [model], chosen, 0)
    tensors = {name: torch.linspace(-1, 1, len(factor)) for name, factor in factors(model).items()}
    names = ModelNames("unet", attach.adaptable(model), None, presets.base_shapes(model))
    parts = {part: {name.removeprefix(f"{part}."): name for name in tensors if name.startswith(part)} for part in model}
    files = adapters.find("vera").to_files(tensors, chosen, ExportWishes(("diffusers",), names, parts, {}))
    made = files[ADAPTER_FILE].tensors
    assert made["unet.base_model.vera_A"].shape == (3, 4) and made["unet.base_model.vera_B"].shape == (8, 3)
    assert made["text_encoder.base_model.vera_B"].shape == (5, 3)
    save_file(made, tmp_path / ADAPTER_FILE)
    read = read_factors(tmp_path / ADAPTER_FILE, adapters.find("vera"), names, {})
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in read)


def test_on_a_quantised_base() -> None:
    plain = denoiser()
    quantise(plain, ["blocks.0.to_q"], FORMATS["int8"])
    plain.blocks[0].to_q.fill(denoiser().blocks[0].to_q.weight)
    before = plain(inputs())
    attach.attach(plain, BLOCKS, vera())
    attach.initialise(plain, [plain], vera(), 0)
    assert torch.equal(plain(inputs()), before)
    plain(inputs()).square().sum().backward()
    assert plain.blocks[0].to_q.vera_lambda_b.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"projection_prng_key": 1}, "the matrices that its modules share are other ones than this run's"),
        ({"rank": 2}, "the matrices that its modules share are other ones than this run's"),
    ],
)
def test_other_matrices_are_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = exported(moved(vera()), vera(), tmp_path / "out")
    again = initialised(vera(**keys))
    with pytest.raises(UserError, match=words):
        read_factors(file, adapters.find("vera"), names_of(again), {})


def test_damaged_files_are_told(tmp_path: Path) -> None:
    tensors = load_file(exported(moved(vera()), vera(), tmp_path / "out"))
    module = "base_model.model.blocks.0.to_q"
    cases: dict[str, dict[str, Any]] = {
        "the file has no vera_B": {"base_model.vera_B": None},
        ".2, 6. and .6, 3., do not fit 'base_model.model.*', .6, 6., with 3 ranks": {
            "base_model.vera_A": torch.ones(2, 6)
        },
        "the vera_lambda_b of the VeRA .* is .5., and the module is .6, 6.": {f"{module}.vera_lambda_b": torch.ones(5)},
        "the vera_lambda_d of the VeRA .* is nothing": {f"{module}.vera_lambda_d": None},
    }
    for words, change in cases.items():
        changed = {key: tensor for key, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, tmp_path / ADAPTER_FILE)
        with pytest.raises(UserError, match=words):
            read_updates(tmp_path / ADAPTER_FILE, names_of(denoiser()))


def test_what_is_not_for_it_is_refused() -> None:
    problems = dict(vera(convolutions=True, rules=[{"pattern": "a", "rank": 2}]).problems(ModelSettings(type="flux")))
    assert "Linears alone" in problems["convolutions"] and "one for all modules" in problems["rules[1].rank"]
