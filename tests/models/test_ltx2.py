"""LTX-2: what of it is its own. What holds for every model is tested in tests/test_models.py."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.loaders.single_file_utils import convert_ltx2_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from models.assembly.exports import export_plan
from models.assembly.stage import load_stage
from models.foundation.checkpoints.layouts.ltx2 import LTX2_LAYOUT
from models.foundation.layers.given import loss_weights
from models.ltx2 import OF_SOUND
from tests import test_models as generic
from tests.models import tiny_ltx2, tiny_ltx2_3
from tests.models.batches import Batch
from tests.models.tiny_folder import encoded, settings_of
from utils.adapters.lora import LoraSettings
from utils.diffusion.seeds import normal
from utils.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {"ltx2": tiny_ltx2, "ltx2_3": tiny_ltx2_3}
OTHER_NAMES = {
    "decoder.mid_block.": "decoder.up_blocks.0.",
    "decoder.up_blocks.0.upsamplers.0.": "decoder.up_blocks.1.",
    "decoder.up_blocks.0.": "decoder.up_blocks.2.",
    "decoder.up_blocks.1.upsamplers.0.": "decoder.up_blocks.3.",
    "decoder.up_blocks.1.": "decoder.up_blocks.4.",
    "encoder.down_blocks.0.downsamplers.0.": "encoder.down_blocks.1.",
    "encoder.down_blocks.0.": "encoder.down_blocks.0.",
    "encoder.down_blocks.1.": "encoder.down_blocks.2.",
    "encoder.mid_block.": "encoder.down_blocks.8.",
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}
"""The beginnings of names in Lightricks' files, of the parts that the tiny VAE has."""


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest) -> ModuleType:
    return TINY[request.param]


@pytest.fixture(scope="module")
def folder(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("ltx2"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ltx2.write_folder(tmp_path_factory.mktemp("plain"))


def test_the_publishers_names_are_those_that_the_stock_converter_reads(
    tiny: ModuleType, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of sound too. A checkpoint also has connectors, of which the denoiser has no use."""
    tensors = load_file(folder / "transformer" / WEIGHTS)
    original = LTX2_LAYOUT.to_original(tensors)
    assert not {"proj_in.weight", "audio_proj_in.weight", "time_embed.linear.weight"} & original.keys()
    # The stock converter does not know what LTX-2.3 has more.
    again = {
        name.replace("prompt_adaln_single.", "prompt_adaln."): tensor
        for name, tensor in convert_ltx2_transformer_to_diffusers(dict(original)).items()
    }
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)

    connector = {"video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}
    file = {f"model.diffusion_model.{name}": tensor.contiguous() + 1 for name, tensor in (original | connector).items()}
    save_file({**file, "vae.decoder.conv_in.conv.weight": torch.zeros(1)}, tmp_path / "ltx-2.safetensors")
    ltx = tiny.pipeline(folder, transformer_path=tmp_path / "ltx-2.safetensors")
    read = dict(generic.loaded(ltx).denoiser.named_parameters())
    assert all(torch.equal(read[name], tensors[name] + 1) for name in read)
    assert "has no use for" not in caplog.text
    ltx.weights.check_fit()


def lightricks_name(name: str) -> str:
    ours = next((start for start in OTHER_NAMES if name.startswith(start)), "")
    return (OTHER_NAMES.get(ours, "") + name.removeprefix(ours)).replace("resnets.", "res_blocks.")


@pytest.mark.parametrize("prefix", ["vae.", ""])
def test_the_publishers_vae_is_read(plain: Path, tmp_path: Path, prefix: str) -> None:
    """With the denoiser and the VAE of sound in one file, and alone."""
    tensors = load_file(plain / "vae" / WEIGHTS)
    theirs = {prefix + lightricks_name(name): tensor + 1 for name, tensor in tensors.items()}
    beside = ("model.diffusion_model.patchify_proj.weight", "audio_vae.per_channel_statistics.mean-of-means")
    theirs |= dict.fromkeys(beside if prefix else (), torch.zeros(2))
    theirs[f"{prefix}per_channel_statistics.mean-of-stds"] = torch.ones(4)
    save_file({name: tensor.clone() for name, tensor in theirs.items()}, tmp_path / "ltx-2.safetensors")
    autoencoder = tiny_ltx2.pipeline(plain, vae_path=tmp_path / "ltx-2.safetensors").encoders()[0]
    autoencoder.check()
    autoencoder.load(torch.device("cpu"))
    read = autoencoder.vae.state_dict()
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name] + 1) for name in read)


def test_a_given_first_frame_has_no_noise_and_the_time_0(tiny: ModuleType, folder: Path) -> None:
    """As the stock transformer with a time for each token, which the stock pipeline of picture to video gives it
    beside the noise level; that frame does not count, and a sample without a given one is as before."""
    ltx = tiny.pipeline(folder, first_frame_share=0.5)
    staged, shape = generic.loaded(ltx), (2, 4, 3, 4, 6)
    x_t, clean, weights = (normal(shape, 0, name) for name in ("x", "clean", "weights"))
    t_B, given_B = torch.tensor([0.2513, 0.913]), torch.tensor([1, 0])
    features = {**tiny.features((5, 11)), "latents": clean, "given_frames": given_B}
    stream = ltx.prepare_inputs(features, x_t, t_B)
    for layer in staged.layers:
        stream = layer(stream)
    (stream * weights * loss_weights(given_B, 3)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in staged.denoiser.named_parameters()}

    seen, time_BT, counted = x_t.clone(), t_B[:, None].repeat(1, 3 * 4 * 6), torch.ones(shape)
    seen[0, :, 0], time_BT[0, : 4 * 6] = clean[0, :, 0], 0
    counted[0, :, 0], counted[0, :, 1:] = 0.0, 1.5
    reference = generic.loaded(ltx).denoiser
    expected = tiny.whole(reference, ltx, features, seen, time_BT, level_B=t_B)
    (expected * weights * counted).sum().backward()
    torch.testing.assert_close(stream, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_the_export_of_a_full_fine_tune_has_what_belongs_to_sound(plain: Path, tmp_path: Path) -> None:
    base = load_file(plain / "transformer" / WEIGHTS)
    generic.moved(generic.Model("ltx2", plain, tiny_ltx2), tmp_path, None, "both")
    found = load_file(tmp_path / "transformer" / WEIGHTS)
    sound = {name for name in base if OF_SOUND.search(name)}
    assert found.keys() == base.keys() and 0 < len(sound) < len(base)
    assert {name for name in base if torch.equal(found[name], base[name])} == sound
    _, report = LTX2VideoTransformer3DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    comfyui = load_file(tmp_path / generic.DENOISER_COMFYUI)
    assert comfyui.keys() == LTX2_LAYOUT.to_original(found).keys()


def test_one_stage_alone_exports_what_belongs_to_sound(plain: Path) -> None:
    ltx = tiny_ltx2.pipeline(plain)
    settings = settings_of(ltx, pipeline_stages=2)
    plans = [export_plan(ltx, settings, load_stage(ltx, settings, stage)) for stage in (0, 1)]
    assert [bool(plan.beside) for plan in plans] == [True, False]
    adapted = settings_of(ltx, LoraSettings(type="lora", rank=2))
    assert not export_plan(ltx, adapted, load_stage(ltx, adapted, 0)).beside


def test_from_scratch_what_belongs_to_sound_is_drawn_with_the_rest(plain: Path) -> None:
    ltx = tiny_ltx2.pipeline(plain, from_scratch=True)
    torch.manual_seed(1)
    denoiser, beside = ltx.weights.build(), ltx.weights.beside()
    assert {name: read().shape for name, read in beside.items()} == {
        name: tensor.shape for name, tensor in load_file(plain / "transformer" / WEIGHTS).items() if name in beside
    }
    first = next(name for name in beside if name.endswith("audio_attn1.to_q.weight"))
    assert beside[first]().std() > 0 and torch.equal(beside[first](), ltx.weights.beside()[first]())
    assert not beside.keys() & dict(denoiser.named_parameters()).keys()


def test_what_belongs_to_sound_is_neither_held_nor_adapted(tiny: ModuleType, folder: Path) -> None:
    staged = generic.loaded(tiny.pipeline(folder), LoraSettings(type="lora", rank=2))
    assert staged.trained(staged.layers) and not any(map(OF_SOUND.search, dict(staged.denoiser.named_parameters())))


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_of_an_adapter_for_both_streams_the_videos_part_is_read(
    plain: Path, tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As a preset, and to go on from; one for sound alone is refused."""
    file = tmp_path / "both.safetensors"
    modules = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.audio_attn1.to_q")
    sizes = (tiny_ltx2.TRANSFORMER["cross_attention_dim"], tiny_ltx2.TRANSFORMER["audio_cross_attention_dim"])
    factors = {
        f"{prefix}{module}.lora_{part}.weight": normal(shape, 0, module, part)
        for module, size in zip(modules, sizes, strict=True)
        for part, shape in (("A", (2, size)), ("B", (size, 2)))
    }
    save_file(factors, file)
    given = [{"path": file, "weight": 1.0, "fused": True}]
    bare, preset = (
        dict(generic.loaded(tiny_ltx2.pipeline(plain, **keys)).denoiser.named_parameters())
        for keys in ({}, {"preset_adapters": given})
    )
    changed = {name for name in bare if not torch.equal(bare[name], preset[name])}
    assert changed == {f"{modules[0]}.weight"}
    up, down = (factors[f"{prefix}{modules[0]}.lora_{part}.weight"] for part in ("B", "A"))
    torch.testing.assert_close(preset[f"{modules[0]}.weight"], bare[f"{modules[0]}.weight"] + up @ down)
    said = f"1 of its 2 modules are for what is not loaded of this model, the first is '{prefix}{modules[1]}'"
    assert f"{said}; they are left out" in caplog.text

    adapter = LoraSettings(type="lora", rank=2, include=[modules[0]], init_from_existing=file)
    staged = generic.loaded(tiny_ltx2.pipeline(plain), adapter)
    assert torch.equal(staged.trained(staged.layers)[f"{modules[0]}.lora_B.weight"], up)

    save_file({name: factor for name, factor in factors.items() if "audio" in name}, file)
    with pytest.raises(UserError, match="1 of its 1 modules are for what is not loaded .*give an adapter of what is"):
        generic.loaded(tiny_ltx2.pipeline(plain, preset_adapters=given))


def test_a_mask_of_ones_changes_nothing(plain: Path) -> None:
    """The stock pipeline gives one, as the connectors leave nothing masked; here there is none."""
    ltx = tiny_ltx2.pipeline(plain)
    shape, features = (2, *ltx.latent_shape(32, 64, 5)), tiny_ltx2.features((5, 11))
    denoiser, x_t, t_B = generic.loaded(ltx).denoiser, normal(shape, 0, "x"), torch.tensor([0.2, 0.9])
    bare = tiny_ltx2.whole(denoiser, ltx, features, x_t, t_B)
    mask_BL = torch.ones(2, tiny_ltx2.TEXT_TOKENS)
    masks = {name: mask_BL for name in ("encoder_attention_mask", "audio_encoder_attention_mask")}
    denoiser.register_forward_pre_hook(lambda module, args, keys: (args, {**keys, **masks}), with_kwargs=True)
    torch.testing.assert_close(tiny_ltx2.whole(denoiser, ltx, features, x_t, t_B), bare, rtol=1e-4, atol=1e-5)


def test_rotary_tables_may_be_interleaved(tmp_path: Path) -> None:
    """The default of the stock class, which published models do not have."""
    ltx = tiny_ltx2.pipeline(tiny_ltx2.write_folder(tmp_path, rope_type="interleaved"))
    shape, features = (2, *ltx.latent_shape(32, 64, 5)), tiny_ltx2.features((5, 11))
    batch = Batch(features, normal(shape, 0, "x"), torch.tensor([0.2, 0.9]))
    staged = generic.loaded(ltx)
    found = generic.output(ltx, staged.layers, batch)
    assert torch.equal(found, tiny_ltx2.whole(staged.denoiser, ltx, features, batch.x_t, batch.t_B))


def test_the_model_is_told_the_frames_per_second_of_its_clips(plain: Path) -> None:
    ltx = tiny_ltx2.pipeline(plain, frame_rate=12.5)
    features, x_t = tiny_ltx2.features((5,)), torch.zeros(1, *ltx.latent_shape(32, 64, 5))
    places, told = (
        one.prepare_inputs(features, x_t, torch.ones(1)).places_13T2 for one in (ltx, tiny_ltx2.pipeline(plain))
    )
    # Two frames to a cell, of which the first has one.
    assert ltx.media.fps == 12.5 and places[0, 0, -1].tolist() == pytest.approx([3 / 12.5, 5 / 12.5])
    assert told[0, 0, -1].tolist() == pytest.approx([3 / 24, 5 / 24]) and torch.equal(places[:, 1:], told[:, 1:])


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"in_channels": 16}, {}, "takes latents of 16 channels and the VAE makes 4; give LTX-2's own VAE"),
        ({"caption_channels": 8}, {}, "takes text of 8 features and the connectors make 16; give the connectors"),
        ({"use_prompt_embeddings": False}, {}, "takes text of 28 features and the connectors make 16"),
        ({"use_keyframes_abs_pos_embedding": True}, {}, "is LTX-2.5, which is not trained here; give LTX-2 or LTX-2.3"),
        ({"patch_size": 2}, {}, "takes patches of 2 x 2 cells and 1 frames together"),
        ({"vae_scale_factors": (8, 32, 32)}, {}, "counts 8 frames and 32 x 32 pixels to a cell, and the VAE's have 2"),
        ({}, {"max_sequence_length": 12}, "12 is no multiple of 8, as many learned tokens as the connectors have"),
    ],
)
def test_parts_that_do_not_belong_together(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    ltx = tiny_ltx2.pipeline(tiny_ltx2.write_folder(tmp_path, **changes), **options)
    with pytest.raises(UserError, match=said):
        ltx.check()


def test_a_file_of_gemma_may_have_the_tensors_for_text_alone(plain: Path, tmp_path: Path) -> None:
    """As ComfyUI's is named. Those for pictures are not kept anyway."""
    whole, own = load_file(plain / "text_encoder" / "model.safetensors"), "language_model."
    text = {name.removeprefix(own): tensor for name, tensor in whole.items() if name.startswith(own)}
    beside = {"spiece_model": torch.zeros(3, dtype=torch.uint8), "vision_model.weight": torch.zeros(1)}
    file = {name: tensor.clone() for name, tensor in text.items()} | beside
    save_file(file, tmp_path / "gemma.safetensors")
    given = [{"type": "gemma3", "path": tmp_path / "gemma.safetensors"}]
    own, other = (tiny_ltx2.pipeline(plain, **keys).encoders()[1] for keys in ({}, {"text_encoders": given}))
    other.check()
    expected, found = (encoded(one, ["a fox", ""])["gemma3"] for one in (own, other))
    assert text and torch.equal(found, expected)
    assert not any("vision" in name for name in dict(own.model.named_parameters()))
    (tmp_path / "gemma.safetensors").unlink()
    save_file({"model.norm.weight": text["model.norm.weight"].clone()}, tmp_path / "gemma.safetensors")
    with pytest.raises(UserError, match="the tensor 'language_model.embed_tokens.weight' of the model is not in"):
        other.check()


def test_connectors_that_read_another_gemma_are_refused(tmp_path: Path) -> None:
    place = tiny_ltx2.write_folder(tmp_path, connectors={"text_proj_in_factor": 7})
    with pytest.raises(UserError, match="read 7 states of 16 features for each token, and Gemma has 4 of 16"):
        tiny_ltx2.pipeline(place).check()


def test_connectors_without_weights_are_told(tmp_path: Path) -> None:
    place = tiny_ltx2.write_folder(tmp_path)
    (place / "connectors" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="connectors\n  no safetensors file here"):
        tiny_ltx2.pipeline(place).check()
