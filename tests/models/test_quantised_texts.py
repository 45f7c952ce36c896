"""Text encoders whose Linears are kept in 8 or 4 bits: what becomes of the features, of memory, and of cached items.

The reference is the plain text encoder with the weights that the codes mean.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import T5Config, T5EncoderModel

import models
from models.flux import FluxPipeline
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import T5Features
from tests.models import tiny_flux, tiny_hidream, tiny_sdxl
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import encoded, encoded_as_loaded, tiny
from utils.dataset.encoders import reads_text
from utils.errors import UserError
from utils.quantised.formats import FORMATS
from utils.quantised.linear import QuantisedLinear

CAPTIONS = ["a hiker on a ridge", "two motorcycles"]
QUOTING = ['a hiker on a "ridge"', 'two "motorcycles"']
"""For an encoder that reads quoted texts alone."""


def first_of_each_encoder() -> list[str]:
    """Types that have every class of text encoder among them. What depends on the folder is of classes that others
    have, all but HiDream's Llama."""
    seen: set[str] = set()
    chosen = ["hidream"]
    for name in models.available():
        parts = models.find(name).text_parts
        classes = {part.model_class for part in parts} if isinstance(parts, tuple) else set()
        if classes - seen:
            chosen.append(name)
        seen |= classes
    return chosen


ENCODERS = first_of_each_encoder()
BOUNDS = {"int8": 0.03, "float8": 0.16, "nf4": 0.6, "int4": 0.6}
"""How far features may be from those of the whole encoder, as a share of their norm. The tiny encoders have random
weights and tens of features, over which errors do not average out as in large ones."""
CPU = torch.device("cpu")
_, T5 = FluxPipeline.text_parts


def text_encoders(pipeline: Any) -> list[TextEncoder]:
    return [encoder for encoder in pipeline.encoders() if reads_text(encoder)]


def quantised(model: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, QuantisedLinear)}


def numbers(features: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of each feature all numbers of all captions."""
    return {name: torch.cat([row.flatten().float() for row in rows]) for name, rows in features.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_every_text_encoder_has_the_features_of_what_its_codes_mean(name: str, tmp_path: Path) -> None:
    module, captions = tiny(name), QUOTING if name == "hunyuan_video_15" else CAPTIONS
    folder = module.write_folder(tmp_path)
    plain = text_encoders(module.pipeline(folder))
    whole = [numbers(encoded(encoder, captions)) for encoder in plain]
    weights = [{key: tensor.clone() for key, tensor in encoder.model.state_dict().items()} for encoder in plain]
    for kept in formats_of(name):
        made = text_encoders(module.pipeline(folder, text_encoder_dtype=kept))
        for encoder, reference, expected, read in zip(made, plain, whole, weights, strict=True):
            features = numbers(encoded(encoder, captions))
            distances = {key: (features[key] - expected[key]).norm() / expected[key].norm() for key in expected}
            assert max(distances.values()) < BOUNDS[kept] and (kept == "int8" or max(distances.values()) > 0), distances
            linears = quantised(encoder.model)
            for path, linear in linears.items():
                codes = FORMATS[kept].quantise(read[f"{path}.weight"])
                assert torch.equal(linear.weight, codes.weight) and torch.equal(linear.scale, codes.scale), path
                reference.model.get_parameter(f"{path}.weight").copy_(linear.dequantised(torch.float32))
            assert equal(features, numbers(encoded_as_loaded(reference, captions)))
            reference.model.load_state_dict(read)
            check_places(encoder.model, reference.model, linears)


def formats_of(name: str) -> list[str]:
    """Two of the formats, by turns: which Linears are quantised depends on the encoder, what becomes of them on the
    format."""
    turn = ENCODERS.index(name)
    return [list(BOUNDS)[(turn + number) % len(BOUNDS)] for number in range(2)]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def check_places(model: nn.Module, plain: nn.Module, linears: dict[str, QuantisedLinear]) -> None:
    """Linears of blocks are quantised, all but T5's `wo`; what is left is what it was."""
    lists = tuple(f"{name}." for name, part in plain.named_modules() if isinstance(part, nn.ModuleList))
    of_blocks = [name for name, part in plain.named_modules() if type(part) is nn.Linear and name.startswith(lists)]
    assert set(linears) == {name for name in of_blocks if not name.endswith(".wo")} and linears
    others = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if name.removesuffix(".weight") not in linears:
            assert torch.equal(others[name], parameter) and others[name].dtype == parameter.dtype, name


def tensors_of(values: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"]


class Peak(TorchDispatchMode):
    """The most bytes of tensors on the CPU that operations have made and that were held at one time. What lies in a
    file is not made by an operation, and a view takes no bytes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.held = 0, {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {part.untyped_storage().data_ptr() for part in tensors_of(args)}
        for made in tensors_of(result):
            storage = made.untyped_storage()
            if storage.data_ptr() not in given:
                self.held[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.held = {place: one for place, one in self.held.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a T5 of many layers."""
    folder = tmp_path_factory.mktemp("deep")
    config = {"vocab_size": 376, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 12, "num_heads": 4}
    T5EncoderModel(T5Config(**config, feed_forward_proj="gated-gelu")).save_pretrained(folder / "text_encoder_2")
    shutil.copytree(MINI_FLUX / "tokenizer_2", folder / "tokenizer_2")
    return folder


def t5(folder: Path, file: Path | None = None, kept: str | None = None) -> TextEncoder:
    return TextEncoder(T5, folder, file, torch.bfloat16, T5Features(24), kept)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "text_encoder_2" / "model.safetensors")


def plain_file(folder: Path, file: Path) -> Path:
    save_file(stored(folder), file)
    return file


def scaled_file(folder: Path, file: Path) -> Path:
    """Its Linears in 8 bits with a scale each."""
    tensors = stored(folder)
    linears = [name for name in tensors if "Attention." in name or "Dense." in name]
    scaled = {name: (tensors[name] * 8).to(torch.float8_e4m3fn) for name in linears if "bias" not in name}
    scales = {name.replace("weight", "scale_weight"): torch.tensor(0.125) for name in scaled}
    save_file({**tensors, **scaled, **scales}, file)
    return file


SOURCES: dict[str, Callable[[Path, Path], Path | None]] = {
    "folder": lambda folder, file: None,
    "file": plain_file,
    "8-bit file": scaled_file,
}


@pytest.mark.parametrize("kept", ["float8", "nf4"])
@pytest.mark.parametrize("source", SOURCES)
def test_one_weight_at_a_time_is_whole(deep: Path, tmp_path: Path, source: str, kept: str) -> None:
    file = SOURCES[source](deep, tmp_path / "t5.safetensors")
    whole, encoder = t5(deep, file), t5(deep, file, kept)
    whole.load(CPU)
    # Libraries that are imported, and tables that are made, at first use.
    encoder.load(CPU)
    encoder.unload()
    with Peak() as memory:
        encoder.load(CPU)
    held = sum(part.nbytes for part in (*encoder.model.parameters(), *encoder.model.buffers()))
    largest = 4 * 64 * 128
    linears = sum(linear.in_features * linear.out_features for linear in quantised(encoder.model).values())
    assert held < memory.peak < held + 6 * largest < held + linears
    assert held < sum(part.nbytes for part in whole.model.parameters()) - linears / 2
    assert numbers(encoded_as_loaded(encoder, CAPTIONS))["t5"].isfinite().all()


def test_the_scale_of_a_file_is_in_what_is_quantised(deep: Path, tmp_path: Path) -> None:
    encoder = t5(deep, scaled_file(deep, tmp_path / "t5.safetensors"), "int8")
    encoder.load(CPU)
    for name, linear in quantised(encoder.model).items():
        values = (stored(deep)[f"{name}.weight"] * 8).to(torch.float8_e4m3fn).float() * 0.125
        assert (linear.dequantised(torch.float32) - values).abs().max() <= 0.51 * linear.scale.max(), name


def test_cached_items_are_told_apart_and_old_ones_are_known() -> None:
    """Without the option the keys are those of caches that were made before there was one."""
    assert t5(MINI_FLUX).fingerprint == "bededec700013601bb4a74f66b5dd1b5"
    formats = (None, "float8", "float8_e5m2", "int8", "nf4", "int4")
    prints = [t5(MINI_FLUX, kept=kept).fingerprint for kept in formats]
    assert len(set(prints)) == len(prints)
    assert t5(MINI_FLUX, kept="float8_e4m3fn").fingerprint == prints[1]
    options = [{}, {"text_encoder_dtype": "bfloat16"}, {"text_encoder_dtype": "float32"}]
    t5s = [tiny_flux.pipeline(MINI_FLUX, dtype="bfloat16", **keys).encoders()[2] for keys in options]
    assert t5s[0].fingerprint == t5s[1].fingerprint != t5s[2].fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_type_of_text_encoders_is_that_of_their_features_alone(dtype: str) -> None:
    pipeline = tiny_flux.pipeline(MINI_FLUX, dtype="float32", text_encoder_dtype=dtype)
    assert pipeline.denoiser_dtype == torch.float32 and pipeline.encoders()[0].dtype == torch.float32
    for encoder in text_encoders(pipeline):
        ((name, made),) = encoded(encoder, CAPTIONS).items()
        assert made.dtype == encoder.dtype == getattr(torch, dtype)
        assert encoder.feature_shapes(None)[name] == (tuple(made.shape[1:]), made.dtype)


def test_llama_alone_may_have_four_bits(tmp_path: Path) -> None:
    folder = tiny_hidream.write_folder(tmp_path)
    kept = [
        [encoder.kept for encoder in text_encoders(tiny_hidream.pipeline(folder, **keys))]
        for keys in ({"llama3_4bit": True}, {"llama3_4bit": True, "text_encoder_dtype": "float8"})
    ]
    assert kept == [[None, None, None, "nf4"], ["float8", "float8", "float8", "nf4"]]


def test_what_is_quantised_already_is_refused(deep: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(deep / "text_encoder_2", tmp_path / "t5"))
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match='is quantised already .* cannot be kept as "int8"') as raised:
        t5(deep, place, "int8").check()
    assert str(place) in str(raised.value)


@pytest.mark.parametrize("kept", ["nf4", "float32"])
def test_a_text_encoder_that_is_trained_is_not_kept_in_another_type(tmp_path: Path, kept: str) -> None:
    folder = tiny_sdxl.write_folder(tmp_path)
    tiny_sdxl.pipeline(folder, text_encoder_dtype=kept).check()
    with pytest.raises(UserError, match="text_encoder_dtype: .* text_encoder_2_lr trains one"):
        tiny_sdxl.pipeline(folder, text_encoder_dtype=kept, text_encoder_2_lr=1e-5).check()


def test_a_tensor_of_another_size_is_told(deep: Path, tmp_path: Path) -> None:
    name = "encoder.block.3.layer.1.DenseReluDense.wi_0.weight"
    save_file({**stored(deep), name: torch.zeros(64, 64)}, tmp_path / "t5.safetensors")
    with pytest.raises(UserError, match=r"'encoder.block.3.*' is \[64, 64\], but .* asks for \[128, 64\]"):
        t5(deep, tmp_path / "t5.safetensors", "nf4").load(CPU)
