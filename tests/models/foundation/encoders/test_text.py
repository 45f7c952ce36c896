"""CLIP and T5 against the stock pipeline, from a diffusers folder and from single files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline as StockPipeline
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from models.flux import FluxPipeline
from models.foundation.encoders.text import TextEncoder, load_tokenizer
from models.foundation.encoders.text_features import ClipPooled, T5Features, TrueLengthFeatures
from tests.models.tiny_flux import MINI_FLUX, TEXT_TOKENS
from tests.models.tiny_folder import tiny
from utils.dataset.samples import Bucket
from utils.errors import UserError
from utils.settings.model_schema import TextEncoderFile

Tensors = dict[str, torch.Tensor]
CAPTIONS = ["a red star on a white background", "", "two blue circles " * 40]


CLIP, T5 = FluxPipeline.text_parts


def t5(folder: Path, file: Path | None, dtype: torch.dtype, length: int) -> TextEncoder:
    return TextEncoder(T5, folder, file, dtype, T5Features(length))


def encoder(name: str, file: Path | None = None, dtype: torch.dtype = torch.float32) -> TextEncoder:
    if name == "clip":
        return TextEncoder(CLIP, MINI_FLUX, file, dtype, ClipPooled())
    return t5(MINI_FLUX, file, dtype, TEXT_TOKENS)


def features(made: TextEncoder) -> torch.Tensor:
    made.load(torch.device("cpu"))
    (encoded,) = made.encode(CAPTIONS).values()
    return encoded


def shipped(name: str) -> Tensors:
    folder = {"clip": "text_encoder", "t5": "text_encoder_2"}[name]
    return load_file(MINI_FLUX / folder / "model.safetensors")


def as_clip_l(tensors: Tensors) -> Tensors:
    """Keys of clip_l.safetensors: of a whole CLIP, of which the text model's projection and ids are not used."""
    prefixed = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    extra = {"text_model.embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": torch.eye(32)}
    return prefixed | extra


def as_t5xxl(tensors: Tensors) -> Tensors:
    """Keys of t5xxl.safetensors: the embedding is there once, as "shared"."""
    return {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name}


AS_SINGLE_FILE = {"clip": as_clip_l, "t5": as_t5xxl}


@torch.no_grad()
def test_features_are_those_of_the_stock_pipeline() -> None:
    stock = StockPipeline.from_pretrained(MINI_FLUX, transformer=None, vae=None)
    text_BLD, pooled_BD, _ = stock.encode_prompt(CAPTIONS, None, device="cpu", max_sequence_length=TEXT_TOKENS)
    assert torch.equal(features(encoder("clip")), pooled_BD)
    assert torch.equal(features(encoder("t5")), text_BLD)


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_promised_shapes_are_those_that_come(name: str) -> None:
    made = encoder(name, dtype=torch.bfloat16)
    (shape, dtype), encoded = *made.feature_shapes(Bucket(64, 64, 1)).values(), features(made)
    assert (encoded.shape[1:], encoded.dtype) == (shape, dtype)


@pytest.mark.parametrize("name", ["clip", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_file_equals_the_folder(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    save_file(AS_SINGLE_FILE[name](shipped(name)), tmp_path / "model.safetensors")
    from_file = encoder(name, tmp_path / "model.safetensors", dtype)
    assert torch.equal(features(from_file), features(encoder(name, dtype=dtype)))


def test_t5_keeps_its_large_numbers_in_float32(tmp_path: Path) -> None:
    """In float16 the output of a large T5's feed-forward layers overflows; transformers keeps them in float32."""
    file = tmp_path / "t5.safetensors"
    save_file(as_t5xxl(shipped("t5")), file)
    for made in (encoder("t5", file, torch.float16), encoder("t5", None, torch.float16)):
        made.load(torch.device("cpu"))
        kept = {name: p.dtype for name, p in made.model.named_parameters()}
        assert all((dtype == torch.float32) == name.endswith(".wo.weight") for name, dtype in kept.items())


def test_8_bit_files_are_cast_and_scaled(tmp_path: Path) -> None:
    fp8 = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in as_t5xxl(shipped("t5")).items()}
    plain, scaled = tmp_path / "fp8.safetensors", tmp_path / "fp8_scaled.safetensors"
    save_file(fp8, plain)
    key = "encoder.block.0.layer.0.SelfAttention.k.weight"
    save_file(
        {
            **fp8,
            key: (fp8[key].float() * 2).to(torch.float8_e4m3fn),
            "scaled_fp8": torch.zeros(2),
            key.replace("weight", "scale_weight"): torch.tensor(0.5),
        },
        scaled,
    )
    made = encoder("t5", plain, torch.bfloat16)
    encoded = features(made)
    assert torch.equal(dict(made.model.named_parameters())[key], fp8[key].bfloat16())
    assert torch.equal(features(encoder("t5", scaled, torch.bfloat16)), encoded)


def test_fingerprint_tells_what_changes_the_features() -> None:
    file = MINI_FLUX / "text_encoder_2" / "model.safetensors"
    different = [
        encoder("clip"),
        encoder("t5"),
        encoder("t5", dtype=torch.bfloat16),
        encoder("t5", file),
        t5(MINI_FLUX, None, torch.float32, TEXT_TOKENS + 1),
    ]
    assert len({made.fingerprint for made in different}) == len(different)
    assert encoder("t5").fingerprint == encoder("t5").fingerprint


def test_what_is_read_is_named_in_keys_as_it_always_was() -> None:
    """Another repr of the features would encode the captions of every cache anew."""
    names = ["clip_pooled", "T5Features(length=24)", "TrueLengthFeatures(name='t5', length=24, padding_tokens=1)"]
    assert [repr(how) for how in (ClipPooled(), T5Features(24), TrueLengthFeatures("t5", 24, 1))] == names


def test_the_configuration_of_another_encoder_is_told(tmp_path: Path) -> None:
    file = Path(shutil.copytree(MINI_FLUX / "text_encoder", tmp_path / "text_encoder_2")) / "config.json"
    with pytest.raises(UserError, match="is a configuration of clip_text_model; one of t5 belongs here"):
        t5(tmp_path, None, torch.float32, TEXT_TOKENS)
    file.write_text((MINI_FLUX / "text_encoder_2" / "config.json").read_text().replace("d_model", "width"))
    with pytest.raises(UserError, match="lacks `d_model`; download it again"):
        t5(tmp_path, None, torch.float32, TEXT_TOKENS)


MISTAKES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "another model's": (lambda tensors: {"double_blocks.0.img_mod.lin.weight": torch.zeros(2)}, "is not in the file"),
    "a missing block": (
        lambda tensors: {name: t for name, t in tensors.items() if "block.1.layer.1.DenseReluDense.wo" not in name},
        "'encoder.block.1.layer.1.DenseReluDense.wo.weight' of the model is not in the file",
    ),
    "another size": (
        lambda tensors: {**tensors, "shared.weight": tensors["shared.weight"][:, :3].contiguous()},
        "'shared.weight' is [376, 3], but the model's configuration asks for [376, 64]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, mistake: str) -> None:
    change, message = MISTAKES[mistake]
    file = tmp_path / "t5.safetensors"
    save_file(change(as_t5xxl(shipped("t5"))), file)
    with pytest.raises(UserError) as raised:
        encoder("t5", file).load(torch.device("cpu"))
    assert message in str(raised.value) and str(file) in str(raised.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = (MINI_FLUX / "text_encoder" / "model.safetensors").read_bytes()
    (tmp_path / "clip.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="download it again"):
        encoder("clip", tmp_path / "clip.safetensors").load(torch.device("cpu"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_check_tells_the_same_from_headers_alone(tmp_path: Path, mistake: str) -> None:
    change, message = MISTAKES[mistake]
    save_file(change(as_t5xxl(shipped("t5"))), tmp_path / "t5.safetensors")
    with pytest.raises(UserError) as raised:
        encoder("t5", tmp_path / "t5.safetensors").check()
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_a_check_is_silent_about_what_can_be_loaded(tmp_path: Path, name: str) -> None:
    save_file(AS_SINGLE_FILE[name](shipped(name)), tmp_path / "model.safetensors")
    for file in (None, tmp_path / "model.safetensors", tmp_path):
        encoder(name, file).check()


def test_a_folder_may_hold_a_file_of_any_name(tmp_path: Path) -> None:
    save_file(as_t5xxl(shipped("t5")), tmp_path / "t5xxl_fp32.safetensors")
    assert torch.equal(features(encoder("t5", tmp_path)), features(encoder("t5")))


def save_config(folder: Path, **changes: int) -> None:
    """Other numbers into a configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_folder_with_an_encoder_of_another_size_is_told(tmp_path: Path) -> None:
    """It is whole in itself; the model would meet its features after the captions are encoded."""
    config = T5Config(vocab_size=376, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is an encoder of hidden_size 8, and the model's own has 64") as raised:
        encoder("t5", tmp_path).check()
    assert str(tmp_path / "config.json") in str(raised.value)


SPOILT_TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no words": (lambda folder: (folder / "tokenizer.json").unlink(), "the tokenizer's words are missing"),
    "words that are none": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    "no settings": (lambda folder: (folder / "tokenizer_config.json").write_text("{}"), "names no `pad_token`"),
    "no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json\n  is not JSON"),
    "another model's": (
        lambda folder: shutil.copytree(MINI_FLUX / "tokenizer", folder, dirs_exist_ok=True),
        "this tokenizer has 1217 tokens, and the encoder in text_encoder_2 knows 376",
    ),
    "of fewer words": (
        lambda folder: save_config(folder.parent / "text_encoder_2", vocab_size=1000),
        "this tokenizer has 376 tokens, and the encoder in text_encoder_2 knows 1000",
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT_TOKENIZERS)
def test_a_tokenizer_that_is_not_whole_is_told(tmp_path: Path, spoilt: str) -> None:
    change, message = SPOILT_TOKENIZERS[spoilt]
    shutil.copytree(MINI_FLUX / "text_encoder_2", tmp_path / "text_encoder_2")
    change(Path(shutil.copytree(MINI_FLUX / "tokenizer_2", tmp_path / "tokenizer_2")))
    with pytest.raises(UserError) as raised:
        t5(tmp_path, None, torch.float32, TEXT_TOKENS).check()
    assert message in str(raised.value)


def test_a_folder_that_lacks_a_tensor_is_told(tmp_path: Path) -> None:
    """transformers would go on with random numbers."""
    broken = shutil.copytree(MINI_FLUX / "text_encoder_2", tmp_path / "t5")
    tensors = load_file(broken / "model.safetensors")
    lost = next(name for name in tensors if "SelfAttention.q" in name)
    save_file({name: t for name, t in tensors.items() if name != lost}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=lost):
        t5(MINI_FLUX, broken, torch.float32, 16).load(torch.device("cpu"))


@torch.no_grad()
def test_features_at_their_true_length_are_the_padded_ones_before_the_padding() -> None:
    """Wan's encoder, and how its stock pipeline calls it: padded and masked, what follows a caption set to zero."""
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=1000, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    umt5, tokenizer = UMT5EncoderModel(config).eval(), load_tokenizer(MINI_FLUX / "tokenizer_2")
    padded = tokenizer(CAPTIONS, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    hidden_BLD = umt5(padded.input_ids, attention_mask=padded.attention_mask)[0]
    made = TrueLengthFeatures("umt5", 24)(umt5, tokenizer, CAPTIONS)
    lengths = padded.attention_mask.sum(1).tolist()
    assert [len(features_LD) for features_LD in made["umt5"]] == lengths
    assert [mask_L.sum().item() for mask_L in made["umt5_mask"]] == lengths and min(lengths) < 24
    for features_LD, whole_LD in zip(made["umt5"], hidden_BLD, strict=True):
        torch.testing.assert_close(features_LD, whole_LD[: len(features_LD)])


def test_captions_that_are_too_long_are_counted() -> None:
    made = encoder("t5")
    made.load(torch.device("cpu"))
    made.encode(CAPTIONS)
    made.encode(CAPTIONS[:1])
    assert made.truncated == 1
    assert made.token_count(CAPTIONS[2]) > made.token_limit == TEXT_TOKENS


@pytest.mark.parametrize("with_vision", [False, True])
@pytest.mark.parametrize("name", ["ernie_image", "flux2_dev", "minimax_h3"])
def test_comfyuis_files_have_the_names_of_models_of_texts(tmp_path: Path, name: str, with_vision: bool) -> None:
    """Of encoders that see pictures, with or without what sees them."""
    module = tiny(name)
    module.write_folder(tmp_path)
    file, asked = tmp_path / "text.safetensors", module.pipeline(tmp_path).encoders()[1]
    asked.load(torch.device("cpu"))
    own = {key: tensor.clone() for key, tensor in asked.model.state_dict().items()}
    theirs = {
        key.replace("language_model.", "model."): own[key] for key in own if "language_model." in key or with_vision
    }
    assert "model.layers.0.self_attn.q_proj.weight" in theirs and len(theirs) < len(own) or with_vision
    save_file(theirs, file)
    read = module.pipeline(tmp_path, text_encoders=[TextEncoderFile(type=asked.name, path=file)]).encoders()[1]
    read.check()
    read.load(torch.device("cpu"))
    made = (one.encode(caption=["a red fox"])[asked.name][0] for one in (asked, read))
    assert torch.equal(*made)
