"""GGUF files as ComfyUI-GGUF has them, written here by the package of llama.cpp from the weights of tiny models.

No file of anybody else was at hand. The kinds with a K, which the package cannot write, are random codes, and the
package says what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from torch import nn

from models.base import BasePipeline
from models.foundation.checkpoints.gguf_files import GgufFile
from models.foundation.checkpoints.headers import read_header
from tests.models import tiny_flux
from tests.models.tiny_folder import encoded, tiny
from utils.diffusion.seeds import normal
from utils.errors import UserError
from utils.quantised.formats import FORMATS
from utils.quantised.linear import QuantisedLinear, quantise

Tensors = Mapping[str, torch.Tensor]
PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
WRITTEN = {Kind.Q8_0: 0.006, Kind.Q5_1: 0.05, Kind.Q5_0: 0.06, Kind.Q4_1: 0.1, Kind.Q4_0: 0.12}
"""Kinds that the package writes, and how far a normal weight is from its codes, as a share of its norm."""
K_KINDS = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS)
UNET = "model.diffusion_model."
PUBLISHED = ("chroma", "flux", "hidream", "hunyuan_video", "lumina2", "qwen_image", "sd3", "sdxl", "wan")
"""Types that people have as GGUF. What the names of a file mean does not depend on its container."""


def write(path: Path, tensors: Tensors, kind: Kind = Kind.F32, architecture: str = "flux", **fields: int) -> Path:
    """A file whose tensors are of a kind where their rows are whole blocks, and of float32 otherwise."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, number in fields.items():
        writer.add_uint16(name.replace("_", "."), number)
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    for name, tensor in tensors.items():
        values, own = tensor.float().numpy(), kind
        if tensor.ndim < 2 and kind not in PLAIN or tensor.shape[-1] % block:
            own = Kind.F32
        writer.add_tensor(name, gguf.quantize(values, own), raw_dtype=own)
    return finished(writer, path)


def finished(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def filled(pipeline: BasePipeline) -> nn.Module:
    """The denoiser with its weights."""
    denoiser = pipeline.weights.build()
    if pipeline.block_format:
        quantise(denoiser, linears_of(denoiser), pipeline.block_format)
    source = pipeline.weights.open(pipeline.weights.build_empty())
    pipeline.weights.fill(denoiser, source, pipeline.to_layers(denoiser))
    return denoiser


def linears_of(denoiser: nn.Module) -> list[str]:
    return [name for name, part in denoiser.named_modules() if type(part) is nn.Linear and "blocks" in name]


def named_by_publisher(pipeline: BasePipeline, tensors: Tensors) -> Tensors:
    """The tensors that a file has: of a checkpoint of Stable Diffusion the UNet alone, without its prefix."""
    named = pipeline.original_layout.to_original(tensors) if pipeline.original_layout else tensors
    own = {name.removeprefix(UNET): tensor for name, tensor in named.items() if name.startswith(UNET)}
    # ComfyUI tells versions apart by tensors without numbers, which this container cannot have.
    return {name: tensor for name, tensor in (own or named).items() if tensor.numel()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_is_read_from_its_publishers_names(name: str, tmp_path: Path) -> None:
    module = tiny(name)
    (tmp_path / "model").mkdir()
    folder = module.write_folder(tmp_path / "model")
    pipeline = module.pipeline(folder)
    weights = {key: tensor.detach() for key, tensor in filled(pipeline).named_parameters()}
    beside = {key: read() for key, read in pipeline.weights.beside().items()}
    path = write(tmp_path / "model.gguf", named_by_publisher(pipeline, weights | beside))
    again = module.pipeline(folder, transformer_path=path)
    again.check()
    read = dict(filled(again).named_parameters())
    assert read.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(read[key], tensor), key


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of the tiny Flux, and its denoiser's weights."""
    folder = tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))
    return folder, {name: p.detach() for name, p in filled(tiny_flux.pipeline(folder)).named_parameters()}


@pytest.mark.parametrize("kind", [*PLAIN, *WRITTEN], ids=lambda kind: kind.name)
def test_weights_come_back(flux: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, kind: Kind) -> None:
    """To the bit if they are not codes; also the parts of fused weights, which are rows of one tensor."""
    folder, weights = flux
    path = write(tmp_path / "flux.gguf", named_by_publisher(tiny_flux.pipeline(folder), weights), kind)
    read = dict(filled(tiny_flux.pipeline(folder, transformer_path=path)).named_parameters())
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    changed = 0
    for name, weight in weights.items():
        coded = kind not in PLAIN and weight.ndim > 1 and weight.shape[-1] % block == 0
        changed += not torch.equal(read[name], weight)
        if not coded:
            assert torch.equal(read[name], weight.to(PLAIN.get(kind, torch.float32)).float()), name
            continue
        codes = gguf.quantize(weight.numpy(), kind)
        assert torch.equal(read[name], torch.from_numpy(gguf.dequantize(codes, kind))), name
        assert (read[name] - weight).norm() < WRITTEN[kind] * weight.norm(), name
    assert (changed > 20) == (kind is not Kind.F32)


@pytest.mark.parametrize("kind", K_KINDS, ids=lambda kind: kind.name)
def test_codes_of_other_kinds_are_those_of_the_package(tmp_path: Path, kind: Kind) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    codes = np.random.default_rng(0).integers(0, 256, (6, 512 // block * size), np.uint8)
    # Of half of the random numbers that are scales one would be NaN now and then.
    codes.reshape(6, -1, size)[..., 1::2] &= 0x3F
    writer = gguf.GGUFWriter(tmp_path / "codes.gguf", "wan")
    writer.add_tensor("blocks.0.weight", codes, raw_dtype=kind)
    tensor = GgufFile(finished(writer, tmp_path / "codes.gguf")).get_slice("blocks.0.weight")
    assert tensor.shape == read_header(tmp_path / "codes.gguf", with_gguf=True).shapes["blocks.0.weight"] == (6, 512)
    expected = torch.from_numpy(gguf.dequantize(codes, kind))
    torch.testing.assert_close(tensor[...], expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tensor[2:5], expected[2:5], rtol=0, atol=0, equal_nan=True)
    assert expected.isfinite().float().mean() > 0.9 and len(expected.unique()) > 50


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.F16], ids=lambda kind: kind.name)
def test_a_tensor_may_be_stored_in_other_rows_than_its_own(tmp_path: Path, kind: Kind) -> None:
    values = normal((12, 2, 4, 8), 0, "weights")
    writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "sd1")
    writer.add_array("comfy.gguf.orig_shape.conv.weight", values.shape)
    codes = gguf.quantize(values.reshape(-1, 256).numpy(), kind)
    writer.add_tensor("conv.weight", codes, raw_dtype=kind)
    tensor = GgufFile(finished(writer, tmp_path / "flux.gguf")).get_slice("conv.weight")
    expected = torch.from_numpy(gguf.dequantize(codes, kind)).reshape(values.shape)
    assert tensor.shape == (12, 2, 4, 8)
    assert torch.equal(tensor[...].float(), expected) and torch.equal(tensor[3:7].float(), expected[3:7])


@pytest.mark.parametrize("kept", ["float8", "nf4"])
def test_what_is_read_may_be_kept_in_another_format(
    flux: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, kept: str
) -> None:
    folder, weights = flux
    path = write(tmp_path / "flux.gguf", named_by_publisher(tiny_flux.pipeline(folder), weights), Kind.Q8_0)
    whole = filled(tiny_flux.pipeline(folder, transformer_path=path))
    made = filled(tiny_flux.pipeline(folder, transformer_path=path, transformer_dtype=kept))
    for name in linears_of(whole):
        codes = FORMATS[kept].quantise(whole.get_parameter(f"{name}.weight"))
        assert torch.equal(made.get_submodule(name).weight, codes.weight), name


T5_FOLDER = tiny_flux.MINI_FLUX / "text_encoder_2"


def t5_in_llamas_names(path: Path, kind: Kind) -> Path:
    """The T5 of the miniature, by the table of the package."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 8)
    tensors = load_file(T5_FOLDER / "model.safetensors")
    own = {names.get_name(name.removesuffix(".weight")): tensor for name, tensor in tensors.items()}
    own = {f"{name}.weight": tensor for name, tensor in own.items() if name}
    assert len(own) >= len(tensors) - 1, "but for a copy of the embeddings"
    return write(path, own, kind, "t5encoder")


@torch.no_grad()
@pytest.mark.parametrize(("kind", "kept", "bound"), [("F32", None, 0), ("Q8_0", None, 0.02), ("Q8_0", "int8", 0.03)])
def test_t5_may_be_one(tmp_path: Path, kind: str, kept: str | None, bound: float) -> None:
    path = t5_in_llamas_names(tmp_path / "t5.gguf", Kind[kind])
    keys = {"text_encoders": [{"type": "t5", "path": path}], "text_encoder_dtype": kept}
    made = []
    for options in ({}, keys):
        pipeline = tiny_flux.pipeline(tiny_flux.MINI_FLUX, **options)
        pipeline.check()
        encoder = pipeline.encoders()[2]
        made.append(encoded(encoder, ["a red star", "two circles"])["t5"])
    assert (made[0] - made[1]).norm() <= bound * made[0].norm() and torch.equal(*made) == (kind == "F32")
    assert any(type(part) is QuantisedLinear for part in encoder.model.modules()) == (kept is not None)


def test_a_gguf_of_another_text_encoder_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "t5.gguf", {"blk.0.attn_q.weight": torch.zeros(4, 32)}, architecture="llama")
    with pytest.raises(UserError, match="is a GGUF file of 'llama', and 'blk.0.attn_q.weight' is no tensor of T5"):
        tiny_flux.pipeline(tiny_flux.MINI_FLUX, text_encoders=[{"type": "t5", "path": path}]).check()


def test_nothing_else_is_read_from_one(flux: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, _ = flux
    path = write(tmp_path / "t5.gguf", {"token_embd.weight": torch.zeros(4, 32)}, architecture="t5encoder")
    for keys in ({"text_encoders": [{"type": "clip", "path": path}]}, {"vae_path": path}):
        with pytest.raises(UserError, match="is a GGUF file, which the denoiser's may be"):
            tiny_flux.pipeline(folder, **keys).check()
    with pytest.raises(UserError, match="is not in the file"):
        tiny_flux.pipeline(folder, transformer_path=path).check()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


SPOILT = {cut: "cannot be read .* it is not whole", in_the_header: "cannot be read .* it is not whole"}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_file_that_is_not_whole_is_told(
    flux: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder, weights = flux
    path = write(tmp_path / "flux.gguf", named_by_publisher(tiny_flux.pipeline(folder), weights), Kind.Q8_0)
    spoil(path)
    with pytest.raises(UserError, match=SPOILT[spoil]) as raised:
        tiny_flux.pipeline(folder, transformer_path=path).check()
    assert str(path) in str(raised.value)


def test_kinds_that_cannot_be_decoded_are_named(tmp_path: Path) -> None:
    _, size = gguf.GGML_QUANT_SIZES[Kind.Q8_K]
    writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "flux")
    writer.add_tensor("one", np.zeros((2, 256), np.float32))
    writer.add_tensor("two", np.zeros((2, size), np.uint8), raw_dtype=Kind.Q8_K)
    with pytest.raises(UserError, match="'two' is of the kind Q8_K, which cannot be decoded; give one of another kind"):
        GgufFile(finished(writer, tmp_path / "flux.gguf"))


def test_a_part_of_several_files_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "part.gguf", {"one": torch.zeros(2, 2)}, split_count=2)
    with pytest.raises(UserError, match="is one part of a GGUF in several files"):
        GgufFile(path)
