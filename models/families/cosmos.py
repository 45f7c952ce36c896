"""What NVIDIA's Cosmos models share: the transformer in layers, and how it is told which frames are given.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T tokens, L text tokens, R rows of time, D
width of the transformer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from models.base import BasePipeline, Features
from models.families.clips import problems_of_rates
from models.foundation.checkpoints.folders import TextPart
from models.foundation.layers.chain import Middle
from models.foundation.layers.given import is_given, row_of_token
from models.foundation.layers.padding import lengthened
from models.foundation.layers.patches import blank_latent
from utils.dataset.samples import Sample
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings

if TYPE_CHECKING:
    from diffusers import CosmosTransformer3DModel

TRANSFER = ("controlnet_block_every_n", "img_context_dim_in")
"""Keys of the configuration that only Cosmos-Transfer2.5 sets, which is not trained here."""


def kind_of(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """What a model of this configuration is called, and its type; None if it is not trained here."""
    if any(config.get(key) for key in TRANSFER):
        return "Cosmos-Transfer2.5", None
    if config.get("use_crossattn_projection"):
        return "Cosmos-Predict2.5", "cosmos_predict25"
    if config.get("extra_pos_embed_type", "learnable") == "learnable":
        return "Cosmos 1.0", "cosmos"
    return "Cosmos-Predict2", "cosmos_predict2"


class CosmosInputs(NamedTuple):
    """The inputs of the entry; `x_BCfhw` has the channels of the masks too. Time has a row for each frame if some are
    given. `given_BC1hw` is the velocity that a given first frame has, for samples."""

    x_BCfhw: torch.Tensor
    text_BLD: torch.Tensor
    t_BR: torch.Tensor
    given_BC1hw: torch.Tensor | None


class CosmosStream(NamedTuple):
    """What travels from layer to layer. `canvas_fhw0` has no elements: its shape carries the tokens' grid. With rows
    of time for the frames, `row_T` has the row of each token, by which each layer looks up what it needs; else the
    dimension R is missing. `tables_ND` are the learned places of frames, rows and columns, of which those of tokens are
    made where they have no gradient."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    modulation_BRM: torch.Tensor
    time_BRD: torch.Tensor
    row_T: torch.Tensor | None
    rope_TE: tuple[torch.Tensor, torch.Tensor]
    places_BTD: torch.Tensor | None
    tables_ND: tuple[torch.Tensor, ...] | None
    given_BC1hw: torch.Tensor | None
    canvas_fhw0: torch.Tensor

    @property
    def modulation(self) -> torch.Tensor:
        """The modulation for a layer: (B, 3 D), or (B, T, 3 D)."""
        return self.modulation_BRM if self.row_T is None else self.modulation_BRM[:, self.row_T]

    @property
    def time(self) -> torch.Tensor:
        """The time for a layer: (B, D), or (B, T, D)."""
        return self.time_BRD if self.row_T is None else self.time_BRD[:, self.row_T]


class Entry(nn.Module):
    """Embeds patches, time and positions, for which some models have learned tables too; projects the text of some.
    Each stage makes itself what it needs of the positions, of which the learned ones are as large as the tokens."""

    remakes = ("rope_TE", "places_BTD")

    def __init__(self, denoiser: CosmosTransformer3DModel, fps: float | None):
        super().__init__()
        self.rope = denoiser.rope
        self.learnable_pos_embed = denoiser.learnable_pos_embed
        self.patch_embed = denoiser.patch_embed
        self.crossattn_proj = getattr(denoiser, "crossattn_proj", nn.Identity())
        self.time_embed = denoiser.time_embed
        self.patch, self.fps = tuple(denoiser.config.patch_size), fps

    def forward(self, inputs: CosmosInputs) -> CosmosStream:
        x_BCfhw = inputs.x_BCfhw.to(self.patch_embed.proj.weight.dtype)
        patches_BfhwD = self.patch_embed(x_BCfhw)
        x_BTD = rearrange(patches_BfhwD, "b f h w d -> b (f h w) d")
        learned = self.learnable_pos_embed
        places_BTD = None if learned is None else learned(x_BCfhw)
        rows, (frames, height, width) = inputs.t_BR.shape[1], patches_BfhwD.shape[1:4]
        # The time stays float32 until it is embedded.
        modulation_EM, time_ED = self.time_embed(x_BTD, inputs.t_BR.flatten())
        return CosmosStream(
            x_BTD=x_BTD,
            text_BLD=self.crossattn_proj(inputs.text_BLD.to(x_BTD.dtype)),
            modulation_BRM=of_rows(modulation_EM, rows),
            time_BRD=of_rows(time_ED, rows),
            row_T=row_of_token(rows, height * width, x_BTD.device),
            rope_TE=self.rope(x_BCfhw, fps=self.fps),
            places_BTD=places_BTD,
            tables_ND=None if places_BTD is None or places_BTD.requires_grad else self._tables(frames, height, width),
            given_BC1hw=inputs.given_BC1hw,
            canvas_fhw0=x_BTD.new_empty(frames, height, width, 0),
        )

    def _tables(self, *grid: int) -> tuple[torch.Tensor, ...]:
        """What the learned tables have for a grid of tokens."""
        tables = self.learnable_pos_embed.parameters()
        return tuple(table[:side].detach() for table, side in zip(tables, grid, strict=True))

    def remake(self, stream: CosmosStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        latent, learned, places_BTD = blank_latent(stream.canvas_fhw0, self.patch), self.learnable_pos_embed, None
        if stream.tables_ND is not None:
            names = [name for name, _ in learned.named_parameters()]
            samples = latent.expand(len(stream.x_BTD), -1, -1, -1, -1)
            places_BTD = functional_call(learned, dict(zip(names, stream.tables_ND, strict=True)), samples)
        return {"rope_TE": self.rope(latent, fps=self.fps), "places_BTD": places_BTD}


def of_rows(of_all_ED: torch.Tensor, rows: int) -> torch.Tensor:
    """(B, R, D) of (B R, D), or (B, D) for one row. A view of that in each layer would add the gradients of its uses in
    another order than the stock module does."""
    return rearrange(of_all_ED, "(b r) d -> b r d", r=rows) if rows > 1 else of_all_ED


class Exit(nn.Module):
    """Projects the tokens to the latent (B, C, f, h, w)."""

    def __init__(self, denoiser: CosmosTransformer3DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out
        self.patch = tuple(denoiser.config.patch_size)

    def forward(self, stream: CosmosStream) -> torch.Tensor:
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD, stream.time, stream.modulation))
        frames, height, width, _ = stream.canvas_fhw0.shape
        x_BCfhw = rearrange(
            x_BTC,
            "b (f h w) (q r p c) -> b c (f p) (h q) (w r)",
            **dict(zip("fhwpqr", (frames, height, width, *self.patch), strict=True)),
        )
        given_BC1hw = stream.given_BC1hw
        return x_BCfhw if given_BC1hw is None else torch.cat([given_BC1hw.to(x_BCfhw), x_BCfhw[:, :, 1:]], dim=2)


def places_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the transformer's table of positions: one row of numbers serves all three axes."""
    patch = config.get("patch_size", (1, 2, 2))
    side = max(size // side for size, side in zip(config["max_size"], patch, strict=True))
    return side, side


def chain_of(entry: nn.Module, denoiser: CosmosTransformer3DModel) -> list[nn.Module]:
    """The transformer in layers behind an entry that gives a `CosmosStream`."""
    reads = {
        "hidden_states": "x_BTD",
        "encoder_hidden_states": "text_BLD",
        "embedded_timestep": "time",
        "temb": "modulation",
        "image_rotary_emb": "rope_TE",
        "extra_pos_emb": "places_BTD",
    }
    middles = [Middle(block, reads, writes=("x_BTD",)) for block in denoiser.transformer_blocks]
    return [entry, *middles, Exit(denoiser)]


class CosmosModel(BasePipeline):
    """A model of NVIDIA's Cosmos.

    Attributes:
        title: what it is called.
        needs_vae: which VAE it takes, for messages.
        from_text: what its models without given frames make, for messages.
        channels: of the VAE's latents.
    """

    title: ClassVar[str]
    needs_vae: ClassVar[str]
    from_text: ClassVar[str]
    channels: int
    denoiser_class = "CosmosTransformer3DModel"
    config_keys = ("in_channels", "text_embed_dim", "max_size")
    text_parts = (TextPart("t5", "T5EncoderModel"),)
    scheduler_sets_levels = True
    blocks = ("transformer_blocks",)
    stream_type = CosmosStream
    guided_by_second_prediction = True
    noise_in_float32 = True
    no_guidance = 0.0

    def __init__(self, options: ModelSettings, seed: int = 0):
        super().__init__(options, seed)
        self.media = replace(self.media, fps=getattr(options, "frame_rate", self.media.fps))

    @property
    def marks_given(self) -> bool:
        """Whether one more channel says which frames are given, as in video to world."""
        return self.parts.denoiser_config["in_channels"] == self.channels + 1

    @property
    def starts_from_picture(self) -> bool:
        return self.marks_given

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self.channels
        named, fitting = kind_of(config)
        if named != self.title:
            hint = f'set [model] type = "{fitting}", or' if fitting else "it is not trained here;"
            yield self.parts.misfit(f"is of {named}: {hint} give {self.title}")
        elif config["in_channels"] not in self.takes:
            takes = ", ".join(f"{what} takes {channels}" for channels, what in self.takes.items())
            yield self.parts.misfit(
                f"takes {config['in_channels']} channels, and the VAE makes {made}; {takes}: give {self.needs_vae}, or "
                "another model"
            )
        else:
            yield from self.problems_of_text()

    @property
    def takes(self) -> Mapping[int, str]:
        """How many channels its models take."""
        return {self.channels: self.from_text, self.channels + 1: "video to world"}

    def problems_of_text(self) -> Iterator[Problem]:
        """Why the text encoder does not fit, or options of a model that this one is not."""
        width, read = self.parts.denoiser_config["text_embed_dim"], self.parts.text_config("t5")["d_model"]
        if width != read:
            yield self.parts.misfit(f"takes text of {width} features and T5 makes {read}; give T5-11B, the first one")
        elif "second_frame_share" in self.options.model_fields_set and not self.marks_given:
            yield Problem("", "[model] second_frame_share", "is for video to world alone; leave it out")

    def remarks(self) -> Iterator[tuple[str, str]]:
        yield from super().remarks()
        yield (
            "type",
            "NVIDIA's licence asks for its guardrail where this model is used, and samples of this run do not pass "
            "through one: whether that is allowed is yours to see to",
        )

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        return [] if self.told_rate is None else problems_of_rates(samples, self.told_rate)

    @property
    def told_rate(self) -> float | None:
        """The number of frames per second of which it is told; None if it is not."""
        return self.media.fps

    @property
    def patch(self) -> Sequence[int]:
        """How many latent frames, rows and columns are one token."""
        return self.parts.denoiser_config.get("patch_size", (1, 2, 2))

    def to_layers(self, denoiser: CosmosTransformer3DModel) -> list[nn.Module]:
        return chain_of(Entry(denoiser, self.told_rate), denoiser)

    def inputs_of(
        self, features: Features, x_BCfhw: torch.Tensor, t_BR: torch.Tensor, given_BC1hw: torch.Tensor | None = None
    ) -> CosmosInputs:
        """The inputs of the entry, for latents with the frames in place that are given."""
        frames = x_BCfhw.shape[2]
        cells_B1fhw = x_BCfhw.new_zeros(len(x_BCfhw), 1, *x_BCfhw.shape[2:])
        channels = [x_BCfhw]
        if self.marks_given:
            given_B = features.get("given_frames", torch.zeros(len(x_BCfhw), dtype=torch.int64))
            channels.append(cells_B1fhw + is_given(given_B, frames)[:, None, :, None, None])
        if self.parts.denoiser_config.get("concat_padding_mask", True):
            # Nothing is padded.
            channels.append(cells_B1fhw)
        return CosmosInputs(torch.cat(channels, dim=1), self.text_of(features), t_BR, given_BC1hw)

    def text_of(self, features: Features) -> torch.Tensor:
        """The text as the model sees it (B, L, D)."""
        # The padding is seen, as zeros.
        return lengthened(features["t5"], self.options.max_sequence_length)

    def given_frames(self, latent_shape: Sequence[int], quantile: float) -> int:
        if not self.marks_given:
            return 0
        return min(1 + (quantile < self.options.second_frame_share), latent_shape[-3] - 1)

    def guided(self, prompted: torch.Tensor, negative: torch.Tensor, guidance: float) -> torch.Tensor:
        """p + g (p - n), as in the stock pipeline."""
        return prompted + guidance * (prompted - negative)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return (height // 2) * (width // 2)


def with_first_frame(features: Features, first_BC1hw: torch.Tensor, frames: int) -> Features:
    """The features of a sample, which goes on from a first frame, as those of training."""
    whole_BCfhw = functional.pad(first_BC1hw, (0, 0, 0, 0, 0, frames - 1))
    given_B = torch.ones(len(first_BC1hw), dtype=torch.int64)
    return {**features, "latents": whole_BCfhw, "given_frames": given_B}
