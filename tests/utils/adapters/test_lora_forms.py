"""DoRA, rank-stabilised LoRA, starts and dropouts, on Linears and convolutions: against PEFT's own, against the
formula, and in files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from models.foundation.checkpoints.adapter_files import read_factors, read_updates
from tests.utils.adapters.toy_unet import PREFIX, begun, exported, factors_of, frozen, inputs, moved, names_of, net
from utils import adapters
from utils.adapters import attach, presets
from utils.adapters.base_weight import weight_of
from utils.adapters.kinds import ADAPTER
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.run.tensor_file import write_tensors
from utils.settings.model_schema import ModelSettings

FORMS: dict[str, dict[str, Any]] = {
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "dora on pissa": {"dora": True, "init": "pissa"},
    "other rank of convolutions": {"conv_dim": 2, "conv_alpha": 1.0},
    "dora of another rank": {"dora": True, "conv_dim": 2, "conv_alpha": 1.0, "rslora": True},
}
each = pytest.mark.parametrize("keys", FORMS.values(), ids=FORMS)


def lora(**keys: Any) -> LoraSettings:
    return LoraSettings(**{"type": "lora", "rank": 4, "alpha": 6.0, "convolutions": True, **keys})


def in_peft(folder: Path) -> nn.Module:
    """PEFT's own layers, as it loads the export into the original model."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace(f"{PREFIX}.", "base_model.model.", 1): tensor for name, tensor in tensors.items()}
    (folder / "peft").mkdir()
    write_tensors(folder / "peft" / "adapter_model.safetensors", renamed, {})
    shutil.copy(folder / "adapter_config.json", folder / "peft")
    return PeftModel.from_pretrained(net(), folder / "peft").eval()


@each
def test_peft_computes_the_same_of_an_export(keys: dict[str, Any], tmp_path: Path) -> None:
    """On the base as it was, whatever the start has taken out of it; as a preset too, and in a run that goes on."""
    settings = lora(**keys)
    model, x = moved(settings), inputs()
    expected = model(x)
    assert (expected - net()(x)).abs().mean() > 1e-2
    file = exported(model, settings, tmp_path)
    fused = net()
    presets.fuse(fused, [fused], read_updates(file, names_of(fused)), 1.0)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)

    plain = lora(**{**keys, "init": None, "alpha": 5.0})
    if "init" in keys:
        plain = lora(rank=8, dora=settings.dora)
    again = begun(plain)
    read = read_factors(file, adapters.find("lora"), names_of(again), attach.scales(again))
    attach.load(again, [again], read, "a test")
    torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(in_peft(tmp_path)(x), expected, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("form", [None, "int8"])
def test_a_start_has_no_effect_and_switched_off_there_is_none(keys: dict[str, Any], form: str | None) -> None:
    """On quantised weights too, which stay as they are."""
    begins, plain, x = begun(lora(**keys), net(form)), frozen(net(form))(inputs()), inputs()
    torch.testing.assert_close(begins(x), plain, rtol=0, atol=1e-6 if "init" in keys else 0)
    changed = moved(lora(**keys), net(form))
    with attach.switched_off(changed):
        assert torch.equal(changed(x), plain)
    assert (changed(x) - plain).abs().mean() > 1e-2


def test_dora_has_pefts_gradients() -> None:
    ours, x = moved(lora(dora=True)), inputs()
    config = LoraConfig(r=4, lora_alpha=6.0, use_dora=True, target_modules=["conv", "cell", "to_q"])
    theirs = get_peft_model(net(), config)
    parameters = {attach.base_name(n.removeprefix("base_model.model.")): p for n, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, factor in factors_of(ours).items():
            assert parameters[name].shape == factor.shape, name
            parameters[name].copy_(factor)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for name, factor in factors_of(ours).items():
        torch.testing.assert_close(factor.grad, parameters[name].grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_are_pefts(start: str) -> None:
    """The part of the weight that is trained; of PEFT's start what is left of the weight."""
    model = begun(lora(init=start, convolutions=False))
    config = LoraConfig(r=4, lora_alpha=6.0, init_lora_weights=start, target_modules=["to_q"])
    theirs = get_peft_model(net(), config).base_model.model.blocks[0]["to_q"]
    layer = model.blocks[0]["to_q"]
    trained = 1.5 * layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
    torch.testing.assert_close(weight_of(layer.base_layer) - trained, theirs.base_layer.weight, rtol=1e-4, atol=1e-5)
    # A run that goes on finds the same, whatever its seed.
    again = net()
    attach.attach(again, ["blocks"], lora(init=start))
    attach.initialise(again, [again], lora(init=start), seed=7)
    for name in ("lora_start_A", "lora_start_B"):
        assert torch.equal(getattr(again.blocks[0]["to_q"], name), getattr(layer, name))


def test_a_large_start_has_the_directions_of_the_whole_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.adapters import lora_starts

    layer = nn.Linear(80, 60)
    with torch.no_grad():
        layer.weight.copy_(normal((60, 80), 0) * torch.linspace(3, 0.1, 60)[:, None])
    whole = lora_starts.start_of(layer, 4, 2.0, "pissa")
    monkeypatch.setattr(lora_starts, "WHOLE", 0)
    down, up = lora_starts.start_of(layer, 4, 2.0, "pissa")
    torch.testing.assert_close(up @ down, whole[1] @ whole[0], rtol=1e-3, atol=1e-3)


def test_dropped_ranks_are_made_up_for() -> None:
    """Of each sample others, and on average nothing changes; in evaluation nothing is left out."""
    model = moved(lora(rank=4, rank_dropout=0.5, convolutions=False))
    layer = model.blocks[0]["to_q"]
    x = normal((1, 1, 8), 0, "x").expand(4000, 3, 8)
    torch.manual_seed(0)
    drawn = layer(x) - layer.base_layer(x)
    assert torch.equal(drawn[:, 0], drawn[:, 1]) and len({tuple(row.tolist()) for row in drawn[:, 0]}) == 16
    whole = (layer.eval()(x) - layer.base_layer(x))[0, 0]
    torch.testing.assert_close(drawn[:, 0].mean(dim=0), whole, rtol=0.1, atol=0.02)


def test_modules_are_dropped_as_a_whole() -> None:
    model = moved(lora(module_dropout=0.25, convolutions=False))
    layer, x = model.blocks[0]["to_q"], normal((5, 8), 0, "x")
    plain, whole = layer.base_layer(x), layer.eval()(x)
    layer.train()
    torch.manual_seed(0)
    kept = [torch.equal(layer(x), plain) for _ in range(400)]
    assert 70 < sum(kept) < 130
    torch.manual_seed(0)
    for was_dropped in kept[:10]:
        torch.testing.assert_close(layer(x), plain if was_dropped else whole)


def test_dylora_trains_the_first_ranks() -> None:
    """With the scale that a LoRA of so many has."""
    model = moved(lora(rank=4, alpha=4.0, dylora_unit=2, convolutions=False))
    layer, x = model.blocks[0]["to_q"], normal((5, 8), 0, "x")
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    expected = {used: layer.base_layer(x) + 4 / used * x @ down[:used].T @ up[:, :used].T for used in (2, 4)}
    seen = set()
    for _ in range(20):
        made = layer(x)
        seen |= {used for used, one in expected.items() if torch.allclose(made, one, atol=1e-5)}
    assert seen == {2, 4}
    torch.testing.assert_close(layer.eval()(x), expected[4])


def test_a_plain_lora_is_gone_on_from_with_dora_and_not_the_other_way_round(tmp_path: Path) -> None:
    plain = moved(lora())
    file = exported(plain, lora(), tmp_path)
    again = begun(lora(dora=True))
    read = read_factors(file, adapters.find("lora"), names_of(again), attach.scales(again))
    attach.load(again, [again], read, "a test")
    torch.testing.assert_close(again(inputs()), plain(inputs()), rtol=1e-4, atol=1e-5)
    file = exported(again, lora(dora=True), tmp_path)
    with pytest.raises(UserError, match="has a lora_magnitude_vector; set `dora = true` in .adapter. to go on from it"):
        read_factors(file, adapters.find("lora"), names_of(plain), attach.scales(plain))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"dora": True, "dtype": "bfloat16"}, 'needs dtype = "float32"'),
        ({"init": "pissa", "init_from_existing": Path("x")}, "leave one out. An export of a run with init has twice"),
        ({"init": "olora", "rank_dropout": 0.1}, "would leave out a part of the weight itself"),
        ({"init": "olora", "dylora_unit": 1}, "would leave out a part of the weight itself"),
        ({"dylora_unit": 8}, "is above the rank, 4"),
        ({"dylora_unit": 2, "dora": True}, "would measure weights without a part of their update"),
        ({"conv_dim": 2, "convolutions": False}, "is for convolutions only; set `convolutions = true`"),
    ],
)
def test_what_contradicts_itself_is_told(keys: dict[str, Any], told: str) -> None:
    found = [problem for _, problem in lora(**keys).problems(ModelSettings.model_construct(preset_adapters=[]))]
    assert len(found) == 1 and told in found[0]


def test_dora_measures_what_presets_have_changed() -> None:
    from utils.settings.model_schema import PresetAdapter

    model = ModelSettings.model_construct(preset_adapters=[PresetAdapter(path=Path("x"), fused=False)])
    ((key, told),) = lora(dora=True).problems(model)
    assert key == "dora" and "of which preset 1 is no part; set `fused = true`" in told
