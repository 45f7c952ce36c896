"""Adapters of several kinds on one model, by `type` in `[[adapter.rules]]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.assembly.exports import check_exports, check_outputs, export_plan
from models.assembly.plan import _trained
from models.assembly.stage import StagedModel, load_stage, partition
from models.flux import BFL_LAYOUT
from tests.models import tiny_flux
from tests.models.test_adapter_exports import deltas_of, merged
from tests.models.tiny_folder import settings_of
from utils.adapters import attach
from utils.adapters.ia3 import Ia3Settings
from utils.adapters.kinds import ADAPTER_FILE, COMFYUI_FILE
from utils.adapters.lokr import LokrSettings
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import AdapterSettings

LOKR = {"pattern": "ff", "type": "lokr", "rank": 2, "alpha": 1.0, "keys": {"factor": 4}}
SMALL = {"pattern": "norm1.linear", "type": "lora", "rank": 3, "keys": {"rslora": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


def lora(*rules: dict[str, Any], **keys: Any) -> LoraSettings:
    return LoraSettings(**{"type": "lora", "rank": 2, "alpha": 3.0, "rules": list(rules), **keys})


def cut(folder: Path, adapter: AdapterSettings, **keys: Any) -> StagedModel:
    flux = tiny_flux.pipeline(folder)
    settings = settings_of(flux, adapter, **keys)
    staged = partition(flux, settings, flux.weights.build_empty())
    check_outputs(flux, settings)
    check_exports(flux, settings, staged)
    return staged


def test_each_module_has_the_kind_of_its_rule(folder: Path) -> None:
    staged = cut(folder, lora(LOKR, SMALL))
    kinds = {name: (kind.name, module) for name, (kind, module) in attach.adapted(staged.denoiser).items()}
    assert {name for name, (kind, _) in kinds.items() if kind == "LoKr"} == {n for n in kinds if "ff" in n}
    assert {kind for kind, _ in kinds.values()} == {"LoRA", "LoKr"}
    kind, module = kinds["transformer_blocks.0.norm1.linear"]
    assert (kind, module.r["default"]) == ("LoRA", 3) and module.scaling["default"] == pytest.approx(3.0 / 3**0.5)
    flux = tiny_flux.pipeline(folder)
    told = _trained(settings_of(flux, lora(LOKR)), flux, staged)
    assert "LoRA of rank 2, or as the rules say, on" in told and f"LoKr on {sum('ff' in n for n in kinds)} m" in told


def test_an_export_has_all_kinds_and_is_gone_on_from(folder: Path, tmp_path: Path) -> None:
    flux, adapter = tiny_flux.pipeline(folder), lora(LOKR, SMALL)
    settings = settings_of(flux, adapter)
    staged = load_stage(flux, settings, 0)
    trained = staged.trained(staged.layers)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(normal(tuple(parameter.shape), 0, "moved", name) * 0.3)
    export(tmp_path, Ranks(), trained, export_plan(flux, settings, staged), 1)
    base = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    deltas = deltas_of(staged, {name: tensor.detach() for name, tensor in trained.items()})
    expected = BFL_LAYOUT.to_original({n: w + deltas.get(n.removesuffix(".weight"), 0.0) for n, w in base.items()})
    for file in (ADAPTER_FILE, COMFYUI_FILE):
        tensors = load_file(tmp_path / file)
        made = merged(tensors, base, BFL_LAYOUT, True)
        for name, tensor in expected.items():
            torch.testing.assert_close(made[name], tensor, rtol=1e-4, atol=1e-4)
        again = lora(LOKR, SMALL, init_from_existing=tmp_path / file)
        after = load_stage(flux, settings_of(flux, again), 0)
        for name, parameter in after.trained(after.layers).items():
            torch.testing.assert_close(parameter, trained[name], rtol=1e-5, atol=1e-6)
    assert all(key.startswith("lycoris_") for key in load_file(tmp_path / ADAPTER_FILE))
    # A module that has another kind here than in the file is told.
    for rules in ([SMALL], [{**LOKR, "type": "oft", "rank": None, "alpha": None, "keys": {}}]):
        rules = [{key: value for key, value in rule.items() if value is not None} for rule in rules]
        with pytest.raises(UserError, match="something else than LoRA factors"):
            load_stage(flux, settings_of(flux, lora(*rules, init_from_existing=tmp_path)), 0)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (lora({**LOKR, "type": "lokra"}), r"\[\[adapter.rules\]\] 1 type: no adapter is called 'lokra'; known"),
        (lora({**LOKR, "keys": {"facto": 4}}), "1 keys: `facto` is none of a rule; those of a lokr are .*factor"),
        (lora({**SMALL, "keys": {"rank": 4}}), "1 keys: `rank` stands in the rule itself"),
        (lora({**SMALL, "keys": {"loraplus_lr_ratio": 4.0}}), "1 keys: `loraplus_lr_ratio` is none of a rule"),
        (lora({**LOKR, "keys": {"factor": "four"}}), "1: `factor` of a lokr: Input should be a valid integer"),
        (lora({"pattern": "ff", "type": "oft", "rank": 2}), "1: `rank` of a oft: Extra inputs"),
        (lora({**LOKR, "keys": {"tucker": True}}), "1 tucker: is for convolutions only"),
        (lora({**SMALL, "keys": {"dora": True}}), "1 dora: has to be the same for all modules of a lora"),
        (lora(LOKR, dora=True), "dora: is in no file with other kinds"),
        (lora({"pattern": "ff", "type": "ia3"}), "type: IA3 is in files of its own, which have no place for LoRA"),
        (Ia3Settings(type="ia3", rules=[LOKR]), "type: IA3 is in files of its own, which have no place for LoKr"),
        (
            lora({"pattern": "attn.to_k", "type": "lokr"}),
            "'.*to_[qv]' and '.*to_k'|'.*to_k' and '.*to_[qv]' have adapters of different kinds; .*attn.qkv",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(folder: Path, adapter: AdapterSettings, words: str) -> None:
    with pytest.raises(UserError, match=words):
        cut(folder, adapter)


def test_what_comfyui_has_as_one_module_may_be_mixed_for_diffusers(folder: Path) -> None:
    cut(folder, lora({"pattern": "attn.to_k", "type": "lokr"}), save_format="diffusers")


def test_kinds_of_rules_bind_a_checkpoint_and_keys_need_a_kind() -> None:
    assert lora(LOKR).binding()["rules"] == [["ff", 2, 1.0, "lokr", {"factor": 4}]]
    problems = dict(lora({"pattern": "ff", "rank": 1, "keys": {"rslora": True}}).problems(ModelSettings(type="flux")))
    assert 'told with a kind: add type = "lora"' in problems["rules[1].keys"]
    by_file = lora(LOKR, rank=None, dim_from_weights=True)
    assert "set by the file" in dict(by_file.problems(ModelSettings(type="flux")))["rules[1].type"]
    assert LokrSettings(type="lokr", rules=[SMALL]).binding()["rules"][0][3] == "lora"
