"""Flux.2: dev, with a guidance embedding and Mistral 3 as text encoder, and Klein, with Qwen 3; the folder's
configuration tells them apart. Both take control images as references.

Shapes: B batch, T image tokens (of the noisy picture, then of its references), L text tokens, S = L + T, C latent
channels, D width, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn

from models.base import Features, ModelEncoder
from models.families.patched_pictures import REFERENCES, PatchedPicturePipeline, text_positions
from models.foundation.checkpoints.folders import TextPart, read_config
from models.foundation.checkpoints.layouts.flux2 import FLUX2_LAYOUT
from models.foundation.encoders.flux2_vae import Flux2Autoencoder
from models.foundation.encoders.mistral import MISTRAL
from models.foundation.encoders.text_features import HiddenStates, Shapes, chat
from models.foundation.layers.chain import Middle
from models.foundation.layers.joining import joined, picture_of
from utils.diffusion.timesteps import ResolutionShift
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import Flux2Transformer2DModel
    from transformers import PretrainedConfig

MOST_TOKENS_OF_TWO_LINES = 4300
"""Beyond it the shift is that of 200 steps, for any number of steps."""
REFERENCE_DISTANCE = 10
"""Between a picture, its first reference, the second ... on the first axis of positions."""


class Flux2Options(ModelSettings):
    """`[model]` of `type = "flux2"`.

    `flux_shift = true` shifts by the picture's size as inference with 50 steps does; diffusion-pipe's users set
    `shift = 3.0`.
    """

    guidance: float = 1.0
    """Guidance embedded in training (dev only); 1 trains the plain conditional flow."""
    max_sequence_length: Count = 512
    """Number of tokens that the model sees, including padding and the template around the caption."""


class Flux2Inputs(NamedTuple):
    """The inputs of the entry. `canvas_hw0` has no elements: its shape carries the latent's height and width."""

    x_BTC: torch.Tensor
    text_BLD: torch.Tensor
    t_B: torch.Tensor
    guidance_B: torch.Tensor | None
    positions_S4: torch.Tensor
    canvas_hw0: torch.Tensor


class Flux2Stream(NamedTuple):
    """What travels from layer to layer; see `foundation/layers/joining.py` for the first two. The modulations are those
    of all blocks of a kind; those of the double blocks end with them."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    time_BD: torch.Tensor
    double_image_BD: torch.Tensor | None
    double_text_BD: torch.Tensor | None
    single_BD: torch.Tensor
    positions_S4: torch.Tensor
    rope_SD: tuple[torch.Tensor, torch.Tensor]
    canvas_hw0: torch.Tensor


@dataclass(frozen=True)
class LayeredChat(HiddenStates):
    """Some hidden states of a chat model, side by side (B, L, n D), padded to `length` tokens, which are all seen.

    Attributes:
        layers: indices of the hidden states; the first ones are the embeddings.
        has_system: whether the publisher's system message comes before the caption (Mistral); otherwise the template
            ends with the beginning of an answer without thoughts (Qwen).
    """

    name: str
    length: int
    layers: tuple[int, ...]
    has_system: bool = False

    @property
    def layers_kept(self) -> int:
        # One more than is read, since a norm follows the last.
        return max(self.layers) + 1

    def shapes(self, config: PretrainedConfig) -> Shapes:
        return {self.name: (self.length, len(self.layers) * config.hidden_size)}

    def written(self, tokenizer: Any, caption: str) -> str:
        if not self.has_system:
            return chat(tokenizer, [("user", caption)], add_generation_prompt=True, enable_thinking=False)
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

        # The mark of a picture, which the stock pipeline takes out too.
        messages = [("system", SYSTEM_MESSAGE), ("user", caption.replace("[IMG]", ""))]
        return chat(tokenizer, [(role, [{"type": "text", "text": text}]) for role, text in messages])

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        tokens = tokenizer(
            [self.written(tokenizer, caption) for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
            add_special_tokens=not self.has_system,
        ).to(text_encoder.device)
        states = text_encoder(
            tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return {self.name: torch.cat([states[layer] for layer in self.layers], dim=-1)}


DEV = MISTRAL, (10, 20, 30)
KLEIN = TextPart("qwen3", "Qwen3Model"), (9, 18, 27)
"""The text encoder, and which of its hidden states the model reads."""


class EmpiricalShift(ResolutionShift):
    """log s as in the stock pipeline (`compute_empirical_mu`): linear in the number of tokens for 10 and for 200 steps,
    and linear in the steps between; the scheduler's configuration does not matter."""

    fitted_to = None

    def mu(self, tokens: int, steps: int = 50) -> float:
        of_200 = 0.00016927 * tokens + 0.45666666
        if tokens > MOST_TOKENS_OF_TWO_LINES:
            return of_200
        of_10 = 8.73809524e-05 * tokens + 1.89833333
        slope = (of_200 - of_10) / 190
        return slope * steps + (of_200 - 200 * slope)


class Entry(nn.Module):
    """Embeds tokens, text, time and positions, and makes the modulations of all blocks. Each stage makes the rotary
    tables itself."""

    remakes = ("rope_SD",)

    def __init__(self, denoiser: Flux2Transformer2DModel):
        super().__init__()
        self.x_embedder = denoiser.x_embedder
        self.context_embedder = denoiser.context_embedder
        self.time_guidance_embed = denoiser.time_guidance_embed
        self.double_stream_modulation_img = denoiser.double_stream_modulation_img
        self.double_stream_modulation_txt = denoiser.double_stream_modulation_txt
        self.single_stream_modulation = denoiser.single_stream_modulation
        self.pos_embed = denoiser.pos_embed

    def forward(self, inputs: Flux2Inputs) -> Flux2Stream:
        dtype = self.x_embedder.weight.dtype
        time_BD = self._time(inputs.t_B, inputs.guidance_B, dtype)
        return Flux2Stream(
            x_BTD=self.x_embedder(inputs.x_BTC.to(dtype)),
            text_BLD=self.context_embedder(inputs.text_BLD.to(dtype)),
            time_BD=time_BD,
            double_image_BD=self.double_stream_modulation_img(time_BD),
            double_text_BD=self.double_stream_modulation_txt(time_BD),
            single_BD=self.single_stream_modulation(time_BD),
            positions_S4=inputs.positions_S4,
            rope_SD=self.pos_embed(inputs.positions_S4),
            canvas_hw0=inputs.canvas_hw0,
        )

    def remake(self, stream: Flux2Stream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_SD": self.pos_embed(stream.positions_S4)}

    def _time(self, t_B: torch.Tensor, guidance_B: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The time embedding. t stays float32 until it is embedded: bfloat16 would round 0..1000 to steps of 4."""
        embed = self.time_guidance_embed
        time_BD = embed.timestep_embedder(embed.time_proj(t_B * 1000).to(dtype))
        if guidance_B is None:
            return time_BD
        return time_BD + embed.guidance_embedder(embed.time_proj(guidance_B * 1000).to(dtype))


class Single(nn.Module):
    """A block for text and picture in one sequence."""

    recomputable = True

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, stream: Flux2Stream) -> Flux2Stream:
        stream = joined(stream)
        x_BSD = self.block(
            hidden_states=stream.x_BTD,
            encoder_hidden_states=None,
            temb_mod=stream.single_BD,
            image_rotary_emb=stream.rope_SD,
        )
        return stream._replace(x_BTD=x_BSD, double_image_BD=None, double_text_BD=None)


class Exit(nn.Module):
    """Projects the noisy tokens (references follow them) to the latent (B, C, h, w)."""

    def __init__(self, denoiser: Flux2Transformer2DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out

    def forward(self, stream: Flux2Stream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(picture_of(stream), stream.time_BD))
        height, width, _ = stream.canvas_hw0.shape
        return rearrange(x_BTC[:, : height * width], "b (h w) c -> b c h w", h=height)


class Flux2Pipeline(PatchedPicturePipeline):
    """Flux.2 dev and Klein of Black Forest Labs."""

    Options = Flux2Options
    denoiser_class = "Flux2Transformer2DModel"
    config_keys = ("in_channels", "joint_attention_dim")
    blocks = ("transformer_blocks", "single_transformer_blocks")
    stream_type = Flux2Stream
    original_layout = FLUX2_LAYOUT
    resolution_shift = EmpiricalShift()
    max_controls = len(REFERENCES)

    @property
    def is_dev(self) -> bool:
        return self.parts.denoiser_config.get("guidance_embeds", True)

    @property
    def guided_by_second_prediction(self) -> bool:
        """Klein; the guidance of dev is an input."""
        return not self.is_dev

    @cached_property
    def text_parts(self) -> tuple[TextPart, ...]:
        # Not from `parts`, which are made of these.
        config = read_config(self.options.diffusers_path, self.denoiser_folder, model=self.denoiser_class)
        part, _ = DEV if config.get("guidance_embeds", True) else KLEIN
        return (part,)

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, 4 * self.vae_config["latent_channels"]
        ((width,),) = ([shape[-1] for shape in encoder.shapes.values()] for encoder in self.encoders()[1:])
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give Flux.2's own VAE"
            )
        if config["joint_attention_dim"] != width:
            yield self.parts.misfit(
                f"takes text of {config['joint_attention_dim']} features and the text encoder makes {width}; give its "
                "own (Mistral Small 3 for dev, Qwen3 4B for Klein 4B, Qwen3 8B for Klein 9B)"
            )

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        part, layers = DEV if self.is_dev else KLEIN
        text = LayeredChat(part.name, options.max_sequence_length, layers, has_system=self.is_dev)
        vae = options.diffusers_path, options.vae_path, self.dtype
        references = [Flux2Autoencoder(*vae, reads=name, draw="mode") for name in REFERENCES[:controls]]
        return [self.autoencoder(), self.parts.text_encoder(text), *references]

    def to_layers(self, denoiser: Flux2Transformer2DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb_mod_img": "double_image_BD",
            "temb_mod_txt": "double_text_BD",
            "image_rotary_emb": "rope_SD",
        }
        return [
            Entry(denoiser),
            *(Middle(block, reads, writes=("text_BLD", "x_BTD")) for block in denoiser.transformer_blocks),
            *map(Single, denoiser.single_transformer_blocks),
            Exit(denoiser),
        ]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> Flux2Inputs:
        text_BLD = features[self.text_parts[0].name]
        names = [f"{name}_latents" for name in REFERENCES if f"{name}_latents" in features]
        pictures = [x_t, *(features[name].float() for name in names)]
        places = [
            grid_positions(*picture.shape[2:], REFERENCE_DISTANCE * number) for number, picture in enumerate(pictures)
        ]
        strength = self.options.guidance if guidance is None else guidance
        return Flux2Inputs(
            x_BTC=torch.cat([rearrange(picture, "b c h w -> b (h w) c") for picture in pictures], dim=1),
            text_BLD=text_BLD,
            t_B=t_B,
            guidance_B=torch.full((len(x_t),), strength) if self.is_dev else None,
            positions_S4=torch.cat([text_positions(text_BLD.shape[1]), *places]),
            canvas_hw0=torch.empty(*x_t.shape[2:], 0),
        )


def grid_positions(height: int, width: int, picture: int) -> torch.Tensor:
    """(picture, row, column, 0) of every token (T, 4) of a latent."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (
        torch.stack([torch.full_like(rows, picture), rows, columns, torch.zeros_like(rows)], -1).reshape(-1, 4).float()
    )
