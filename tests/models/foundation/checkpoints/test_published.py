"""Single files without a diffusers folder: which architecture they are, where tokenizers come from, what is told."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

import models
from models.base import BasePipeline
from models.flux import FluxOptions
from models.foundation.checkpoints import published
from models.foundation.checkpoints.layouts.flux import BFL_LAYOUT
from models.foundation.checkpoints.published import architectures
from tests.models import tiny_flux, tiny_hunyuan_video, tiny_hunyuan_video_i2v
from tests.models.foundation.checkpoints.test_gguf_files import finished
from utils.errors import UserError
from utils.settings.model_schema import TextEncoderFile

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


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


def test_text_encoders_tell_architectures_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HunyuanVideo of a picture has the same tensors as that of texts, and a text encoder that sees pictures."""
    monkeypatch.setattr(published, "CONFIGS", tmp_path / "configs")
    (tmp_path / "configs" / "hunyuan_video").mkdir(parents=True)
    folders = {"t2v": tiny_hunyuan_video, "i2v": tiny_hunyuan_video_i2v}
    for name, one in folders.items():
        (tmp_path / name).mkdir()
        one.write_folder(tmp_path / name)
        parts = [*(set(PARTS) - {"tokenizer", "tokenizer_2"}), "scheduler"]
        files = {part: next((tmp_path / name / part).glob("*config.json")) for part in parts}
        content = {part: json.loads(file.read_text()) for part, file in files.items()}
        (tmp_path / "configs" / "hunyuan_video" / f"{name}.json").write_text(json.dumps(content))

    def chosen(*texts: TextEncoderFile) -> str:
        place = tmp_path / "t2v"
        files = {"transformer_path": place / "transformer", "vae_path": place / "vae", "text_encoders": list(texts)}
        return models.build(models.find("hunyuan_video").Options(type="hunyuan_video", **files)).options.architecture

    for name in folders:
        assert chosen(TextEncoderFile(type="llama", path=tmp_path / name / "text_encoder")) == name
    with pytest.raises(UserError, match="the files fit i2v and t2v; name the one that they are"):
        chosen(TextEncoderFile(type="clip", path=tmp_path / "t2v" / "text_encoder_2"))


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


SENTENCES = [f"a {colour} fox sleeps in the sun, and the dog runs" for colour in ("red", "brown", "grey")] * 20


@pytest.mark.parametrize(("kind", "name"), [("lumina2", "gemma2"), ("ltx2", "gemma3"), ("sana", "gemma2")])
def test_gemma_reads_by_the_vocabulary_inside_its_weights(tmp_path: Path, kind: str, name: str) -> None:
    """As in ComfyUI's files of it: with the mark that begins a text, and the numbers of its own pieces."""
    written = io.BytesIO()
    marks = {f"{mark}_id": number for number, mark in enumerate(("pad", "eos", "bos", "unk"))}
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=written,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<mask>"],
        minloglevel=3,
        **marks,
        **{name.replace("id", "piece"): f"<{name.removesuffix('_id')}>" for name in marks},
    )
    words = torch.from_numpy(np.frombuffer(written.getvalue(), dtype=np.uint8).copy())
    save_file({"spiece_model": words}, tmp_path / "gemma.safetensors")
    (one, *_) = architectures(kind)
    texts = [TextEncoderFile(type=name, path=tmp_path / "gemma.safetensors")]
    pipeline = models.build(models.find(kind).Options(type=kind, architecture=one.name, text_encoders=texts))
    tokenizer = pipeline.encoders()[1].tokenizer
    pieces = SentencePieceProcessor(model_proto=written.getvalue())
    assert tokenizer("a red dog, OK?").input_ids == [2, *pieces.encode("a red dog, OK?")]
    assert len(tokenizer) == len(pieces) == 300


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
