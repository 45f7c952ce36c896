"""Adapters of other programs on every model: every tensor is used, in each spelling, or named in an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from models.assembly.stage import model_names
from models.foundation.checkpoints.adapter_files import read_factors
from tests.models.adapters_of_others import (
    DOTTED,
    ENDINGS,
    RANK,
    SHARED_NAMES,
    UNDERSCORED,
    Known,
    Tensors,
    known_models,
    lora,
    product,
    spelled,
)
from tests.models.tiny_folder import UNKNOWN_TO_COMFYUI, tiny
from utils import adapters
from utils.errors import UserError


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Known]:
    return known_models(tmp_path_factory)


OTHERS = 4
"""How many types an adapter is refused by."""
each_model = pytest.mark.parametrize("model", models.available())


def by_turns(*groups: Sequence[str]) -> pytest.MarkDecorator:
    """Each model with a prefix of each group: what is left of a name without its prefix depends on the model and on
    whether there are dots, and not on the prefix."""
    turns = [(model, group[number % len(group)]) for number, model in enumerate(models.available()) for group in groups]
    return pytest.mark.parametrize(("model", "prefix"), turns)


@by_turns(DOTTED, UNDERSCORED)
def test_diffusers_names_are_read(known: Callable[[str], Known], model: str, prefix: str, tmp_path: Path) -> None:
    """Among them those of OneTrainer, `lora_transformer_`, and of musubi-tuner, `lora_unet_layers_0_attention_to_q`."""
    chosen, tensors, expected = known(model), {}, {}
    for number, module in enumerate(chosen.linears()):
        name, shape = spelled(prefix, chosen.own(module)), chosen.names.shapes[f"{module}.weight"]
        endings = list(ENDINGS.values())[number % len(ENDINGS)]
        alpha = [None, 1.0][number % 2]
        tensors |= lora(name, shape, endings, alpha)
        expected[f"{module}.weight"] = product(name, shape, 1.0 if alpha is None else alpha / RANK)
    read = chosen.deltas(tensors, tmp_path)
    assert read.keys() == expected.keys() and len(expected) > 5
    for name, delta in expected.items():
        torch.testing.assert_close(read[name], delta)


@by_turns(("", "diffusion_model.", "base_model.model."), ("lora_unet_", "lora_unet__"))
def test_the_publishers_names_are_read(known: Callable[[str], Known], model: str, prefix: str, tmp_path: Path) -> None:
    """All of the rank of a fused module serves every part of it; swapped halves are swapped back."""
    chosen = known(model)
    if chosen.layout is None:
        assert model in UNKNOWN_TO_COMFYUI, "ComfyUI has no such model"
        return
    adapted, tensors, expected = set(chosen.linears()), {}, {}
    for there, target in chosen.layout.targets(chosen.names.shapes):
        # Of several spellings in one layout the first.
        is_new = not any(set(target.modules) & set(one.modules) for one, _ in expected.values())
        if is_new and adapted.issuperset(target.modules) and not there.endswith("linear1_qkv"):
            name, rows = spelled(prefix, there), sum(map(chosen.names.rows_of, target.modules))
            shape = (rows, chosen.names.shapes[f"{target.modules[0]}.weight"][1])
            tensors |= lora(name, shape, ENDINGS["kohya"], 1.0)
            expected[there] = (target, product(name, shape, 1.0 / RANK))
    read = chosen.deltas(tensors, tmp_path)
    assert {name.removesuffix(".weight") for name in read} == {m for t, _ in expected.values() for m in t.modules}
    for target, delta in expected.values():
        joined = torch.cat([read[f"{module}.weight"] for module in target.modules])
        halves = list(joined.chunk(2)) if target.swap_halves else [joined]
        torch.testing.assert_close(torch.cat(halves[::-1]), delta)


@each_model
def test_an_adapter_of_another_model_is_refused(known: Callable[[str], Known], model: str, tmp_path: Path) -> None:
    """In its own names, whichever they are: nothing is left out in silence. By the types that follow in their list, of
    which each is asked as often as any other."""
    chosen, types = known(model), list(models.available())
    after = types.index(model) + 1
    others = [name for name in types[after:] + types[: after - 1] if {model, name} not in SHARED_NAMES][:OTHERS]
    for prefix in ("transformer.", "lora_unet_"):
        tensors: Tensors = {}
        for module in chosen.linears():
            tensors |= lora(
                spelled(prefix, chosen.own(module)), chosen.names.shapes[f"{module}.weight"], ENDINGS["peft"]
            )
        save_file(tensors, tmp_path / "adapter.safetensors")
        for other in others:
            with pytest.raises(UserError, match="of its .* modules are not this model's|of [0-9]+ fit"):
                known(other).read_file(tmp_path / "adapter.safetensors")


@each_model
def test_what_is_not_read_is_named(known: Callable[[str], Known], model: str, tmp_path: Path) -> None:
    chosen = known(model)
    module = chosen.linears()[0]
    name, shape = f"lora_unet_{chosen.own(module).replace('.', '_')}", chosen.names.shapes[f"{module}.weight"]
    good, one = lora(name, shape, ENDINGS["kohya"]), torch.ones(2, 2)
    cases = {
        f"{name}.a1.weight": "1 of its 3 tensors are of a form that is not read here .GLoRA",
        f"{name}.rescale": "OFT with other lengths",
        f"{name}.on_input": "IA3 of LyCORIS",
        "base_model.vera_A": "1 of its 3 tensors are of a form that is not read here, the first is 'base_model.vera_A'",
        f"{name}.set_weight": "replacement of weights",
        f"{name}.weight": f"the first is '{name}.weight'",
        f"{name}.lora_B.bias": "LoRA with biases",
        f"{name}.lora_A.weight": "1 of its 3 tensors are of a form that is not read here, the first",
        f"{name}2.alpha": f"the first is '{name}2.alpha'",
        "lora_unet_somewhere.lora_up.weight": "1 of its 2 modules are not this model's, .*'lora_unet_somewhere'",
        "lora_te9_text_model_x.lora_up.weight": "1 of its 2 modules are a text encoder's, .*'lora_te9_text_model_x'",
    }
    for key, told in cases.items():
        with pytest.raises(UserError, match=told):
            chosen.read({**good, key: one}, tmp_path)
    assert len(chosen.read(good, tmp_path)) == 1


def test_two_names_of_one_module_are_refused(known: Callable[[str], Known], tmp_path: Path) -> None:
    """ComfyUI takes the last one alone."""
    one, other = (
        lora(f"{prefix}blocks.0.{own}", (24, 24), ENDINGS["peft"])
        for prefix, own in (("transformer.", "attn1.to_q"), ("diffusion_model.", "self_attn.q"))
    )
    with pytest.raises(UserError, match="both adapt 'blocks.0.attn1.to_q.weight'"):
        known("wan").read({**one, **other}, tmp_path)


def test_the_look_of_names_is_told(known: Callable[[str], Known], tmp_path: Path) -> None:
    chosen = known("wan")
    fits, other = (lora(f"blocks.{n}.attn1.to_q", (24, 24), ENDINGS["peft"]) for n in (0, 99))
    with pytest.raises(UserError, match="look like names of Wan; the other 1 fit; give an adapter .* in this size"):
        chosen.read({**fits, **other}, tmp_path)
    for name, told in {
        "diffusion_model.blocks.3.self_attn.q": "Wan",
        "lora_unet_double_blocks_0_img_attn_proj": "Flux.1 or Chroma",
        "lora_unet_input_blocks_4_1_proj_in": "Stable Diffusion 1.5, 2 or XL",
        "transformer.transformer_blocks.0.img_mlp.net.2": "Qwen-Image",
        "lora_unet_joint_blocks_1_x_block_mlp_fc1": "Stable Diffusion 3",
        "diffusion_model.layers.3.attention.qkv": "Z-Image, Lumina 2, OmniGen2 or Ideogram 4",
        "transformer.transformer_blocks.1.attn1.to_q": "LTX-Video, CogVideoX or PixArt",
    }.items():
        with pytest.raises(UserError, match=f"1 of its 1 modules are not this model's, .*look like names of {told}"):
            known("hidream").read(lora(name, (4, 4), ENDINGS["peft"]), tmp_path)


def test_names_of_text_encoders_are_read_where_those_are_trained(tmp_path: Path) -> None:
    module = tiny("sdxl_texts")
    pipeline = module.pipeline(module.write_folder(tmp_path))
    denoiser = pipeline.weights.build_empty()
    chosen = Known(denoiser, model_names(pipeline, denoiser), tuple(pipeline.blocks))
    within = "encoder.layers.0.self_attn.q_proj"
    prefixes = {
        "text_encoder": ("lora_te1_", "lora_te_", "text_encoder.", "text_encoders.clip_l.transformer."),
        "text_encoder_2": (
            "lora_te2_",
            "text_encoder_2.",
            "text_encoders.clip_g.transformer.",
            "lycoris_text_encoder_2_",
        ),
    }
    for part, names in prefixes.items():
        ours = next(name for name in chosen.names.modules if name.startswith(f"{part}.") and name.endswith(within))
        for number, prefix in enumerate(names):
            # transformers calls the inner model text_model in some of its versions.
            own = within if number % 2 else f"text_model.{within}"
            name = prefix + (own.replace(".", "_") if prefix.endswith("_") else own)
            read = chosen.deltas(lora(name, chosen.names.shapes[f"{ours}.weight"], ENDINGS["kohya"]), tmp_path)
            assert read.keys() == {f"{ours}.weight"}, name


def test_training_goes_on_from_plain_factors_alone(known: Callable[[str], Known], tmp_path: Path) -> None:
    chosen, name = known("wan"), "diffusion_model.blocks.0.self_attn.q"
    shape = chosen.names.shapes["blocks.0.attn1.to_q.weight"]
    factors = lora(name, shape, ENDINGS["kohya"])
    for further, told in (
        ({f"{name}.dora_scale": torch.ones(shape[0], 1)}, "has a dora_scale; set `dora = true` in .adapter. to go on"),
        ({f"{name}.diff_b": torch.ones(shape[0])}, "1 of its 1 modules have something else than LoRA factors"),
        ({"lycoris_blocks_0_attn1_to_k.lokr_w1": torch.ones(1, 1)}, "1 of its 2 modules have something else"),
    ):
        save_file({**factors, **further}, tmp_path / "adapter.safetensors")
        with pytest.raises(UserError, match=told):
            read_factors(tmp_path / "adapter.safetensors", adapters.find("lora"), chosen.names, {})
