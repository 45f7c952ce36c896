"""Damaged files of models and adapters are read all the same, or told: never a library's error from deep within."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from models.assembly.stage import model_names
from models.base import BasePipeline
from models.foundation.checkpoints.adapter_files import read_factors, read_updates
from models.foundation.checkpoints.gguf_files import GgufFile, t5_tensors
from models.foundation.checkpoints.headers import read_header
from models.foundation.checkpoints.weights import load_tensors
from tests.damage import COUNT, Damages, damaged_bytes, damaged_json, damaged_safetensors, outcomes
from tests.models import tiny_flux
from tests.models.foundation.checkpoints.test_gguf_files import write as write_gguf
from tests.models.tiny_folder import tiny
from utils import adapters
from utils.adapters import presets
from utils.adapters.kinds import ModelNames
from utils.dataset.samples import Bucket
from utils.errors import UserError

MODULE = "transformer_blocks.0.attn.to_q"
SIZE, RANK = 32, 4


def check(file: Path, read: Callable[[], object], damages: Damages = damaged_bytes, *, seed: int = 0) -> None:
    read()
    counts, faults = outcomes(file, read, damages, (UserError,), seed)
    assert not faults, "\n".join(faults)
    assert counts["told"], "no damage was noticed"


class Tiny(NamedTuple):
    folder: Path
    names: ModelNames
    denoiser: torch.nn.Module


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))
    pipeline = tiny_flux.pipeline(folder)
    denoiser = pipeline.weights.build_empty()
    return Tiny(folder, model_names(pipeline, denoiser), denoiser)


def of_kohya() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    name = f"lora_transformer_{MODULE.replace('.', '_')}"
    return {
        f"{name}.lora_down.weight": torch.randn(RANK, SIZE),
        f"{name}.lora_up.weight": torch.randn(SIZE, RANK),
        f"{name}.alpha": torch.tensor(2.0),
    }, {"ss_network_alpha": "2"}


def of_peft() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    name, told = f"transformer.{MODULE}", {"transformer.lora_alpha": 2, "transformer.r": RANK}
    told |= {"transformer.use_rslora": False, "transformer.alpha_pattern": {"to_q": 3}}
    tensors = {f"{name}.lora_A.weight": torch.randn(RANK, SIZE), f"{name}.lora_B.weight": torch.randn(SIZE, RANK)}
    return tensors, {"lora_adapter_metadata": json.dumps(told)}


def of_ours() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return of_peft()[0], {"folded_scale": "0.5", "rank": "4"}


def of_lycoris() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    name = f"lycoris_{MODULE.replace('.', '_')}"
    return {
        f"{name}.lokr_w1": torch.randn(4, 4),
        f"{name}.lokr_w2_a": torch.randn(8, 2),
        f"{name}.lokr_w2_b": torch.randn(2, 8),
        f"{name}.alpha": torch.tensor(1.0),
    }, {}


def of_dora() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors, metadata = of_kohya()
    name = next(iter(tensors)).partition(".")[0]
    return {
        **tensors,
        f"{name}.dora_scale": torch.rand(SIZE, 1),
        "transformer.proj_out.diff_b": torch.rand(16),
    }, metadata


ADAPTERS = {"kohya": of_kohya, "peft": of_peft, "ours": of_ours, "lycoris": of_lycoris, "dora": of_dora}


def reader(file: Path, flux: Tiny, kind: str) -> Callable[[], None]:
    def read() -> None:
        updates = read_updates(file, flux.names)
        presets.check_fits(flux.denoiser, updates, str(file))
        for update in updates.values():
            assert update.delta(torch.zeros(update.shape)).shape == update.shape
        if kind != "dora":
            read_factors(file, adapters.find("lokr" if kind == "lycoris" else "lora"), flux.names, {})

    return read


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(tmp_path: Path, flux: Tiny, kind: str) -> None:
    file = tmp_path / "adapter_model.safetensors"
    tensors, metadata = ADAPTERS[kind]()
    save_file(tensors, file, metadata)
    check(file, reader(file, flux, kind), damaged_safetensors)


@pytest.mark.parametrize("where", ["header", "beside"])
def test_settings_of_adapters(tmp_path: Path, flux: Tiny, where: str) -> None:
    """What PEFT was told: in a text in the header, or in a file beside."""
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, metadata = of_peft()
    own = {"r": RANK, "lora_alpha": 2, "use_rslora": False, "alpha_pattern": {"to_q": 3}, "rank_pattern": {}}
    settings.write_text(metadata["lora_adapter_metadata"] if where == "header" else json.dumps(own))
    if where == "beside":
        save_file(tensors, file)
    read = reader(file, flux, "peft")

    def read_with_header() -> None:
        text = settings.read_bytes().decode(errors="surrogateescape")
        save_file(tensors, file, {"lora_adapter_metadata": text.encode(errors="replace").decode()})
        read()

    check(settings, read_with_header if where == "header" else read, damaged_json)


def test_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {"a.weight": torch.randn(4, 4).to(torch.float8_e4m3fn), "a.scale_weight": torch.tensor(2.0)}
    save_file({**tensors, "b.weight": torch.randn(3)}, file)
    check(file, lambda: load_tensors(file, torch.float32), damaged_safetensors)


def test_indices_of_shards(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({f"{number}.weight": torch.randn(3)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    names = {f"{number}.weight": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    index.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": names}))
    check(index, lambda: load_tensors(tmp_path, torch.float32), damaged_json)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_0])
def test_gguf_files(tmp_path: Path, kind: Kind) -> None:
    names = {"enc.blk.0.attn_q.weight": torch.randn(4, 64), "token_embd.weight": torch.randn(2, 32)}
    file = write_gguf(tmp_path / "t5.gguf", names, kind)

    def read() -> None:
        for tensors in (GgufFile(file).tensors, t5_tensors(file)):
            for tensor in tensors.values():
                assert tensor[...].shape == tensor.shape
                assert not tensor.shape or tensor[:1].shape[1:] == tensor.shape[1:]
        assert read_header(file, with_gguf=True).shapes

    check(file, read, lambda content, seed: damaged_bytes(content, seed, 4 * COUNT), seed=1)


def look_at(pipeline: BasePipeline) -> None:
    """What `--check` and the beginning of a run ask of the files of a model."""
    pipeline.check()
    assert pipeline.scheduler().config
    assert pipeline.maths and pipeline.objective and pipeline.weights.storage
    for encoder in pipeline.encoders():
        assert encoder.feature_shapes(Bucket(64, 64, 1)) and encoder.fingerprint
    shape = pipeline.latent_shape(64, 64, 1)
    assert pipeline.tokens(shape) >= 0 and pipeline.problems_of_data([]) == []
    denoiser = pipeline.build_denoiser()
    assert pipeline.to_layers(denoiser)


SETTINGS = (
    "model_index.json",
    "transformer/config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder*/config.json",
    "image_encoder/config.json",
    "*processor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    # Each takes a while.
    *(("tokenizer*/tokenizer_config.json", "tokenizer*/tokenizer.json") if COUNT > 100 else ()),
)
IN_THE_SUITE = ("sdxl", "wan_i2v")
ALL = sorted(file.stem.removeprefix("tiny_") for file in Path(__file__).parent.glob("models/tiny_*.py"))


@pytest.mark.parametrize("model", [name for name in ALL if name != "folder"] if COUNT > 100 else IN_THE_SUITE)
def test_settings_of_models(tmp_path: Path, model: str) -> None:
    module = tiny(model)
    folder = tmp_path / "copy"
    (tmp_path / "made").mkdir()
    # Without the links into the examples.
    shutil.copytree(module.write_folder(tmp_path / "made"), folder)
    read, all_faults = lambda: look_at(module.pipeline(folder)), []
    read()
    for file in sorted(file for pattern in SETTINGS for file in folder.glob(pattern)):
        all_faults += outcomes(file, read, partial(damaged_json, count=max(1, COUNT // 12)), (UserError,))[1]
    assert not all_faults, "\n".join(all_faults)
