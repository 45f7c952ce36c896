"""FramePack of HunyuanVideo: a clip is made of its first frame in sections, each of which sees the frames that are
there already, the farther the coarser.

Two models have the same tensors. FramePack of picture to video makes the last section first, and each section sees
those behind it; FramePack F1 makes the first section first, and each sees those before it. Both see the first frame, as
a latent and through SigLIP.

Shapes: B batch, C latent channels, f latent frames of a section, F those of a clip, h w height and width, N frames that
a section sees, itself among them, R rows of positions, T tokens, L text tokens, first those of the picture, S = T + L,
D width of the transformer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from models.base import Features, ModelEncoder
from models.families.clips import problems_of_image_encoder, problems_of_stills
from models.foundation.checkpoints.folders import TextPart
from models.foundation.encoders.first_frame import SiglipVision
from models.foundation.encoders.hunyuan_vae import HunyuanFirstFrame, HunyuanVideoAutoencoder
from models.foundation.encoders.text_features import ClipPooled
from models.foundation.layers.around_stock import AroundStock
from models.foundation.layers.chain import Middle
from models.foundation.layers.padding import mask_behind
from models.hunyuan_video import CLIP, PATCH, TRAIN_STEPS, HunyuanVideoOptions, HunyuanVideoPipeline
from utils.dataset.buckets import MediaFacts
from utils.dataset.samples import Sample
from utils.diffusion.timesteps import ResolutionShift
from utils.errors import Problem
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

if TYPE_CHECKING:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

INVERTED, VANILLA = "inverted_anti_drifting", "vanilla"
WINDOW, GROUP = 9, 4
"""Latent frames of a published section, and frames of a clip that each of them covers."""
NEAR, MIDDLE, FAR = 1, 2, 16
"""Latent frames that are seen beside the first one: in full, at half and at a quarter of the size."""
SEEN = NEAR + MIDDLE + FAR
MOST_SECTIONS = 50
"""A minute."""
GREATEST_SHIFT = 7.0


class FramepackOptions(HunyuanVideoOptions):
    """`[model]` of `type = "framepack"`.

    The files do not tell FramePack of picture to video and FramePack F1 apart: `sampling_type` does. The parts are
    given one by one, without `diffusers_path`, or as a folder that the stock pipeline's `save_pretrained` has written.
    """

    sampling_type: Literal["inverted_anti_drifting", "vanilla"] = INVERTED
    """The order in which sections are made, called as in the stock pipeline: `inverted_anti_drifting`, from the last to
    the first, for FramePack of picture to video; `vanilla`, from the first to the last, for FramePack F1."""
    latent_window_size: Count = WINDOW
    """Latent frames of a section, each of which covers four frames; the published models were made for 9. Clips have
    the first frame and a whole number of sections: 37, 73, 109 ... frames."""


class FramepackInputs(NamedTuple):
    """The inputs of the entry. Without a mask, no text is padded.

    Attributes:
        x_BCfhw: the section, noised.
        clean_BC2hw, middle_BCfhw, far_BCfhw: what it sees: the first frame and the nearest other, then what is made
            smaller.
        places_RN: the frame's number, for the positions of all that is seen: the far ones, the middle ones, those in
            full, the section; one row if it is the same for all samples.
        frames_Bf: where in its clip the section is.
        canvas_Fhw0: without elements; its shape is that of a clip's latent.
    """

    x_BCfhw: torch.Tensor
    clean_BC2hw: torch.Tensor
    middle_BCfhw: torch.Tensor
    far_BCfhw: torch.Tensor
    places_RN: torch.Tensor
    frames_Bf: torch.Tensor
    canvas_Fhw0: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_BL: torch.Tensor | None
    picture_BLD: torch.Tensor
    pooled_BD: torch.Tensor
    t_B: torch.Tensor
    guidance_B: torch.Tensor | None


class FramepackStream(NamedTuple):
    """What travels from layer to layer; the section is last among the tokens."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    mask_B11S: torch.Tensor | None
    time_BD: torch.Tensor
    places_RN: torch.Tensor
    rope_RTD: tuple[torch.Tensor, torch.Tensor]
    frames_Bf: torch.Tensor
    canvas_Fhw0: torch.Tensor


class OwnPlacesAttention(AroundStock):
    """HunyuanVideo's attention where samples may be at other places of their clips: the stock processor takes one table
    of positions for all, so that each sample is attended to alone then."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Video (B, T, D) and text (B, L, D), with tables (R, T, D)."""
        tables = list(zip(*image_rotary_emb, strict=True))
        if len(tables) == 1:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, tables[0])
        masks = [None] * len(tables) if attention_mask is None else attention_mask.split(1)
        rows = zip(hidden_states.split(1), encoder_hidden_states.split(1), masks, tables, strict=True)
        videos, texts = zip(*(self.stock(attn, *row) for row in rows), strict=True)
        return torch.cat(videos), torch.cat(texts)


class Entry(nn.Module):
    """Embeds the section, what it sees, time and positions, and makes one text of picture and caption. Each stage makes
    the rotary tables itself."""

    remakes = ("rope_RTD",)

    def __init__(self, denoiser: HunyuanVideoFramepackTransformer3DModel):
        super().__init__()
        self.rope = denoiser.rope
        self.x_embedder = denoiser.x_embedder
        self.clean_x_embedder = denoiser.clean_x_embedder
        self.context_embedder = denoiser.context_embedder
        self.image_projection = denoiser.image_projection
        self.time_text_embed = denoiser.time_text_embed

    def forward(self, inputs: FramepackInputs) -> FramepackStream:
        dtype = self.x_embedder.proj.weight.dtype
        seen = [one.to(dtype) for one in (inputs.clean_BC2hw, inputs.middle_BCfhw, inputs.far_BCfhw)]
        clean_BTD, middle_BTD, far_BTD = self.clean_x_embedder(*seen)
        x_BTD = torch.cat([far_BTD, middle_BTD, clean_BTD, self.x_embedder(inputs.x_BCfhw.to(dtype))], dim=1)
        picture_BLD, mask_BL = self.image_projection(inputs.picture_BLD.to(dtype)), inputs.text_mask_BL
        text_BLD = self.context_embedder(inputs.text_BLD.to(dtype), inputs.t_B, mask_BL)
        # Time and guidance stay float32 until they are embedded: bfloat16 would round 0..1000 to steps of 4.
        time_BD, _ = self.time_text_embed(inputs.t_B, inputs.pooled_BD.to(dtype), inputs.guidance_B)
        return FramepackStream(
            x_BTD=x_BTD,
            text_BLD=torch.cat([picture_BLD, text_BLD], dim=1),
            mask_B11S=None if mask_BL is None else mask_behind(mask_BL, x_BTD.shape[1] + picture_BLD.shape[1]),
            time_BD=time_BD,
            places_RN=inputs.places_RN,
            rope_RTD=self._positions(inputs.places_RN, inputs.canvas_Fhw0),
            frames_Bf=inputs.frames_Bf,
            canvas_Fhw0=inputs.canvas_Fhw0,
        )

    def remake(self, stream: FramepackStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_RTD": self._positions(stream.places_RN, stream.canvas_Fhw0)}

    def _positions(self, places_RN: torch.Tensor, canvas_Fhw0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (R, T, D) of all tokens; one that stands for several cells has the mean of theirs."""
        rows, (_, height, width, _) = [], canvas_Fhw0.shape
        for places_N in places_RN:
            far, middle, others = places_N.split([FAR, MIDDLE, len(places_N) - FAR - MIDDLE])
            kinds = [
                [_means(table, len(far), height // PATCH, 4) for table in self._tables(far, height, width)],
                [_means(table, len(middle), height // PATCH, 2) for table in self._tables(middle, height, width)],
                self._tables(others, height, width),
            ]
            rows.append([torch.cat(tables) for tables in zip(*kinds, strict=True)])
        cosines, sines = zip(*rows, strict=True)
        return torch.stack(cosines), torch.stack(sines)

    def _tables(self, places_N: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rope(frame_indices=places_N, height=height, width=width, device=places_N.device)


def _means(table_TD: torch.Tensor, frames: int, height: int, side: int) -> torch.Tensor:
    """The mean over cubes of `side` tokens; the last of each direction are repeated up to a multiple of that."""
    grid_DNhw = rearrange(table_TD, "(n h w) d -> d n h w", n=frames, h=height)
    sides = [(0, -size % side) for size in reversed(grid_DNhw.shape[1:])]
    filled_DNhw = functional.pad(grid_DNhw[None], [one for pair in sides for one in pair], mode="replicate")
    return rearrange(functional.avg_pool3d(filled_DNhw, side)[0], "d n h w -> (n h w) d")


class Exit(nn.Module):
    """Projects the section's tokens to the clip's latent (B, C, F, h, w), with zeros for all other frames."""

    def __init__(self, denoiser: HunyuanVideoFramepackTransformer3DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out
        self.proj_out = denoiser.proj_out

    def forward(self, stream: FramepackStream) -> torch.Tensor:
        frames, height, width, _ = stream.canvas_Fhw0.shape
        made, (rows, columns) = stream.frames_Bf.shape[1], (height // PATCH, width // PATCH)
        x_BTC = self.proj_out(self.norm_out(stream.x_BTD[:, -made * rows * columns :], stream.time_BD))
        x_BCfhw = rearrange(
            x_BTC, "b (f h w) (c p q) -> b c f (h p) (w q)", f=made, h=rows, w=columns, p=PATCH, q=PATCH
        )
        clip_BCFhw = x_BCfhw.new_zeros(*x_BCfhw.shape[:2], frames, height, width)
        places = stream.frames_Bf[:, None, :, None, None].expand_as(x_BCfhw)
        return clip_BCFhw.scatter(2, places, x_BCfhw)


class SectionShift(ResolutionShift):
    """log s, linear in the number of tokens of a section, up to a greatest s (diffusers' FramePack pipeline)."""

    fitted_to = None

    def mu(self, tokens: int, steps: int = 50) -> float:
        return min(super().mu(tokens, steps), math.log(GREATEST_SHIFT))


class FramepackPipeline(HunyuanVideoPipeline):
    """FramePack of lllyasviel, which makes HunyuanVideo's clips of a picture in sections of 36 frames: that of picture
    to video, and F1. Clips alone are trained, of each a section that is drawn for the step, among the clip's own
    frames. Samples are whole clips, made section after section as in the stock pipeline, and decoded like other clips,
    where that one decodes every section with its neighbour and blends them. A last frame is not given to it.
    On the hub are its parts: lllyasviel/FramePackI2V_HY or lllyasviel/FramePack_F1_I2V_HY_20250503 is the transformer,
    hunyuanvideo-community/HunyuanVideo has VAE and text encoders, and lllyasviel/flux_redux_bfl the image encoder."""

    Options = FramepackOptions
    denoiser_class = "HunyuanVideoFramepackTransformer3DModel"
    config_keys = ("image_proj_dim", "in_channels", "pooled_projection_dim", "text_embed_dim")
    text_parts = (TextPart("llama", "LlamaModel"), CLIP)
    media = MediaFacts(spatial=16, temporal=GROUP * WINDOW, max_frames=1 + GROUP * WINDOW * MOST_SECTIONS, fps=30.0)
    stream_type = FramepackStream
    resolution_shift = SectionShift()
    # The publisher's names are those of diffusers.
    original_layout = None
    starts_from_picture = True
    # Not in the ways of HunyuanVideo itself.
    _condition = None

    def __init__(self, options: ModelSettings, seed: int = 0):
        super().__init__(options, seed)
        group = GROUP * options.latent_window_size
        self.media = replace(self.media, temporal=group, max_frames=1 + group * MOST_SECTIONS)

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self._vae_config["latent_channels"]
        yield from problems_of_image_encoder(self.options, sees=True)
        for key in ("has_image_proj", "has_clean_x_embedder"):
            if not config.get(key):
                yield self.parts.misfit(f"has no `{key}`; give the configuration of FramePack")
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes {config['in_channels']} channels, and the VAE makes {made}; give HunyuanVideo's own VAE"
            )
        yield from self._problems_of_widths()
        width = self._siglip().config["hidden_size"]
        if config["image_proj_dim"] != width:
            yield self.parts.misfit(
                f"has `image_proj_dim` {config['image_proj_dim']}, and its image encoder makes {width}; give SigLIP of "
                "lllyasviel/flux_redux_bfl"
            )

    def remarks(self) -> Iterator[tuple[str, str]]:
        yield from super().remarks()
        if "sampling_type" not in self.options.model_fields_set:
            yield (
                "sampling_type",
                f"is {INVERTED}, which is for FramePack of picture to video; the files do not tell, and FramePack F1 "
                f"is trained with {VANILLA}",
            )

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        return problems_of_stills(samples)

    def _siglip(self) -> SiglipVision:
        return SiglipVision(self.options.diffusers_path, self.options.image_encoder_path, self.dtype)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        vae = (options.diffusers_path, options.vae_path, self.dtype)
        return [
            HunyuanVideoAutoencoder(*vae, draw=options.latents),
            self._text_encoder(),
            self.parts.text_encoder(ClipPooled()),
            HunyuanFirstFrame(*vae),
            self._siglip(),
        ]

    def build_denoiser(self) -> HunyuanVideoFramepackTransformer3DModel:
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

        denoiser = super().build_denoiser()
        for block in (*denoiser.transformer_blocks, *denoiser.single_transformer_blocks):
            block.attn.set_processor(OwnPlacesAttention(HunyuanVideoAttnProcessor2_0()))
        return denoiser

    def to_layers(self, denoiser: HunyuanVideoFramepackTransformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "time_BD",
            "attention_mask": "mask_B11S",
        }
        lists = {"freqs_cis": denoiser.transformer_blocks, "image_rotary_emb": denoiser.single_transformer_blocks}
        middles = [
            Middle(block, {**reads, positions: "rope_RTD"}, writes=("x_BTD", "text_BLD"))
            for positions, blocks in lists.items()
            for block in blocks
        ]
        return [Entry(denoiser), *middles, Exit(denoiser)]

    def sections(self, latent_shape: Sequence[int]) -> Sequence[range]:
        length = self.options.latent_window_size
        in_time = [range(begin, begin + length) for begin in range(1, latent_shape[-3], length)]
        return in_time if self.options.sampling_type == VANILLA else in_time[::-1]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> FramepackInputs:
        mask_BL, embeds = features["llama_mask"].bool(), self.parts.denoiser_config.get("guidance_embeds", True)
        strength = self.options.guidance if guidance is None else guidance
        first_BC1hw = features["first_frame_latents"].to(x_t)
        # In samples what is made already is in the place of its noise.
        clip_BCFhw = torch.cat([first_BC1hw, features.get("latents", x_t).to(x_t)[:, :, 1:]], dim=2)
        sections = self.sections(x_t.shape[1:])
        begins = features["section"].tolist() if "section" in features else [sections[0].start] * len(x_t)
        near, middle, far = zip(*map(self._seen, clip_BCFhw, begins), strict=True)
        places_BN = torch.tensor([self._places(begin, len(sections)) for begin in begins])
        frames_Bf = torch.tensor(begins)[:, None] + torch.arange(self.options.latent_window_size)
        return FramepackInputs(
            x_BCfhw=torch.stack([one[:, frames] for one, frames in zip(x_t, frames_Bf, strict=True)]),
            clean_BC2hw=torch.cat([first_BC1hw, torch.stack(near)], dim=2),
            middle_BCfhw=torch.stack(middle),
            far_BCfhw=torch.stack(far),
            places_RN=places_BN[:1] if (places_BN == places_BN[:1]).all() else places_BN,
            frames_Bf=frames_Bf,
            canvas_Fhw0=torch.empty(*x_t.shape[2:], 0),
            text_BLD=features["llama"],
            # With a mask, even of ones, attention is slower.
            text_mask_BL=None if mask_BL.all() else mask_BL,
            picture_BLD=features[SiglipVision.name],
            pooled_BD=features["clip_pooled"],
            t_B=self.objective.model_time(t_B),
            guidance_B=torch.full((len(x_t),), strength * TRAIN_STEPS) if embeds else None,
        )

    def _seen(self, clip_CFhw: torch.Tensor, begin: int) -> tuple[torch.Tensor, ...]:
        """The nearest frame, the middle and the far ones that the section sees which begins there; zeros beyond the
        ends of the clip."""
        if self.options.sampling_type == VANILLA:
            before = clip_CFhw[:, :begin][:, -SEEN:]
            missing = SEEN - before.shape[1]
            far, middle, near = functional.pad(before, (0, 0, 0, 0, missing, 0)).split([FAR, MIDDLE, NEAR], dim=1)
        else:
            behind = clip_CFhw[:, begin + self.options.latent_window_size :][:, :SEEN]
            missing = SEEN - behind.shape[1]
            near, middle, far = functional.pad(behind, (0, 0, 0, 0, 0, missing)).split([NEAR, MIDDLE, FAR], dim=1)
        return near, middle, far

    def _places(self, begin: int, sections: int) -> list[int]:
        """The numbers of frames by which a section is told where all that it sees is, in the order of the tokens. One
        that is made from the start always is at the same place. One that is made from the end is told how far it is
        from the first frame: in clips of up to four sections as it is, in longer ones only that it is the first, the
        second, one between, or the last.
        """
        length = self.options.latent_window_size
        if self.options.sampling_type == VANILLA:
            return [*range(1, 1 + SEEN - NEAR), 0, SEEN, *range(1 + SEEN, 1 + SEEN + length)]
        number = (begin - 1) // length
        if sections > 4 and number > 1:
            number = 3 if number == sections - 1 else 2
        own = 1 + number * length
        near = own + length
        middle = near + NEAR
        return [*range(middle + MIDDLE, near + SEEN), *range(middle, middle + MIDDLE), 0, near, *range(own, near)]

    def before_steps(self, noise: torch.Tensor, features: Features) -> torch.Tensor:
        # HunyuanVideo's own picture to video begins with a little of the picture.
        return noise

    def after_steps(self, latents: torch.Tensor, features: Features) -> torch.Tensor:
        return torch.cat([features["first_frame_latents"].to(latents), latents[:, :, 1:]], dim=2)

    def tokens(self, latent_shape: Sequence[int]) -> int:
        """Those of a section, by which the stock pipeline shifts."""
        *_, frames, height, width = latent_shape
        return min(frames, self.options.latent_window_size) * (height // PATCH) * (width // PATCH)
