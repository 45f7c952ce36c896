"""LTX-2 without a folder: Lightricks' checkpoint, of which the connectors are a part."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from safetensors.torch import load_file, save_file

import models
from models.foundation.checkpoints import published
from models.foundation.checkpoints.layouts.ltx2 import LTX2_LAYOUT
from models.foundation.encoders.ltx_vae import LTX2Autoencoder
from models.ltx2 import LTX2Options
from tests.models import tiny_ltx2, tiny_ltx2_3
from tests.models.test_ltx2 import WEIGHTS, lightricks_name
from tests.models.tiny_folder import encoded
from utils.errors import UserError

TEXT_TOKENS = tiny_ltx2.TEXT_TOKENS
PARTS = ("transformer", "connectors", "vae")
OF_A_CHECKPOINT = {
    "video_connector.": "model.diffusion_model.video_embeddings_connector.",
    "audio_connector.": "model.diffusion_model.audio_embeddings_connector.",
    "video_text_proj_in.": "text_embedding_projection.video_aggregate_embed.",
    "audio_text_proj_in.": "text_embedding_projection.audio_aggregate_embed.",
    "text_proj_in.": "text_embedding_projection.aggregate_embed.",
    ".transformer_blocks.": ".transformer_1d_blocks.",
    ".norm_q.": ".q_norm.",
    ".norm_k.": ".k_norm.",
}
"""Names of the connectors in diffusers, and in Lightricks' checkpoints."""


def connectors_of_a_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    theirs = {}
    for name, tensor in load_file(folder / "connectors" / WEIGHTS).items():
        start = next((start for start in OF_A_CHECKPOINT if name.startswith(start)), "")
        name = OF_A_CHECKPOINT.get(start, "") + name.removeprefix(start)
        for here, there in list(OF_A_CHECKPOINT.items())[5:]:
            name = name.replace(here, there)
        theirs[name] = tensor.clone()
    return theirs


def as_single_files(folder: Path, place: Path, configs: Path) -> dict[str, Any]:
    """The options of a model without a folder: its checkpoint, with all but Gemma, and Gemma and its tokenizer."""
    files = {part: folder / part / "config.json" for part in (*PARTS, "text_encoder")}
    files["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    config = {part: json.loads(file.read_text()) for part, file in files.items()}
    (configs / "ltx2").mkdir(parents=True)
    (configs / "ltx2" / "tiny.json").write_text(json.dumps({"model_index": {"_class_name": "LTX2Pipeline"}, **config}))
    denoiser = LTX2_LAYOUT.to_original(load_file(folder / "transformer" / WEIGHTS))
    save_file(
        {
            **{f"model.diffusion_model.{name}": tensor.clone() for name, tensor in denoiser.items()},
            **{
                f"vae.{lightricks_name(k)}": tensor.clone() for k, tensor in load_file(folder / "vae" / WEIGHTS).items()
            },
            **connectors_of_a_checkpoint(folder),
        },
        place / "ltx.safetensors",
    )
    return {
        "transformer_path": place / "ltx.safetensors",
        "vae_path": place / "ltx.safetensors",
        "text_encoders": [{"type": "gemma3", "path": folder / "text_encoder" / "model.safetensors"}],
        "tokenizer_path": folder / "tokenizer",
    }


def without_a_folder(**options: Any) -> Any:
    return models.build(LTX2Options(type="ltx2", dtype="float32", max_sequence_length=TEXT_TOKENS, **options))


@pytest.mark.parametrize("tiny", [tiny_ltx2, tiny_ltx2_3], ids=["2.0", "2.3"])
def test_a_checkpoint_and_gemma_are_enough(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint has the connectors, of which no other file than Lightricks' and those made of it is known."""
    monkeypatch.setattr(published, "CONFIGS", tmp_path / "configs")
    folder = tiny.write_folder(tmp_path / "folder")
    given = as_single_files(folder, tmp_path, tmp_path / "configs")
    ltx, texts = without_a_folder(**given), ["a fox", ""]
    ltx.check()
    expected = encoded(tiny.pipeline(folder).encoders()[1], texts)["gemma3"]
    assert torch.equal(encoded(ltx.encoders()[1], texts)["gemma3"], expected)
    # Other connectors are another cache.
    save_file(connectors_of_a_checkpoint(folder), tmp_path / "connectors.safetensors")
    apart = without_a_folder(**given, connectors_path=tmp_path / "connectors.safetensors")
    apart.check()
    assert apart.encoders()[1].fingerprint != ltx.encoders()[1].fingerprint
    # ComfyUI's file of the denoiser alone.
    whole = load_file(tmp_path / "ltx.safetensors")
    alone = {name: tensor for name, tensor in whole.items() if "_connector." not in name and "text_embed" not in name}
    save_file(alone, tmp_path / "alone.safetensors")
    lacking = without_a_folder(**{**given, "transformer_path": tmp_path / "alone.safetensors"})
    with pytest.raises(UserError, match="connectors_path: is required: .*alone.safetensors has none; connectors make"):
        lacking.check()


def test_the_vae_of_ltx_2_3_has_a_block_more(tmp_path: Path) -> None:
    """Which the stock converter does not know."""
    config = {
        **tiny_ltx2.VAE,
        "decoder_block_out_channels": (8,) * 4,
        "decoder_layers_per_block": (1,) * 5,
        "decoder_spatio_temporal_scaling": (True,) * 4,
        "decoder_inject_noise": (False,) * 5,
        "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
        "upsample_residual": (False,) * 4,
        "upsample_factor": (1, 1, 1, 1),
    }
    AutoencoderKLLTX2Video(**config).save_pretrained(tmp_path / "vae")
    tensors, theirs = load_file(tmp_path / "vae" / WEIGHTS), {}
    for name, tensor in tensors.items():
        block = re.match(r"decoder\.up_blocks\.(\d+)\.(upsamplers\.0\.)?", name)
        if block:
            number = 2 * int(block[1]) + (1 if block[2] else 2)
            theirs[f"decoder.up_blocks.{number}.{name[block.end() :]}".replace(".resnets.", ".res_blocks.")] = tensor
        else:
            theirs[lightricks_name(name)] = tensor
    assert any(name.startswith("decoder.up_blocks.8.res_blocks.") for name in theirs)
    save_file({name: tensor + 1 for name, tensor in theirs.items()}, tmp_path / "vae.safetensors")
    autoencoder = LTX2Autoencoder(tmp_path, tmp_path / "vae.safetensors", torch.float32)
    autoencoder.load(torch.device("cpu"))
    read = autoencoder.vae.state_dict()
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name] + 1) for name in read)
