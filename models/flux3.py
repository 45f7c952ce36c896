"""Flux.3: blocks in which text, picture and references are each by themselves, then blocks in which all are one
sequence. It takes control images as references.

Shapes: B batch, T image tokens, R tokens of references, L text tokens, S = L + T + R, C latent channels, D width, M
three times that, E rotary angles, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from models.base import Features, ModelEncoder
from models.families.patched_pictures import REFERENCES, PatchedPicturePipeline, text_positions
from models.foundation.checkpoints.configs import SCHEDULER_FILE, stock_scheduler
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.flux3 import FLUX3_LAYOUT
from models.foundation.checkpoints.stock import of_diffusers
from models.foundation.encoders.flux2_vae import Flux2Autoencoder
from models.foundation.encoders.qwen3_vl import Qwen3VLStates
from models.foundation.encoders.text_features import chat
from models.foundation.layers.around_stock import AroundStock
from models.foundation.layers.padding import filled_length, without
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux3Transformer2DModel

TEXT = "qwen3_vl"
LAYERS = tuple(range(4, 33, 4))
"""The hidden states that the model reads."""
FILLED_TO = 80
"""Captions are padded to multiples of this, and the model sees the padding."""
GRID = 0.5
"""The distance of two cells on the axes of positions."""
INFERENCE_SHIFT = 6.93


class Flux3Options(ModelSettings):
    """`[model]` of `type = "flux3"`.

    Inference shifts by 6.93 at all sizes.
    """

    max_sequence_length: Count = 640
    """Number of tokens of a caption that are read, with the template around it and its padding, which goes to the next
    multiple of 80."""


class Flux3Inputs(NamedTuple):
    """The inputs of the entry. `text_lengths` are tensors without elements, whose length is the number of a sample's
    own tokens; None if they are the same. `canvas_hw0` has no elements: its shape carries the latent's height and
    width."""

    x_BTC: torch.Tensor
    text_BLD: torch.Tensor
    references_BRC: torch.Tensor | None
    text_lengths: tuple[torch.Tensor, ...] | None
    t_B: torch.Tensor
    positions_S4: torch.Tensor
    canvas_hw0: torch.Tensor


class Flux3Stream(NamedTuple):
    """What travels from layer to layer. The modulations are those of all blocks of a kind; the early ones end with
    these. From the first joined block on, the references follow the picture in `x_BTD`."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    references_BRD: torch.Tensor | None
    text_lengths: tuple[torch.Tensor, ...] | None
    time_B1D: torch.Tensor
    early_image_B1M: torch.Tensor | None
    early_text_B1M: torch.Tensor | None
    early_references_B1M: torch.Tensor | None
    image_B1M: torch.Tensor
    text_B1M: torch.Tensor
    references_B1M: torch.Tensor | None
    positions_S4: torch.Tensor
    rope_SE: tuple[torch.Tensor, torch.Tensor]
    canvas_hw0: torch.Tensor

    @property
    def image_tokens(self) -> int:
        """The number of tokens of the picture, without references."""
        height, width, _ = self.canvas_hw0.shape
        return height * width


@dataclass(frozen=True)
class Flux3Chat(Qwen3VLStates):
    """Hidden states of Qwen3-VL, side by side, for the tokens of a caption in the chat template and its padding (l,
    K D), with l up to `length`, and a mask (l,) of ones. Qwen3-VL itself ignores the padding."""

    layers: tuple[int, ...] = LAYERS

    def written(self, tokenizer: Any, caption: str) -> str:
        return chat(tokenizer, [("user", caption)], add_generation_prompt=True)

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        # One after the other, as the positions of a caption's padding are those of one token.
        texts_LF = [self._text(text_encoder, tokenizer, caption) for caption in captions]
        masks = [torch.ones(len(text_LF), dtype=torch.bool) for text_LF in texts_LF]
        return {self.name: texts_LF, f"{self.name}_mask": masks}

    def _text(self, text_encoder: nn.Module, tokenizer: Any, caption: str) -> torch.Tensor:
        row = self.row(tokenizer, caption)
        padding = min(filled_length(len(row), FILLED_TO), self.length) - len(row)
        device = text_encoder.device
        tokens_1L = torch.tensor([row + [tokenizer.pad_token_id] * padding], device=device)
        mask_1L = torch.tensor([[1] * len(row) + [0] * padding], device=device)
        places_1L = torch.tensor([[*range(len(row)), *[1] * padding]], device=device)
        states = text_encoder(
            tokens_1L, attention_mask=mask_1L, position_ids=places_1L, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[layer][0] for layer in self.layers], dim=-1)


class Places(NamedTuple):
    """What attention is told of its sequence, which begins with `text_tokens` text tokens: the angles (S, E), and how
    many text tokens each sample has of its own, if they differ."""

    cos: torch.Tensor
    sin: torch.Tensor
    text_tokens: int = 0
    text_lengths: tuple[torch.Tensor, ...] | None = None


class OwnTextAttention(AroundStock):
    """The stock attention for each sample with its own text, without what a batch adds to shorter ones."""

    def __call__(
        self, attn: nn.Module, hidden_states: torch.Tensor, attention_mask: None, image_rotary_emb: Places
    ) -> torch.Tensor:
        """A sequence (B, S, D)."""
        cos, sin, length, lengths = image_rotary_emb
        if lengths is None:
            return self.stock(attn, hidden_states, None, (cos, sin))
        mixed = []
        for number, tensor in enumerate(lengths):
            own = len(tensor)
            rope = tuple(without(one.unsqueeze(0), own, length).squeeze(0) for one in (cos, sin))
            made = self.stock(attn, without(hidden_states[number : number + 1], own, length), None, rope)
            padding = made.new_zeros(1, length - own, made.shape[2])
            mixed.append(torch.cat([made[:, :own], padding, made[:, own:]], dim=1))
        return torch.cat(mixed)


class Entry(nn.Module):
    """Embeds tokens, text, time and positions, and makes the modulations of all blocks. Each stage makes the rotary
    tables itself."""

    remakes = ("rope_SE",)

    def __init__(self, denoiser: Flux3Transformer2DModel):
        super().__init__()
        self.x_embedders, self.context_embedder = denoiser.x_embedders, denoiser.context_embedder
        self.time_proj, self.timestep_embedder = denoiser.time_proj, denoiser.timestep_embedder
        self.early_stream_modulations = denoiser.early_stream_modulations
        self.single_stream_modulations = denoiser.single_stream_modulations
        self.pos_embed = denoiser.pos_embed

    def forward(self, inputs: Flux3Inputs) -> Flux3Stream:
        dtype = self.context_embedder.weight.dtype
        time_B1D, clean_B1D = (self._time(t_B, dtype) for t_B in (inputs.t_B, torch.zeros_like(inputs.t_B)))
        noisy_B1D, clean_B1D = functional.silu(time_B1D), functional.silu(clean_B1D)
        early, single, references_BRD = self.early_stream_modulations, self.single_stream_modulations, None
        if inputs.references_BRC is not None:
            references_BRD = self.x_embedders["image_cond"](inputs.references_BRC.to(dtype))
        has_references = references_BRD is not None
        return Flux3Stream(
            x_BTD=self.x_embedders["image"](inputs.x_BTC.to(dtype)),
            text_BLD=self.context_embedder(inputs.text_BLD.to(dtype)),
            references_BRD=references_BRD,
            text_lengths=inputs.text_lengths,
            time_B1D=time_B1D,
            early_image_B1M=early["image"](noisy_B1D),
            early_text_B1M=early["txt"](clean_B1D),
            early_references_B1M=early["image_cond"](clean_B1D) if has_references else None,
            image_B1M=single["image"](noisy_B1D),
            text_B1M=single["txt"](clean_B1D),
            references_B1M=single["image_cond"](clean_B1D) if has_references else None,
            positions_S4=inputs.positions_S4,
            rope_SE=self.pos_embed(inputs.positions_S4),
            canvas_hw0=inputs.canvas_hw0,
        )

    def remake(self, stream: Flux3Stream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_SE": self.pos_embed(stream.positions_S4)}

    def _time(self, t_B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The time embedding. t stays float32 until it is embedded."""
        return self.timestep_embedder(self.time_proj(t_B * 1000).to(dtype)).unsqueeze(1)


class Early(nn.Module):
    """A block for text, picture or references alone; without references nothing happens in their blocks."""

    recomputable = True

    def __init__(self, block: nn.Module, field: str, modulation: str):
        super().__init__()
        self.block, self.field, self.modulation = block, field, modulation

    def forward(self, stream: Flux3Stream) -> Flux3Stream:
        rows_BSD = getattr(stream, self.field)
        if rows_BSD is None:
            return stream
        return stream._replace(
            **{self.field: self.block(rows_BSD, getattr(stream, self.modulation), self._places(stream))}
        )

    def _places(self, stream: Flux3Stream) -> Places:
        length, behind = stream.text_BLD.shape[1], stream.text_BLD.shape[1] + stream.image_tokens
        if self.field == "text_BLD":
            return Places(*(one[:length] for one in stream.rope_SE), length, stream.text_lengths)
        own = slice(length, behind) if self.field == "x_BTD" else slice(behind, None)
        return Places(*(one[own] for one in stream.rope_SE))


class Single(nn.Module):
    """A block for text, picture and references in one sequence."""

    recomputable = True

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, stream: Flux3Stream) -> Flux3Stream:
        x_BTD = stream.x_BTD
        if stream.references_BRD is not None:
            x_BTD = torch.cat([x_BTD, stream.references_BRD], dim=1)
        modulation = stream.image_B1M
        if stream.references_B1M is not None:
            counts = stream.image_tokens, x_BTD.shape[1] - stream.image_tokens
            both = zip((stream.image_B1M, stream.references_B1M), counts, strict=True)
            modulation = torch.cat([one_B1M.expand(-1, count, -1) for one_B1M, count in both], dim=1)
        text_BLD, x_BTD = self.block(
            hidden_states=x_BTD,
            encoder_hidden_states=stream.text_BLD,
            temb_mod=modulation,
            temb_mod_context=stream.text_B1M,
            image_rotary_emb=Places(*stream.rope_SE, stream.text_BLD.shape[1], stream.text_lengths),
        )
        ended = dict.fromkeys(("references_BRD", "early_image_B1M", "early_text_B1M", "early_references_B1M"))
        return stream._replace(x_BTD=x_BTD, text_BLD=text_BLD, **ended)


class Exit(nn.Module):
    """Projects the noisy tokens (references follow them) to the latent (B, C, h, w)."""

    def __init__(self, denoiser: Flux3Transformer2DModel):
        super().__init__()
        self.norm_out, self.proj_out = denoiser.norm_out, denoiser.proj_out

    def forward(self, stream: Flux3Stream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD[:, : stream.image_tokens], stream.time_B1D))
        return rearrange(x_BTC, "b (h w) c -> b c h w", h=stream.canvas_hw0.shape[0])


class Flux3Pipeline(PatchedPicturePipeline):
    """Flux.3 of Black Forest Labs. References are encoded at the size that the dataset gives them. Inference may let a
    language model write a longer prompt from the user's, so captions should be long."""

    Options = Flux3Options
    denoiser_class = "Flux3Transformer2DModel"
    config_keys = ("cond_in_channels", "in_channels", "joint_attention_dim")
    text_parts = (TextPart(TEXT, "Qwen3VLModel"),)
    folder_has_scheduler = False
    blocks = ("txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond", "single_transformer_blocks")
    stream_type = Flux3Stream
    keep_in_high_precision = ("norm_q", "norm_k")
    original_layout = FLUX3_LAYOUT
    guided_by_second_prediction = True
    max_controls = len(REFERENCES)

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, 4 * self.vae_config["latent_channels"]
        _, read = self.encoders()[1].shapes[TEXT]
        if config.get("flow_map"):
            yield self.parts.misfit(
                "is the Flux.3 that was distilled to fewer steps (`flow_map`), which is not trained here; give "
                "flux-3-image-klein-base"
            )
        for key in ("in_channels", "cond_in_channels"):
            if config[key] != made:
                yield self.parts.misfit(
                    f"has `{key}` {config[key]} and the VAE makes latents of {made} channels; give Flux.3's own VAE"
                )
        if config["joint_attention_dim"] != read:
            yield self.parts.misfit(
                f"takes text of {config['joint_attention_dim']} features and Qwen3-VL makes {read}; give Flux.3's own "
                "text encoder"
            )

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        text = self.parts.text_encoder(Flux3Chat(TEXT, options.max_sequence_length))
        vae = options.diffusers_path, options.vae_path, self.dtype
        references = [Flux2Autoencoder(*vae, reads=name, draw="mode") for name in REFERENCES[:controls]]
        return [self.autoencoder(), text, *references]

    def build_denoiser(self) -> Flux3Transformer2DModel:
        denoiser = super().build_denoiser()
        for module in denoiser.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(OwnTextAttention(module.processor))
        return denoiser

    def to_layers(self, denoiser: Flux3Transformer2DModel) -> list[nn.Module]:
        early = (
            (denoiser.txt_mode_blocks, "text_BLD", "early_text_B1M"),
            (denoiser.mode_blocks["image"], "x_BTD", "early_image_B1M"),
            (denoiser.mode_blocks["image_cond"], "references_BRD", "early_references_B1M"),
        )
        return [
            Entry(denoiser),
            *(Early(block, *fields) for blocks, *fields in early for block in blocks),
            *map(Single, denoiser.single_transformer_blocks),
            Exit(denoiser),
        ]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> Flux3Inputs:
        text_BLD = features[TEXT]
        length, lengths = text_BLD.shape[1], features[f"{TEXT}_mask"].bool().sum(dim=1).tolist()
        references = [features[f"{name}_latents"].float() for name in REFERENCES if f"{name}_latents" in features]
        places = [grid_positions(*picture.shape[2:], -number) for number, picture in enumerate([x_t, *references])]
        tokens = [rearrange(picture, "b c h w -> b (h w) c") for picture in (x_t, *references)]
        return Flux3Inputs(
            x_BTC=tokens[0],
            text_BLD=text_BLD,
            references_BRC=torch.cat(tokens[1:], dim=1) if references else None,
            text_lengths=tuple(torch.empty(own, 0) for own in lengths) if min(lengths) < length else None,
            t_B=t_B,
            positions_S4=torch.cat([text_positions(length), *places]),
            canvas_hw0=torch.empty(*x_t.shape[2:], 0),
        )

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        name = "FlowMatchEulerDiscreteScheduler"
        if (self.options.diffusers_path / SCHEDULER_FILE).is_file():
            return stock_scheduler(self.options.diffusers_path, name)
        return of_diffusers(name)(shift=INFERENCE_SHIFT)


def grid_positions(height: int, width: int, picture: int) -> torch.Tensor:
    """(0, row, column, picture) of every token (T, 4) of a latent; the noisy picture is 0, its references -1, -2 ..."""
    rows, columns = torch.meshgrid(GRID * torch.arange(height), GRID * torch.arange(width), indexing="ij")
    numbers = torch.full_like(rows, picture)
    return torch.stack([torch.zeros_like(rows), rows, columns, numbers], dim=-1).reshape(-1, 4)
