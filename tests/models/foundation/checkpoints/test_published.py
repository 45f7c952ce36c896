"""Single files without a diffusers folder: which architecture they are, where tokenizers come from, what is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file

import models
from models.base import BasePipeline
from models.flux import FluxOptions
from models.foundation.checkpoints import published
from models.foundation.checkpoints.layouts.flux import BFL_LAYOUT
from models.foundation.checkpoints.published import CONFIGS, Architecture, architectures
from models.foundation.checkpoints.stock import of_transformers
from tests.models import tiny_flux
from tests.models.foundation.checkpoints.test_gguf_files import finished
from utils.errors import UserError
from utils.first_values import none_without_memory
from utils.settings.model_schema import TextEncoderFile

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
BILLIONS = {
    "anima/2b": 2.09,
    "auraflow/0.1": 6.83,
    "auraflow/0.3": 6.86,
    "chroma/chroma1": 8.90,
    "cosmos/14b_t2w": 14.27,
    "cosmos/14b_v2w": 14.27,
    "cosmos/7b_t2w": 7.24,
    "cosmos/7b_v2w": 7.24,
    "cosmos_predict2/14b_t2i": 14.27,
    "cosmos_predict2/14b_v2w": 14.27,
    "cosmos_predict2/2b_t2i": 1.96,
    "cosmos_predict2/2b_v2w": 1.96,
    "flux/dev": 11.90,
    "flux/schnell": 11.89,
    "flux2/dev": 32.22,
    "flux2/klein_4b": 3.88,
    "flux2/klein_9b": 9.08,
    "hidream/i1": 17.11,
    "hunyuan_dit/1.1": 1.52,
    "hunyuan_dit/1.2": 1.50,
    "hunyuan_image/2.1": 17.43,
    "hunyuan_video/t2v": 12.82,
    "hunyuan_video_15/480p_t2v": 8.33,
    "hunyuan_video_15/480p_i2v": 8.33,
    "hunyuan_video_15/720p_i2v": 8.33,
    "hunyuan_video_15/720p_t2v": 8.33,
    "kandinsky5/lite_i2v": 2.01,
    "kandinsky5/lite_t2i": 6.02,
    "kandinsky5/lite_t2v": 2.01,
    "kandinsky5/pro_i2v": 19.31,
    "kandinsky5/pro_t2v": 19.31,
    "krea2/raw": 12.82,
    "krea2/turbo": 12.82,
    "ltx_video/13b": 13.04,
    "ltx_video/2b_0.9.0": 1.92,
    "ltx_video/2b_0.9.1": 1.92,
    "ltx_video/2b_0.9.5": 1.92,
    "lumina2/2b": 2.61,
    "omnigen2/4b": 3.97,
    "pixart/alpha_1024": 0.61,
    "pixart/alpha_512": 0.61,
    "pixart/sigma_1024": 0.61,
    "pixart/sigma_2k": 0.61,
    "pixart/sigma_512": 0.61,
    "qwen_image/20b": 20.43,
    "qwen_image/edit_2511": 20.43,
    "qwen_image_layered/20b": 20.43,
    "sd15/1.5": 0.86,
    "sd3/3.5_large": 8.15,
    "sd3/3.5_medium": 2.47,
    "sd3/3_medium": 2.08,
    "sdxl/base": 2.57,
    "wan/2.1_t2v_1.3b": 1.42,
    "wan/2.1_flf2v_14b": 16.40,
    "wan/2.1_i2v_14b": 16.39,
    "wan/2.1_t2v_14b": 14.29,
    "wan/2.2_i2v_a14b": 14.29,
    "wan/2.2_t2v_a14b": 14.29,
    "wan/2.2_ti2v_5b": 5.00,
    "wan_vace/2.1_1.3b": 2.15,
    "wan_vace/2.1_14b": 17.34,
    "z_image/6b": 6.15,
}
"""Parameters of the published denoisers."""
MILLIONS = {
    "byt5_small_glyph": 219,
    "bert_chinese_large": 352,
    "clip_g": 695,
    "clip_vit_h": 631,
    "clip_l": 124,
    "gemma2_2b": 2614,
    "llama3_8b_llava": 7505,
    "llama3_1_8b": 7505,
    "long_clip_g": 695,
    "long_clip_l": 124,
    "mistral_small_3_24b": 23340,
    "mt5_xl": 1670,
    "pile_t5_xl": 1224,
    "qwen2_5_vl_3b": 3755,
    "qwen2_5_vl_7b": 8292,
    "qwen2_5_vl_7b_text": 7071,
    "qwen3_0.6b": 596,
    "qwen3_4b": 4022,
    "qwen3_8b": 7568,
    "qwen3_vl_4b": 4438,
    "siglip_so400m_384": 428,
    "t5_11b": 4865,
    "t5_xxl": 4762,
    "umt5_xxl": 5681,
}
"""Parameters of the published encoders of texts and pictures, tied ones once."""
SAME_TENSORS = [
    {f"hunyuan_video_15/{size}p_{task}" for size in (480, 720) for task in ("i2v", "t2v")},
    {"kandinsky5/lite_i2v", "kandinsky5/lite_t2v"},
    {"kandinsky5/pro_i2v", "kandinsky5/pro_t2v"},
    {"krea2/raw", "krea2/turbo"},
    {"ltx_video/2b_0.9.0", "ltx_video/2b_0.9.1", "ltx_video/2b_0.9.5"},
    {"pixart/alpha_512", *(f"pixart/sigma_{size}" for size in ("512", "1024", "2k"))},
    {"qwen_image/20b", "qwen_image/edit_2511"},
    {"wan/2.1_t2v_14b", "wan/2.2_t2v_a14b"},
]
"""Architectures that the denoiser's tensors do not tell apart."""
CLASSES = {
    "bert": "BertModel",
    "clip_text_model": "CLIPTextModelWithProjection",
    "clip_vision_model": "CLIPVisionModel",
    "gemma2": "Gemma2Model",
    "llama": "LlamaModel",
    "mistral3": "Mistral3Model",
    "mt5": "MT5EncoderModel",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_5_vl_text": "Qwen2_5_VLTextModel",
    "qwen3": "Qwen3Model",
    "qwen3_vl": "Qwen3VLModel",
    "siglip_vision_model": "SiglipVisionModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
}


def shapes_of_all() -> dict[str, frozenset]:
    """Names and shapes of the parameters of each published denoiser."""
    found = {}
    for place in sorted(CONFIGS.glob("*/*.json")):
        kind, architecture = place.parent.name, Architecture(place)
        pipeline = models.build(models.find(kind).Options(type=kind, architecture=architecture.name))
        denoiser = pipeline.weights.build_empty()
        found[f"{kind}/{architecture.name}"] = frozenset((n, p.shape) for n, p in denoiser.named_parameters())
        # Every other part can be made of its configuration too.
        assert pipeline.encoders() and pipeline.scheduler()
    return found


def test_published_denoisers_have_their_size_and_what_their_tensors_do_not_tell_is_known() -> None:
    shapes = shapes_of_all()
    counted = {name: round(sum(shape.numel() for _, shape in one) / 1e9, 2) for name, one in shapes.items()}
    assert counted == BILLIONS
    alike: dict[frozenset, set[str]] = {}
    for name, one in shapes.items():
        alike.setdefault(one, set()).add(name)
    assert [names for names in alike.values() if len(names) > 1] == SAME_TENSORS


@pytest.mark.parametrize("name", sorted(MILLIONS))
def test_published_encoders_have_their_size(name: str) -> None:
    (file,) = (CONFIGS / "shared").glob(f"*_encoder/{name}.json")
    config = json.loads(file.read_text())
    cls = of_transformers(CLASSES[config["model_type"]])
    with none_without_memory(), init_empty_weights():
        encoder = cls(cls.config_class.from_dict(config))
    tied = ["encoder.embed_tokens.weight", *(["lm_head.weight"] if config.get("tie_word_embeddings") else [])]
    own = {key: value for key, value in encoder.named_parameters() if key not in tied}
    assert round(sum(value.numel() for value in own.values()) / 1e6) == MILLIONS[name]


def test_each_shared_configuration_is_used() -> None:
    content = " ".join(file.read_text() for file in CONFIGS.glob("*/*.json"))
    shared = [file.relative_to(CONFIGS / "shared").with_suffix("") for file in CONFIGS.glob("shared/*/*.json")]
    assert shared and [place for place in shared if f'"{place.as_posix()}"' not in content] == []


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The parts of a tiny Flux as single files, the denoiser's with the publisher's names, and its tokenizers."""
    linked = tmp_path / "linked"
    linked.mkdir()
    folder = tiny_flux.write_folder(linked)
    place = tmp_path / "files"
    place.mkdir()
    for part in ("vae", "text_encoder", "text_encoder_2"):
        (weights,) = (folder / part).glob("*.safetensors")
        shutil.copy(weights, place / f"{part}.safetensors")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    save_file(
        {key: tensor.contiguous() for key, tensor in BFL_LAYOUT.to_original(load_file(weights)).items()},
        place / "flux.safetensors",
    )
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / part, place / part)
    monkeypatch.setattr(published, "CONFIGS", tmp_path / "configs")
    write_architecture(tmp_path, "tiny", folder)
    return place


def write_architecture(tmp_path: Path, name: str, folder: Path, **changes: Any) -> None:
    """An architecture like the folder, with these changes of the transformer's configuration."""
    content: dict[str, Any] = {"model_index": {"_class_name": "FluxPipeline"}}
    for part in (*PARTS, "scheduler"):
        file = next(file for file in (folder / part).glob("*config.json") if "generation" not in file.name)
        content[part] = json.loads(file.read_text())
    content["transformer"] |= changes
    (tmp_path / "configs" / "flux").mkdir(parents=True, exist_ok=True)
    (tmp_path / "configs" / "flux" / f"{name}.json").write_text(json.dumps(content))


def options_of(files: Path, **keys: Any) -> FluxOptions:
    texts = {"clip": "text_encoder.safetensors", "t5": "text_encoder_2.safetensors"}
    return FluxOptions(
        **{
            "type": "flux",
            "dtype": "float32",
            "max_sequence_length": tiny_flux.TEXT_TOKENS,
            "transformer_path": files / "flux.safetensors",
            "vae_path": files / "vae.safetensors",
            "text_encoders": [TextEncoderFile(type=name, path=files / file) for name, file in texts.items()],
            **keys,
        }
    )


def built(files: Path, **keys: Any) -> BasePipeline:
    pipeline = models.build(options_of(files, **keys))
    pipeline.check()
    return pipeline


def told(files: Path, **keys: Any) -> str:
    with pytest.raises(UserError) as raised:
        built(files, **keys)
    return str(raised.value)


def test_single_files_are_the_folder(files: Path, tmp_path: Path) -> None:
    ours, theirs = built(files), tiny_flux.pipeline(tmp_path / "linked")
    for own, other in zip(ours.encoders(), theirs.encoders(), strict=True):
        own.load(torch.device("cpu"))
        other.load(torch.device("cpu"))
        if own.name == "vae":
            pixels = torch.rand(1, 3, 1, 64, 64)
            assert torch.equal(own.encode(pixels=pixels)["latents"], other.encode(pixels=pixels)["latents"])
        else:
            made, asked = own.encode(caption=["a red fox"]), other.encode(caption=["a red fox"])
            assert all(torch.equal(torch.as_tensor(made[key][0]), torch.as_tensor(asked[key][0])) for key in asked)
    denoiser = ours.weights.build_empty()
    sources = [pipeline.weights.open(denoiser) for pipeline in (ours, theirs)]
    for name, _ in denoiser.named_parameters():
        assert torch.equal(*(source.read(name) for source in sources))
    # What is recorded of the run can be read again, and names no folder that is gone with the process.
    assert ours.options.as_given() == options_of(files, architecture="tiny")


def test_the_architecture_follows_from_the_tensors(files: Path, tmp_path: Path) -> None:
    for name, changes in {"undistilled": {"guidance_embeds": False}, "deeper": {"num_layers": 3}}.items():
        write_architecture(tmp_path, name, tmp_path / "linked", **changes)
    assert built(files).options.architecture == "tiny"
    save_file({"other": torch.zeros(1)}, files / "other.safetensors")
    message = told(files, transformer_path=files / "other.safetensors")
    assert "the files fit none that is known: deeper, tiny, undistilled" in message
    # The file may be of another type.
    save_file(
        {
            "double_stream_modulation_img.lin.weight": torch.zeros(1),
            "single_stream_modulation.lin.weight": torch.zeros(1),
        },
        files / "other.safetensors",
    )
    assert 'set [model] type = "flux2"' in told(files, transformer_path=files / "other.safetensors")
    assert "'wider' is not known; deeper, tiny, undistilled are" in told(files, architecture="wider")
    # A name is not a wish.
    assert "'double_blocks.2.img_attn.qkv.weight' is missing" in told(files, architecture="deeper")


def test_architectures_that_the_files_do_not_tell_apart_are_to_be_named(files: Path, tmp_path: Path) -> None:
    write_architecture(tmp_path, "twin", tmp_path / "linked")
    assert "the files fit tiny and twin; name the one that they are" in told(files)
    assert built(files, architecture="twin").options.architecture == "twin"
    marked = tmp_path / "configs" / "flux" / "twin.json"
    marked.write_text(json.dumps({**json.loads(marked.read_text()), "marked_by": "__twin__", "note": "this is new"}))
    assert built(files).options.architecture == "tiny"
    tensors = load_file(files / "flux.safetensors")
    save_file({**tensors, "model.__twin__": torch.zeros(1)}, files / "flux.safetensors")
    assert built(files).options.architecture == "twin"


def test_what_is_missing_is_told_by_what_names_it(files: Path) -> None:
    shutil.rmtree(files / "tokenizer_2")
    message = told(files, vae_path=None, text_encoders=options_of(files).text_encoders[1:])
    assert "[model] vae_path\n  the weights of the part vae are needed" in message
    assert 'as an entry { type = "clip", path = ... }' in message
    assert "the tokenizer of the text encoder 't5' is missing" in message
    assert f"beside {files / 'text_encoder_2.safetensors'}" in message
    assert str(published.tempfile.gettempdir()) + "/flux-" not in message
    with pytest.raises(UserError, match="for cogview4 none are in configs/"):
        models.build(models.find("cogview4").Options(type="cogview4", transformer_path=files / "flux.safetensors"))


def test_tokenizers_lie_where_users_have_them(files: Path, tmp_path: Path) -> None:
    def words(**keys: Any) -> Mapping[str, int]:
        return built(files, **keys).encoders()[2].tokenizer.get_vocab()

    asked = words()
    # A folder that gives nothing is not passed over for what lies beside the files.
    (tmp_path / "none").mkdir()
    assert "none has no tokenizer in it" in told(files, tokenizer_path=tmp_path / "none")
    given, beside = tmp_path / "given", files / "text_encoder_2"
    shutil.copytree(files / "tokenizer", given / "clip")
    shutil.move(files / "tokenizer_2", given / "t5")
    assert words(tokenizer_path=given) == asked
    shutil.move(given / "t5", beside)
    assert words() == asked
    # Settings are the publisher's where the folder has none; those that it has count.
    (beside / "tokenizer_config.json").unlink()
    assert words() == asked


def test_a_vocabulary_inside_the_weights_is_read(files: Path, tmp_path: Path) -> None:
    shutil.rmtree(files / "tokenizer_2")
    file = files / "text_encoder_2.safetensors"
    bytes_ = torch.from_numpy(np.frombuffer(b"not a vocabulary", dtype=np.uint8).copy())
    save_file({**load_file(file), "spiece_model": bytes_}, file)
    pipeline = models.build(options_of(files))
    made = pipeline.options.diffusers_path / "tokenizer_2"
    assert (made / "spiece.model").read_bytes() == b"not a vocabulary"
    assert json.loads((made / "tokenizer_config.json").read_text())["tokenizer_class"]
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        pipeline.check()


def test_a_gguf_may_hold_the_vocabulary(files: Path) -> None:
    own = json.loads((files / "tokenizer_2" / "tokenizer.json").read_text())["model"]["vocab"]
    asked = built(files).encoders()[2].tokenizer("a red star").input_ids
    shutil.rmtree(files / "tokenizer_2")
    writer = gguf.GGUFWriter(files / "t5.gguf", "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_token_list([token for token, _ in own])
    writer.add_token_scores([score for _, score in own])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(own))
    for add, token in ((writer.add_pad_token_id, 0), (writer.add_eos_token_id, 1), (writer.add_unk_token_id, 2)):
        add(token)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    finished(writer, files / "t5.gguf")
    texts = [options_of(files).text_encoders[0], TextEncoderFile(type="t5", path=files / "t5.gguf")]
    pipeline = models.build(options_of(files, text_encoders=texts))
    assert pipeline.encoders()[2].tokenizer("a red star").input_ids == asked


def test_the_architectures_of_a_type_are_listed() -> None:
    assert [one.name for one in architectures("flux")] == ["dev", "schnell"]
