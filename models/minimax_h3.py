"""MiniMax-H3: text, sound and video in one sequence, through which blocks without any attention to the text go. Sound
is neither read nor made.

The samples of a micro-batch are parts of one sequence, one after the other, each of them its text and its video, and
attention is within each part. So texts of any lengths are beside each other without padding, and each sample has a time
of its own.

Shapes: B batch, C latent channels, f h w latent frames, height and width, U text tokens and V video tokens of all
samples, P = U + V tokens of the sequence, N numbers of a token, D width, F text features, E rotary angles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from models.base import BasePipeline, Features, ModelEncoder
from models.foundation.checkpoints.configs import stock_scheduler
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.minimax_h3 import MINIMAX_H3_LAYOUT
from models.foundation.encoders.minimax_h3_vae import (
    MINIMAX_H3,
    MiniMaxH3Autoencoder,
    cell_of,
    minimax_h3_latent_size,
    pieces_of,
)
from models.foundation.encoders.qwen3_vl import Qwen3VLStates
from models.foundation.layers.chain import Middle
from models.foundation.layers.data_ward_steps import DataWardSteps
from utils.dataset.buckets import MediaFacts
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem, UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.schema import SamplingSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import MiniMaxH3Transformer3DModel

TEXT = "qwen3_vl"
LAYER = 50
"""The hidden state that the model reads."""
PATCH = 2
OF_VIDEO, OF_TEXT, OF_SOUND = range(3)
"""What kind of token it is, as the model is told: it has a modulation for each."""
KINDS = 3
SOUND_CHANNELS = 2


class MiniMaxH3Options(ModelSettings):
    """`[model]` of `type = "minimax_h3"`.

    Inference shifts by 12 at all sizes, and takes evenly spaced noise levels before that: `shift = 12.0` with
    `timestep_sample_method = "uniform"` trains where samples are drawn. The model is distilled to need no guidance,
    which plain training undoes little by little: `folded_guidance` keeps it.
    """

    max_sequence_length: Count = 1024
    """Number of Qwen3-VL tokens of a caption that are read. The cache takes 10 KB for a token."""


class MiniMaxH3Inputs(NamedTuple):
    """The inputs of the entry. `video_V` and `text_U` are the places of these tokens in the sequence, `sample_P` is the
    number of the sample of each token, and `kind_P` what kind it is. `parts` and `texts` are tensors without elements,
    whose lengths are the numbers of tokens of each sample, and of its text. `canvas_fhw0` has no elements: its shape
    carries the latent's."""

    x_1VN: torch.Tensor
    text_1UF: torch.Tensor
    t_B: torch.Tensor
    positions_P3: torch.Tensor
    video_V: torch.Tensor
    text_U: torch.Tensor
    sample_P: torch.Tensor
    kind_P: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    texts: tuple[torch.Tensor, ...]
    canvas_fhw0: torch.Tensor


class MiniMaxH3Stream(NamedTuple):
    """What travels from layer to layer. Where the texts come into the sequence is empty until they are refined, and
    with that their fields end. `modulation_P` is the row of each token in a table of modulations, which has one for
    each sample and kind."""

    x_1PD: torch.Tensor
    text_1UD: torch.Tensor | None
    text_U: torch.Tensor | None
    texts: tuple[torch.Tensor, ...] | None
    time_BD: torch.Tensor
    modulation_P: torch.Tensor
    sample_P: torch.Tensor
    rope_PE: tuple[torch.Tensor, torch.Tensor]
    video_V: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    canvas_fhw0: torch.Tensor

    @property
    def places(self) -> Places:
        """What attention is told."""
        return Places(self.rope_PE, self.parts)


class Places(NamedTuple):
    """What attention is told of its sequence: the angles of tokens, if these have places, and the parts within which
    they see each other, as tensors of these lengths."""

    rope_PE: tuple[torch.Tensor, torch.Tensor] | None
    parts: tuple[torch.Tensor, ...]


class PartsAttention:
    """The stock attention within each part of a sequence.

    Args:
        stock: the stock processor.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, stock: Callable[..., torch.Tensor]):
        self.stock = stock

    def __call__(
        self, attn: nn.Module, hidden_states: torch.Tensor, rotary_emb: Places, attention_mask: None = None
    ) -> torch.Tensor:
        """A sequence (1, P, D)."""
        lengths = [len(part) for part in rotary_emb.parts]
        ropes = [None] * len(lengths)
        if rotary_emb.rope_PE is not None:
            ropes = zip(*(table.split(lengths) for table in rotary_emb.rope_PE), strict=True)
        parts = zip(hidden_states.split(lengths, dim=1), ropes, strict=True)
        # Of no tokens some kernels make nothing.
        return torch.cat([self.stock(attn, part, rope, None) if part.shape[1] else part for part, rope in parts], dim=1)


class Modulation(nn.Module):
    """The stock modulation of a block, for a Linear that may be quantised: the stock one asks for the type of its
    weight, which is that of the codes then."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.linear, self.width = stock.linear, stock.hidden_size

    def forward(self, time_BD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Six tables with a row for each sample and kind."""
        rows = self.linear(functional.silu(time_BD).to(self.linear.bias.dtype))
        return rows.view(-1, 6 * self.width).chunk(6, dim=-1)


class Entry(nn.Module):
    """Embeds tokens, text, time and positions."""

    def __init__(self, denoiser: MiniMaxH3Transformer3DModel):
        super().__init__()
        self.rope = denoiser.rope
        self.proj_in, self.context_embedder = denoiser.proj_in, denoiser.context_embedder
        # Nothing goes through it; it is trained as little as in the stock module without sound.
        self.audio_proj_in = denoiser.audio_proj_in
        self.time_proj, self.time_embedder = denoiser.time_proj, denoiser.time_embedder

    def forward(self, inputs: MiniMaxH3Inputs) -> MiniMaxH3Stream:
        dtype, time = self.context_embedder.weight.dtype, self.time_embedder
        x_1VD = self.proj_in(inputs.x_1VN.to(self.proj_in.weight.dtype)).to(dtype)
        sequence_1PD = x_1VD.new_zeros(1, len(inputs.sample_P), x_1VD.shape[2])
        return MiniMaxH3Stream(
            x_1PD=sequence_1PD.index_copy(1, inputs.video_V, x_1VD),
            text_1UD=self.context_embedder(inputs.text_1UF.to(dtype)),
            text_U=inputs.text_U,
            texts=inputs.texts,
            time_BD=time(self.time_proj(inputs.t_B).to(time.linear_1.weight.dtype)),
            modulation_P=inputs.sample_P * KINDS + inputs.kind_P,
            sample_P=inputs.sample_P,
            rope_PE=self.rope(inputs.positions_P3),
            video_V=inputs.video_V,
            parts=inputs.parts,
            canvas_fhw0=inputs.canvas_fhw0,
        )


class Refined(nn.Module):
    """A block of the refiner, for each text by itself. The last one, which has the refiner's norm, puts the texts into
    the sequence."""

    recomputable = True

    def __init__(self, block: nn.Module, norm: nn.Module | None):
        super().__init__()
        self.block, self.norm = block, norm

    def forward(self, stream: MiniMaxH3Stream) -> MiniMaxH3Stream:
        block = self.block
        text_1UD = stream.text_1UD + block.attn(block.norm1(stream.text_1UD), Places(None, stream.texts))
        text_1UD = text_1UD + block.ff(block.norm2(text_1UD))
        if self.norm is None:
            return stream._replace(text_1UD=text_1UD)
        x_1PD = stream.x_1PD.index_copy(1, stream.text_U, self.norm(text_1UD))
        return stream._replace(x_1PD=x_1PD, text_1UD=None, text_U=None, texts=None)


class Exit(nn.Module):
    """Projects the video tokens to the latent (B, C, f, h, w)."""

    def __init__(self, denoiser: MiniMaxH3Transformer3DModel):
        super().__init__()
        self.norm_out, self.proj_out = denoiser.norm_out, denoiser.proj_out
        # As that of the entry.
        self.audio_proj_out = denoiser.audio_proj_out

    def forward(self, stream: MiniMaxH3Stream) -> torch.Tensor:
        x_1PD = self.norm_out(stream.x_1PD, stream.time_BD, stream.sample_P).to(self.proj_out.weight.dtype)
        frames, height, width, _ = stream.canvas_fhw0.shape
        return rearrange(
            self.proj_out(x_1PD).index_select(1, stream.video_V).to(stream.x_1PD.dtype),
            "1 (b f h w) (c p q) -> b c f (h p) (w q)",
            f=frames,
            h=height // PATCH,
            w=width // PATCH,
            p=PATCH,
            q=PATCH,
        )


@dataclass(frozen=True)
class BareStates(Qwen3VLStates):
    """`Qwen3VLStates` of captions without anything around them, of which an empty one has no token."""

    layers: tuple[int, ...] = (LAYER,)

    @property
    def layers_kept(self) -> int:
        # One more than is read, since a norm follows the last.
        return max(self.layers) + 1

    def row(self, tokenizer: Any, caption: str) -> list[int]:
        return tokenizer(caption, max_length=self.length, truncation=True, add_special_tokens=False).input_ids

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, list[torch.Tensor]]:
        is_read = [bool(self.row(tokenizer, caption)) for caption in captions]
        written = [caption for caption, read in zip(captions, is_read, strict=True) if read]
        made = super().__call__(text_encoder, tokenizer, written) if written else {}
        features = {}
        for name, (_, *width) in self.shapes(text_encoder.config.get_text_config()).items():
            rows, dtype = iter(made.get(name, ())), torch.bool if name.endswith("_mask") else text_encoder.dtype
            empty = torch.empty(0, *width, dtype=dtype)
            features[name] = [next(rows) if read else empty for read in is_read]
        return features


class MiniMaxH3Pipeline(BasePipeline):
    """MiniMax-H3: text to video, of its transformer for text and key frames (`transformer`; `transformer_ref` has the
    same tensors and is for references). Sound is neither read nor made, as the stock module has it for a sequence
    without sound; an export makes video with sound as the base does. Pictures are trained as clips of one frame, and
    drawn by a decoder that was made for clips, so that samples of one frame look worse than what the model knows. As
    in inference, `steps` of `[sampling]` are one more than there are predictions. Of single files Comfy-Org's are
    read; files of MiniMax's own with the publisher's names have the rows of queries, keys and values in another order,
    which no file tells, and must not be given."""

    Options = MiniMaxH3Options
    denoiser_class = "MiniMaxH3Transformer3DModel"
    config_keys = ("in_channels", "num_refiner_layers", "patch_size", "text_dim")
    text_parts = (TextPart(TEXT, "Qwen3VLModel"),)
    media = MediaFacts(spatial=32, temporal=17, max_frames=345, fps=24.0, further=5)
    objective = FlowMatching(predicts_data_minus_noise=True, time_is_cleanness=True)
    blocks = ("token_refiner.refiner_blocks", "transformer_blocks")
    stream_type = MiniMaxH3Stream
    keep_in_high_precision = ("proj_in.", "proj_out.", "time_embedder.")
    original_layout = MINIMAX_H3_LAYOUT
    scheduler_sets_levels = True
    guided_by_second_prediction = True

    def __init__(self, options: MiniMaxH3Options, seed: int = 0):
        super().__init__(options, seed)
        # `check` reports what an incomplete folder lacks.
        with suppress(UserError):
            piece, further = pieces_of(self._vae_config)
            spatial = PATCH * cell_of(self._vae_config)
            self.media = replace(self.media, spatial=spatial, temporal=piece, further=further)

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self._vae_config["latent_channels"]
        text = self.encoders()[1].config().get_text_config()
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give MiniMax-H3's own VAE"
            )
        if list(config["patch_size"]) != [1, PATCH, PATCH]:
            yield self.parts.misfit(
                f"has `patch_size` {config['patch_size']}, and MiniMax-H3 has [1, {PATCH}, {PATCH}]; download it again"
            )
        if not config["num_refiner_layers"]:
            yield self.parts.misfit("has no `num_refiner_layers`, and MiniMax-H3 has two; download it again")
        if config["text_dim"] != text.hidden_size or text.num_hidden_layers <= LAYER:
            yield self.parts.misfit(
                f"takes text of {config['text_dim']} features behind layer {LAYER} of its text encoder, and that has "
                f"{text.num_hidden_layers} layers of {text.hidden_size}; give Qwen3-VL 32B"
            )

    def problems_of_samples(self, sampling: SamplingSettings) -> Iterator[Problem]:
        if sampling.prompts and "guidance" not in sampling.model_fields_set:
            message = (
                f"is {sampling.guidance:g} where it is not given, and this model is distilled to need none; set it to "
                "1.0, or to more for a model that has lost its distillation"
            )
            yield Problem("", "[sampling] guidance", message)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        return [
            MiniMaxH3Autoencoder(options.diffusers_path, options.vae_path, self.dtype, draw=options.latents),
            self.parts.text_encoder(BareStates(TEXT, options.max_sequence_length)),
        ]

    def build_denoiser(self) -> MiniMaxH3Transformer3DModel:
        denoiser = super().build_denoiser()
        for module in denoiser.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(PartsAttention(module.processor))
        for block in denoiser.transformer_blocks:
            block.adaln_proj = Modulation(block.adaln_proj)
        return denoiser

    def to_layers(self, denoiser: MiniMaxH3Transformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_1PD",
            "temb": "time_BD",
            "adaln_indices": "modulation_P",
            "rotary_emb": "places",
        }
        *first, last = denoiser.token_refiner.refiner_blocks
        refined = [*(Refined(block, None) for block in first), Refined(last, denoiser.token_refiner.final_norm)]
        middles = [Middle(block, reads, writes=("x_1PD",)) for block in denoiser.transformer_blocks]
        return [Entry(denoiser), *refined, *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> MiniMaxH3Inputs:
        from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

        mask_BL = features[f"{TEXT}_mask"].bool()
        texts, size = mask_BL.sum(dim=1).tolist(), tuple(x_t.shape[2:])
        layouts = [
            MiniMaxH3PrepareLayoutStep.build_packed_sequence(
                torch.full((length,), OF_TEXT), *size, 0, (1, PATCH, PATCH), SOUND_CHANNELS, OF_SOUND, OF_VIDEO
            )
            for length in texts
        ]
        positions, kinds, videos, _, of_texts, *_ = zip(*layouts, strict=True)
        parts = [len(kind_S) for kind_S in kinds]
        starts = torch.tensor([0, *parts[:-1]]).cumsum(dim=0)
        return MiniMaxH3Inputs(
            x_1VN=rearrange(x_t, "b c f (h p) (w q) -> 1 (b f h w) (c p q)", p=PATCH, q=PATCH),
            text_1UF=features[TEXT][mask_BL].unsqueeze(0),
            t_B=self.objective.model_time(t_B),
            positions_P3=torch.cat(positions).float(),
            video_V=torch.cat([start + place for start, place in zip(starts, videos, strict=True)]),
            text_U=torch.cat([start + place for start, place in zip(starts, of_texts, strict=True)]),
            sample_P=torch.arange(len(parts)).repeat_interleave(torch.tensor(parts)),
            kind_P=torch.cat(kinds),
            parts=tuple(torch.empty(length, 0) for length in parts),
            texts=tuple(torch.empty(length, 0) for length in texts),
            canvas_fhw0=torch.empty(*size, 0),
        )

    def tokens(self, latent_shape: Sequence[int]) -> int:
        *_, height, width = latent_shape
        return (height // PATCH) * (width // PATCH)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        return minimax_h3_latent_size(self._vae_config, width, height, frames)

    def scheduler(self) -> DataWardSteps:
        return DataWardSteps(stock_scheduler(self.options.diffusers_path, "MiniMaxH3Scheduler"))

    # Kept, as every micro-batch asks for it.
    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return MINIMAX_H3.config(self.options.diffusers_path, self.options.vae_path)
