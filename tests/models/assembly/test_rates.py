"""Which learning rate and weight decay each trained parameter has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import train as train_py
from models.assembly.rates import Rates, undecayed
from models.assembly.stage import partition
from tests.models.tiny_folder import settings_of, tiny
from tests.runs import only_run
from utils.adapters.attach import base_name
from utils.adapters.lora import LoraSettings
from utils.errors import UserError
from utils.ranks import Ranks, disconnect
from utils.run.export import load_file
from utils.run.signals import StopRequests


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny folder of a type, made once."""
    made: dict[str, Path] = {}

    def folder(model: str) -> Path:
        if model not in made:
            made[model] = tiny(model).write_folder(tmp_path_factory.mktemp(model))
        return made[model]

    return folder


def rates_of(folder: Path, model: str, adapter: LoraSettings | None = None, **keys: Any) -> tuple[Rates, nn.Module]:
    """Those of a model without weights, and the model."""
    pipeline = tiny(model).pipeline(folder)
    settings = settings_of(pipeline, adapter)
    optimizer = settings.optimizer.model_validate({**settings.optimizer.model_dump(), "lr": 1.0, **keys})
    settings = settings.model_copy(update={"optimizer": optimizer})
    denoiser = partition(pipeline, settings, pipeline.weights.build_empty()).denoiser
    return Rates(settings, pipeline, denoiser), denoiser


PARTS = {"self_attn_lr": 2.0, "cross_attn_lr": 3.0, "mlp_lr": 4.0, "mod_lr": 5.0}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            "flux",
            {
                "transformer_blocks.0.attn.add_q_proj.weight": 2.0,
                "transformer_blocks.0.attn.norm_q.weight": 2.0,
                "transformer_blocks.0.ff_context.net.2.bias": 4.0,
                "transformer_blocks.0.norm1_context.linear.weight": 5.0,
                "single_transformer_blocks.0.proj_mlp.weight": 4.0,
                "single_transformer_blocks.0.norm.linear.weight": 5.0,
                "single_transformer_blocks.0.proj_out.weight": 1.0,
                "norm_out.linear.weight": 1.0,
            },
        ),
        (
            "wan",
            {
                "blocks.0.attn1.to_q.weight": 2.0,
                "blocks.0.attn2.to_q.weight": 3.0,
                "blocks.0.ffn.net.2.weight": 4.0,
                "blocks.0.scale_shift_table": 5.0,
                "blocks.0.norm2.weight": 1.0,
            },
        ),
        (
            "qwen_image",
            {
                "transformer_blocks.0.attn.to_q.weight": 2.0,
                "transformer_blocks.0.img_mlp.net.2.weight": 4.0,
                "transformer_blocks.0.txt_mod.1.weight": 5.0,
            },
        ),
        (
            "hidream",
            {
                "double_stream_blocks.0.block.attn1.to_q_t.weight": 2.0,
                "double_stream_blocks.0.block.ff_i.experts.0.w1.weight": 4.0,
                "double_stream_blocks.0.block.adaLN_modulation.1.weight": 5.0,
            },
        ),
    ],
)
def test_parts_of_blocks_have_rates_of_their_own(
    folder_of: Callable[[str], Path], model: str, expected: dict[str, float]
) -> None:
    used = {key: rate for key, rate in PARTS.items() if model == "wan" or key != "cross_attn_lr"}
    rates, denoiser = rates_of(folder_of(model), model, **used)
    assert expected.keys() <= dict(denoiser.named_parameters()).keys()
    assert {name: rates.lr(name) for name in expected} == expected


def test_the_second_attention_of_sd3_is_none_to_the_text(folder_of: Callable[[str], Path]) -> None:
    rates, denoiser = rates_of(folder_of("sd3"), "sd3", self_attn_lr=2.0)
    names = [name for name in dict(denoiser.named_parameters()) if ".attn2.to_q." in name]
    assert names and {rates.lr(name) for name in names} == {2.0}
    with pytest.raises(UserError, match=r"\[optimizer\] cross_attn_lr: nothing that is trained belongs to this part"):
        rates_of(folder_of("sd3"), "sd3", cross_attn_lr=2.0)


def test_the_first_rule_that_matches_counts_before_parts_and_loraplus(folder_of: Callable[[str], Path]) -> None:
    adapter = LoraSettings(type="lora", rank=2, loraplus_lr_ratio=16.0)
    rules = [
        {"pattern": "blocks.0.attn.to_q", "lr": 7.0},
        {"pattern": "attn.to_[qk].lora_A", "lr": 8.0, "weight_decay": 0.5},
        {"pattern": "lora_B", "weight_decay": 0.25},
    ]
    rates, _ = rates_of(folder_of("flux"), "flux", adapter, rules=rules, self_attn_lr=2.0, weight_decay=0.125)
    expected = {
        "transformer_blocks.0.attn.to_q.lora_A.weight": (7.0, 0.125),
        "transformer_blocks.0.attn.to_q.lora_B.weight": (7.0 * 16, 0.125),
        "transformer_blocks.0.attn.to_k.lora_A.weight": (8.0, 0.5),
        "transformer_blocks.0.attn.to_k.lora_B.weight": (2.0 * 16, 0.25),
        "transformer_blocks.0.ff.net.2.lora_B.weight": (1.0 * 16, 0.25),
        "transformer_blocks.0.ff.net.2.lora_A.weight": (1.0, 0.125),
    }
    assert {name: (rates.lr(name), rates.weight_decay(name)) for name in expected} == expected


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"rules": [{"pattern": "attn3", "lr": 1.0}]},
            r"\[\[optimizer.rules\]\] 1: pattern .attn3. matches nothing; .*trans",
        ),
        (
            {"rules": [{"pattern": "attn", "lr": 1.0}, {"pattern": "attn.to_q", "lr": 2.0}]},
            r"\[\[optimizer.rules\]\] 2: all that pattern .attn.to_q. matches is matched by rules above it",
        ),
        ({"rules": [{"pattern": "attn"}]}, "says nothing; give it lr or weight_decay"),
        ({"rules": [{"pattern": "*", "lr": 0.0}]}, "a rate of 0 freezes .*leave it out of the adapter"),
    ],
)
def test_a_rule_that_is_not_used_is_refused(folder_of: Callable[[str], Path], keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        rates_of(folder_of("flux"), "flux", LoraSettings(type="lora", rank=2), **keys)


def test_an_optimizer_that_finds_one_rate_is_told_of_another(folder_of: Callable[[str], Path]) -> None:
    alike, denoiser = rates_of(folder_of("flux"), "flux")
    alike.check_alike(dict(denoiser.named_parameters()), "prodigy")
    differ, _ = rates_of(folder_of("flux"), "flux", mlp_lr=2.0)
    with pytest.raises(UserError, match=r'type: "prodigy" finds one .*, and transformer_blocks.0.ff.* its own, 2:'):
        differ.check_alike(dict(denoiser.named_parameters()), "prodigy")


def test_rates_of_0_freeze_but_not_all(folder_of: Callable[[str], Path]) -> None:
    rules = [{"pattern": "single_transformer_blocks", "lr": 0.0}]
    _, denoiser = rates_of(folder_of("flux"), "flux", rules=rules)
    frozen = {name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in denoiser.named_parameters() if name.startswith("single_transformer_blocks")}
    with pytest.raises(UserError, match="freeze all that would be trained"):
        rates_of(folder_of("flux"), "flux", rules=[{"pattern": "*", "lr": 0.0}])


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        ("cosmos", {"learnable_pos_embed.pos_emb_t"}),
        ("wan", {"blocks.0.scale_shift_table"}),
        ("hunyuan_video_15", {"cond_type_embed.weight"}),
        ("z_image", {"cap_pad_token"}),
        ("hidream", set()),
    ],
)
def test_tables_embeddings_norms_and_vectors_do_not_decay(
    folder_of: Callable[[str], Path], model: str, kept: set[str]
) -> None:
    rates, denoiser = rates_of(folder_of(model), model, weight_decay=0.1)
    without = {name for name, _ in denoiser.named_parameters() if rates.weight_decay(name) == 0}
    assert without == set(undecayed(denoiser)) and kept <= without
    linears = {f"{name}.weight" for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    assert linears and not linears & without, "a matrix in a norm of diffusers is one of modulation, and decays"
    vectors = {name for name, parameter in denoiser.named_parameters() if parameter.ndim < 2}
    assert vectors <= without


def test_lengths_of_rows_do_not_decay(folder_of: Callable[[str], Path]) -> None:
    adapter = LoraSettings(type="lora", rank=2, dora=True, convolutions=True)
    rates, denoiser = rates_of(folder_of("sdxl"), "sdxl", adapter, weight_decay=0.1)
    trained = {base_name(name): p for name, p in denoiser.named_parameters() if p.requires_grad}
    lengths = {name: p.ndim for name, p in trained.items() if "magnitude" in name}
    assert set(lengths.values()) == {1, 4} and {rates.weight_decay(name) for name in lengths} == {0.0}
    assert {rates.weight_decay(name) for name in trained if name not in lengths} == {0.1}


def test_what_is_frozen_is_exported_as_it_was(write_config: Callable[..., Path], short_flux: Path) -> None:
    """In full, with blocks swapped of which some are frozen in part."""
    rules = [{"pattern": "single_transformer_blocks", "lr": 0.0}, {"pattern": "blocks.0.attn.to_q", "lr": 0.0}]
    config = write_config(
        max_steps=1,
        checkpoint_every_n_steps=None,
        adapter=None,
        optimizer={"type": "adamw", "lr": 1e-2, "rules": rules},
        blocks_to_swap=1,
        save_format="diffusers",
    )
    try:
        train_py.run(train_py.parse_arguments(["--config", str(config)]), Ranks(), StopRequests(), 0.0)
    finally:
        disconnect()
    (after,) = only_run(config).rglob("diffusion_pytorch_model.safetensors")
    before, trained = load_file(short_flux / "transformer" / after.name), load_file(after)
    assert before.keys() == trained.keys()
    same = {name for name in before if torch.equal(before[name], trained[name])}
    frozen = {name for name in before if name.startswith("single_transformer_blocks") or "blocks.0.attn.to_q." in name}
    assert frozen <= same and len(same - frozen) < len(before) / 4
