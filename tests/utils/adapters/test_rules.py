"""Modules whose adapter has another rank, alpha, dropout or rate than that of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.assembly.exports import export_plan
from models.assembly.rates import Rates
from models.assembly.stage import load_stage, partition
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from utils.adapters import attach
from utils.adapters.lokr import LokrSettings
from utils.adapters.lora import LoraSettings
from utils.adapters.oft import OftSettings
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import AdapterSettings

RULES = [
    {"pattern": "single_transformer_blocks.0", "rank": 0},
    {"pattern": "attn.to_[qk]", "rank": 2, "alpha": 1.0, "lr": 5e-4},
    {"pattern": "FeedForward", "dropout": 0.5},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


def lora(**keys: Any) -> LoraSettings:
    return LoraSettings(type="lora", **{"rank": 4, "alpha": 2.0, **keys})


def adapted(folder: Path, adapter: AdapterSettings) -> nn.Module:
    pipeline = tiny_flux.pipeline(folder)
    return partition(pipeline, settings_of(pipeline, adapter), pipeline.weights.build_empty()).denoiser


def test_each_module_has_the_sizes_of_the_first_rule_that_matches(folder: Path) -> None:
    modules = {name: module for name, (_, module) in attach.adapted(adapted(folder, lora(rules=RULES))).items()}
    assert modules and not any(name.startswith("single_transformer_blocks.0.") for name in modules)

    def sizes(name: str) -> tuple[int, float, float]:
        module = modules[name]
        dropout = getattr(module.lora_dropout["default"], "p", 0.0)
        return module.r["default"], module.lora_alpha["default"], dropout

    assert sizes("transformer_blocks.0.attn.to_q") == (2, 1.0, 0.0)
    assert sizes("transformer_blocks.0.attn.to_v") == (4, 2.0, 0.0)
    assert sizes("transformer_blocks.0.ff.net.2") == (4, 2.0, 0.5)


def test_rates_are_those_of_the_rules(folder: Path) -> None:
    pipeline = tiny_flux.pipeline(folder)
    settings = settings_of(pipeline, lora(rules=RULES, loraplus_lr_ratio=2.0))
    denoiser = partition(pipeline, settings, pipeline.weights.build_empty()).denoiser
    rates, of_all = Rates(settings, pipeline, denoiser), settings.optimizer.lr
    assert rates.lr("transformer_blocks.0.attn.to_q.lora_A.weight") == 5e-4
    assert rates.lr("transformer_blocks.0.attn.to_q.lora_B.weight") == 1e-3
    assert rates.lr("transformer_blocks.0.attn.to_v.lora_A.weight") == of_all != 5e-4


def test_an_export_does_elsewhere_what_the_layers_do_here(folder: Path, tmp_path: Path) -> None:
    """By the stock pipeline; and training goes on from it with the same rules alone."""
    pipeline = tiny_flux.pipeline(folder)
    adapter = lora(rules=RULES[:2])
    settings = settings_of(pipeline, adapter)
    staged = load_stage(pipeline, settings, 0)
    with torch.no_grad():
        for name, parameter in staged.trained(staged.layers).items():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    export(tmp_path, Ranks(), staged.trained(staged.layers), export_plan(pipeline, settings, staged), 1)
    stock = tiny_flux.STOCK.from_pretrained(folder)
    stock.load_lora_weights(tmp_path)
    stock.fuse_lora()
    fused = dict(stock.transformer.named_modules())
    checked = set()
    for name, (kind, module) in attach.adapted(staged.denoiser).items():
        base = kind.base_of(module)
        update = module.lora_B["default"].weight @ module.lora_A["default"].weight * kind.scale_of(module)
        here = base.weight + update
        layer = fused[name]
        torch.testing.assert_close(getattr(layer, "base_layer", layer).weight, here, rtol=1e-4, atol=1e-4)
        checked.add(tuple(module.r.values()))
    assert checked == {(2,), (4,)}
    again = load_stage(pipeline, settings_of(pipeline, adapter.model_copy(update={"init_from_existing": tmp_path})), 0)
    for name, parameter in again.trained(again.layers).items():
        torch.testing.assert_close(parameter, staged.trained(staged.layers)[name])
    with pytest.raises(UserError, match="set .adapter. rank"):
        load_stage(pipeline, settings_of(pipeline, lora(rules=RULES[:1], init_from_existing=tmp_path)), 0)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (
            [{"pattern": "attn3", "rank": 1}],
            r"\[\[adapter.rules\]\] 1: pattern .attn3. matches nothing; .*transformer_b",
        ),
        (
            [{"pattern": "attn", "rank": 1}, {"pattern": "attn.to_q", "rank": 2}],
            r"\[\[adapter.rules\]\] 2: pattern .attn.to_q. matches only what rules above it match",
        ),
        ([{"pattern": "*", "rank": 0}], "leave nothing to adapt"),
    ],
)
def test_a_rule_that_is_not_used_is_refused(folder: Path, rules: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        adapted(folder, lora(rules=rules))


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        (lora(rules=[{"pattern": "attn"}]), "rules[1]", "says nothing"),
        (OftSettings(type="oft", rules=[{"pattern": "attn", "rank": 2}]), "rules[1].rank", 'and not "oft"'),
        (lora(rank=None, dim_from_weights=True, rules=RULES[:1]), "rules[1].rank", "set by the file"),
        (LokrSettings(type="lokr", full_matrix=True, rules=RULES[1:2]), "rules[1]", "full_matrix leaves no use"),
        (lora(dylora_unit=3, rules=RULES[1:2]), "dylora_unit", "above the rank, 2"),
    ],
)
def test_a_rule_that_means_nothing_is_told(settings: AdapterSettings, key: str, words: str) -> None:
    problems = dict(settings.problems(ModelSettings(type="flux")))
    assert words in problems[key]


def test_ranks_of_rules_bind_a_checkpoint_and_rates_do_not() -> None:
    assert "rules" not in lora().binding() and lora(rules=[{"pattern": "a", "lr": 1.0}]).binding() == lora().binding()
    assert lora(rules=RULES).binding()["rules"] == [
        ["single_transformer_blocks.0", 0, None],
        ["attn.to_[qk]", 2, 1.0],
        ["FeedForward", None, None],
    ]
