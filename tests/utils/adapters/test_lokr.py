"""LoKr against products made by hand, in a Linear and in a whole model, uncut and cut, exported and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import models
from models.assembly.exports import export_plan
from models.assembly.stage import StagedModel, load_stage
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from tests.processes import run_ranks
from utils.adapters import attach
from utils.adapters.lokr import LokrLayer, LokrSettings, split
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.export import export
from utils.settings.reader import read_settings, write_resolved
from utils.settings.schema import AdapterSettings

VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {"factor": 4, "full_matrix": True, "rank": 2, "alpha": 3.0},
    "low": {"factor": 4, "rank": 2, "alpha": 1.0},
    "both low": {"rank": 1, "alpha": 0.5, "decompose_both": True},
    "by class": {"factor": 4, "rank": 2, "factors": {"*Attention": 1, "proj_mlp": 2}},
}


def settings(**keys: Any) -> LokrSettings:
    return LokrSettings(type="lokr", **keys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


def loaded(folder: Path, adapter: AdapterSettings | None = None) -> StagedModel:
    pipeline = tiny_flux.pipeline(folder)
    return load_stage(pipeline, settings_of(pipeline, adapter), stage=0)


def moved(staged: StagedModel) -> dict[str, nn.Parameter]:
    """The factors, away from where they have no effect."""
    factors = staged.trained(staged.layers)
    with torch.no_grad():
        for name, factor in factors.items():
            factor.add_(normal(tuple(factor.shape), 0, "moved", name), alpha=0.1)
    return factors


def predicted(folder: Path, denoiser: nn.Module) -> torch.Tensor:
    pipeline = tiny_flux.pipeline(folder)
    with torch.no_grad():
        return tiny_flux.whole(
            denoiser.eval(), pipeline, tiny_flux.features((5, 11)), normal((2, 4, 4, 6), 0), torch.tensor([0.2, 0.9])
        )


@pytest.mark.parametrize(
    ("dimension", "factor", "expected"),
    [(2560, 16, (16, 160)), (2560, None, (40, 64)), (6912, 10, (9, 768)), (7, 4, (1, 7)), (12, 6, (3, 4))],
)
def test_dimensions_are_split(dimension: int, factor: int | None, expected: tuple[int, int]) -> None:
    assert split(dimension, factor) == expected


@pytest.mark.parametrize(
    ("keys", "shapes", "scale"),
    [
        ({"factor": 2}, {"lokr_w1": (2, 2), "lokr_w2": (6, 10)}, 1.0),
        ({"factor": 2, "rank": 3, "alpha": 6.0}, {"lokr_w1": (2, 2), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 10)}, 2.0),
        ({"factor": 2, "rank": 5, "alpha": 1.0}, {"lokr_w1": (2, 2), "lokr_w2": (6, 10)}, 1.0),
        ({"factor": 2, "rank": 3, "full_matrix": True}, {"lokr_w1": (2, 2), "lokr_w2": (6, 10)}, 1.0),
        (
            {"rank": 1, "alpha": 0.5, "decompose_both": True},
            {"lokr_w1_a": (3, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 5)},
            0.5,
        ),
    ],
)
def test_it_is_a_kronecker_product(keys: dict[str, Any], shapes: dict[str, tuple[int, int]], scale: float) -> None:
    torch.manual_seed(0)
    base = nn.Linear(20, 12).requires_grad_(False)
    layer = LokrLayer(base, settings(**keys), keys.get("factor"))
    layer.reset(torch.float32)
    x = torch.randn(3, 5, 20)
    assert torch.equal(layer(x), base(x)), "at first it has no effect"
    factors = {name: parameter for name, parameter in layer.named_parameters() if "lokr" in name}
    assert {name: tuple(parameter.shape) for name, parameter in factors.items()} == shapes
    with torch.no_grad():
        for parameter in factors.values():
            parameter.normal_()
    weights = torch.randn(3, 5, 12)
    (layer(x) * weights).sum().backward()

    by_hand = {name: parameter.detach().clone().requires_grad_() for name, parameter in factors.items()}
    w1, w2 = (
        by_hand[name] if name in by_hand else by_hand[f"{name}_a"] @ by_hand[f"{name}_b"]
        for name in ("lokr_w1", "lokr_w2")
    )
    expected = functional.linear(x, base.weight + scale * torch.kron(w1, w2), base.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    (expected * weights).sum().backward()
    for name, parameter in factors.items():
        torch.testing.assert_close(parameter.grad, by_hand[name].grad, rtol=1e-4, atol=1e-4)


def test_factors_by_name_and_class(folder: Path) -> None:
    modules = dict(loaded(folder, settings(**VARIANTS["by class"])).denoiser.named_modules())
    chosen = {name: module.shapes["lokr_w1"][0] for name, module in modules.items() if isinstance(module, LokrLayer)}
    for name, side in chosen.items():
        outputs = modules[name].base_layer.out_features
        factor = 1 if ".attn." in name else 2 if "proj_mlp" in name else 4
        assert side == split(outputs, factor)[0], name
    assert set(chosen.values()) == {1, 2, 4}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_what_is_exported_does_elsewhere_what_it_does_here(
    folder: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    """Merged as ComfyUI and LyCORIS do, and read again by a run of another alpha."""
    adapter, pipeline = settings(**variant), tiny_flux.pipeline(folder)
    staged = loaded(folder, adapter)
    plan = export_plan(pipeline, settings_of(pipeline, adapter), staged)
    export(tmp_path / "out", Ranks(), moved(staged), plan, step=1)
    expected = predicted(folder, staged.denoiser)
    plain = loaded(folder).denoiser
    assert (expected - predicted(folder, plain)).abs().mean() > 1e-3
    with attach.switched_off(staged.denoiser):
        assert torch.equal(predicted(folder, staged.denoiser), predicted(folder, plain))

    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert "lycoris_transformer_blocks_0_attn_to_q.alpha" in tensors
    for name, module in plain.named_modules():
        there = f"lycoris_{name.replace('.', '_')}"
        if f"{there}.alpha" in tensors:
            own = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{there}.")}
            dim = next((len(tensor) for part, tensor in own.items() if part.endswith("_b")), None)
            w1, w2 = (own[w] if w in own else own[f"{w}_a"] @ own[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
            scale = own["alpha"].item() / dim if dim else 1.0
            module.weight.data += scale * torch.kron(w1, w2)
    torch.testing.assert_close(predicted(folder, plain), expected, rtol=1e-4, atol=1e-5)

    again = loaded(folder, adapter.model_copy(update={"init_from_existing": file, "alpha": 7.0}))
    torch.testing.assert_close(predicted(folder, again.denoiser), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "tensors", "told"),
    [
        (settings(), {"x.lora_A.weight": torch.ones(2)}, "no LoKr factors in this file, it is a LoRA"),
        (LoraSettings(type="lora", rank=2), {"lycoris_x.lokr_w1": torch.ones(2)}, "no LoRA factors .* it is a LoKr"),
        (settings(), {"lycoris_x.lokr_w1": torch.ones(2)}, "1 of its 1 modules are not .*, the first is 'lycoris_x'"),
        (
            settings(factor=2),
            {f"lycoris_transformer_blocks_0_attn_to_q.lokr_w{part}": torch.ones(4, 4) for part in (1, 2)},
            "'transformer_blocks.0.attn.to_q.lokr_w1' is .4, 4., this run's is .2, 2.",
        ),
    ],
)
def test_files_that_do_not_fit_are_told(
    folder: Path, tmp_path: Path, adapter: AdapterSettings, tensors: dict[str, torch.Tensor], told: str
) -> None:
    save_file(tensors, tmp_path / "adapter.safetensors")
    with pytest.raises(UserError, match=told):
        loaded(folder, adapter.model_copy(update={"init_from_existing": tmp_path / "adapter.safetensors"}))


@pytest.mark.parametrize("fused", [True, False])
def test_it_is_trained_on_top_of_a_preset_adapter(folder: Path, tmp_path: Path, fused: bool) -> None:
    lora, pipeline = LoraSettings(type="lora", rank=2), tiny_flux.pipeline(folder)
    staged = loaded(folder, lora)
    plan = export_plan(pipeline, settings_of(pipeline, lora), staged)
    export(tmp_path / "out", Ranks(), moved(staged), plan, step=1)
    preset = {"path": tmp_path / "out" / "adapter_model.safetensors", "fused": fused}
    pipeline = tiny_flux.pipeline(folder, preset_adapters=[preset])
    begun = load_stage(pipeline, settings_of(pipeline, settings()), stage=0)
    expected = predicted(folder, staged.denoiser)
    torch.testing.assert_close(predicted(folder, begun.denoiser), expected, rtol=1e-4, atol=1e-5)


def test_a_run_with_it_is_written_and_read(folder: Path, tmp_path: Path) -> None:
    adapter = settings(factor=8, factors={"attn": 4}, full_matrix=True)
    run = settings_of(tiny_flux.pipeline(folder), adapter)
    write_resolved(run, tmp_path / "run.toml")
    again = read_settings(tmp_path / "run.toml", models.choices())
    assert again.adapter == adapter and isinstance(again.adapter, LokrSettings)


def train(ranks: Ranks, folder: Path, stages: int, recompute: bool) -> tuple[list[float], dict[str, np.ndarray]]:
    """Job of a rank: losses of some steps, and the factors that it then holds."""
    from utils.diffusion.losses import Labels
    from utils.parallel.backend import initialize_deepspeed
    from utils.parallel.engine import Engine
    from utils.parallel.pipeline import DenoiserPipeline

    initialize_deepspeed()
    ranks = ranks.with_stages(stages)
    pipeline = tiny_flux.pipeline(folder)
    run = settings_of(pipeline, settings(**VARIANTS["low"]), pipeline_stages=stages)
    staged = load_stage(pipeline, run, ranks.stage)
    module = DenoiserPipeline(
        staged.layers, staged.bounds, pipeline.stream_type, pipeline.maths.loss, recompute=recompute
    )
    trained = staged.trained(staged.stage_layers(ranks.stage))
    engine = Engine(module, torch.optim.AdamW(list(trained.values()), lr=1e-2), accumulation=1, clip_norm=1.0)
    shape, t_B = (2, 4, 4, 6), torch.tensor([0.2, 0.9])
    inputs = pipeline.prepare_inputs(tiny_flux.features((5, 11)), normal(shape, 0, "x"), t_B)
    labels = Labels(normal(shape, 0, "target"), torch.ones(2, 1, 1, 1))
    losses = [engine.train_step([(inputs, labels)], step).loss for step in range(4)]
    return losses, {name: parameter.detach().numpy() for name, parameter in trained.items()}


def test_stages_and_recomputing_change_nothing(folder: Path) -> None:
    ((losses, factors),) = run_ranks(train, 1, folder, 1, False)
    assert losses[3] < losses[0]
    returned = run_ranks(train, 2, folder, 2, True)
    cut: dict[str, np.ndarray] = {}
    for others, own in returned:
        assert others == pytest.approx(losses, rel=1e-5)
        cut |= own
    assert cut.keys() == factors.keys()
    for name, factor in factors.items():
        np.testing.assert_allclose(cut[name], factor, rtol=1e-4, atol=1e-5)
