"""A whole tiny Flux.2 Klein in diffusers' layout, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from diffusers import Flux2KleinPipeline as StockPipeline
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from models.flux2 import Flux2Options, Flux2Pipeline
from tests.models import tiny_z_image
from tests.models.tiny_folder import drawn, randomised, write_index
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 3.0}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 64, 16, 4
TRANSFORMER = {
    "in_channels": 4 * CHANNELS,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 3 * TEXT_WIDTH,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
# The last hidden state that is read is the 27th.
TEXT = {**tiny_z_image.TEXT, "num_hidden_layers": 28}
VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": CHANNELS,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def vae() -> AutoencoderKLFlux2:
    """With statistics that are not those it is born with."""
    made = randomised(AutoencoderKLFlux2(**VAE), 2)
    made.bn.running_mean.copy_(normal((4 * CHANNELS,), 0, "mean"))
    made.bn.running_var.copy_(normal((4 * CHANNELS,), 0, "variance").exp())
    return made


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    tiny_z_image.tokenizer().save_pretrained(folder / "tokenizer")
    vae().save_pretrained(folder / "vae")
    randomised(Flux2Transformer2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(Qwen3ForCausalLM(Qwen3Config(**TEXT)), 3).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": Qwen3ForCausalLM,
        "tokenizer": Qwen2Tokenizer,
        "transformer": Flux2Transformer2DModel,
        "vae": AutoencoderKLFlux2,
    }
    write_index(folder, STOCK, parts, is_distilled=False)
    return folder


def pipeline(folder: Path, **options: Any) -> Flux2Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return Flux2Pipeline(Flux2Options(type="flux2", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features; they have all the same number of tokens."""
    return {"qwen3": normal((len(lengths), TEXT_TOKENS, 3 * TEXT_WIDTH), 0, "text", *lengths)}


def whole(
    denoiser: Flux2Transformer2DModel, pipeline: Flux2Pipeline, features: dict, x_t: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    text_BLD = next(iter(features.values()))
    positions, tokens = [StockPipeline._prepare_latent_ids(x_t)], [StockPipeline._pack_latents(x_t)]
    references = [tensor for name, tensor in features.items() if name.startswith("control")]
    if references:
        places = StockPipeline._prepare_image_ids([one[:1] for one in references])
        positions.append(places.expand(len(x_t), -1, -1))
        tokens += map(StockPipeline._pack_latents, references)
    (output_BTC,) = denoiser(
        hidden_states=torch.cat(tokens, dim=1),
        encoder_hidden_states=text_BLD,
        timestep=t_B,
        guidance=torch.ones(len(t_B)) if denoiser.config.guidance_embeds else None,
        img_ids=torch.cat(positions, dim=1),
        txt_ids=StockPipeline._prepare_text_ids(text_BLD),
        return_dict=False,
    )
    height, width = x_t.shape[2:]
    return StockPipeline._unpack_latents_with_ids(output_BTC[:, : height * width], positions[0], height, width)


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    text_BLD, _ = stock.encode_prompt(captions, device="cpu", max_sequence_length=TEXT_TOKENS)
    return [{"qwen3": text_LD} for text_LD in text_BLD]


def stock_latents(stock: StockPipeline, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    return torch.cat([stock._encode_vae_image(one[None, :, 0], None) for one in pixels_BCFHW])


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    """Its latents come as cells of the VAE."""
    asked = {"negative_prompt": sampling.negative_prompt}
    assert not asked["negative_prompt"], "the stock pipeline takes none"
    cells = drawn(_WithoutNegative(stock), sampling, noise, max_sequence_length=TEXT_TOKENS).images
    norm = stock.vae.bn
    mean, std = norm.running_mean, torch.sqrt(norm.running_var + stock.vae.config.batch_norm_eps)
    return (stock._patchify_latents(cells) - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


class _WithoutNegative:
    def __init__(self, stock: StockPipeline):
        self.stock = stock

    def __call__(self, negative_prompt: str, **asked: Any) -> Any:
        return self.stock(**asked)
