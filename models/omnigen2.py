"""OmniGen2: Lumina 2's blocks, with reference pictures between text and picture in the row; texts of Qwen2.5-VL.

Each reference is refined by itself. In a batch text is padded within the row, where what pads it is masked: tokens know
their places from rotary tables alone.

Shapes: B batch, R references of a sample, N = B R references, T image tokens (of the largest reference in fields of
references), L text tokens, E rotary frequencies, C channels of a token, D width, h w latent cells. The stream's T is
that of the whole row from the first joined block on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from models.base import Features, ModelEncoder
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.configs import SCHEDULER_FILE
from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.layouts.omnigen2 import OMNIGEN2_LAYOUT
from models.foundation.checkpoints.stock import of_diffusers
from models.foundation.denoisers.omnigen2_rows import (
    grid_of,
    latent_of,
    positions,
    reference_tokens,
    rotary_table,
    tokens_of,
)
from models.foundation.encoders.qwen_vl import Prompt
from models.foundation.encoders.vae import ImageAutoencoder
from models.foundation.layers.chain import Middle
from models.foundation.layers.patches import PATCH
from utils.dataset.inputs import control_names
from utils.dataset.samples import Sample
from utils.diffusion.objectives import FlowMatching
from utils.diffusion.timesteps import RESOLUTION_SHIFTS, ResolutionShift
from utils.errors import Problem
from utils.json_files import read_json
from utils.settings.model_schema import ModelSettings
from utils.settings.run_tables import SamplingSettings
from utils.settings.values import Count, Positive

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from models.foundation.denoisers.omnigen2 import OmniGen2Transformer2DModel

TEXT = "qwen2_5_vl"
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant that generates high-quality images based on user instructions."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
)
REFERENCES = 5
"""The most that a sample can have, which the model tells apart by an embedding each."""
UNSHIFTED_SIDE = 20
"""Tokens along the side of a picture whose samples are not shifted."""


class OmniGen2Options(ModelSettings):
    """`[model]` of `type = "omnigen2"`.

    Control images of the dataset are the references, one to five for each sample; captions call them "image 1", "the
    second image" and so on. Empty captions are read with the same system prompt as others, as the pipeline reads its
    negative prompt. The publisher trains with `timestep_sample_method = "logit_normal"` and `flux_shift = true`.
    """

    max_sequence_length: Count = 888
    """Qwen2.5-VL tokens of a caption that are read, those of the template around it included."""
    image_guidance: Positive = 2.0
    """In samples with control images, how much these guide, beside `guidance` of `[sampling]` for the prompt: 1.2 to 2
    for edits, 2.5 to 3 for new pictures of what they show. Above 1 it takes a third prediction in every step; up to 1
    the control images guide together with the prompt."""


class OmniGen2Inputs(NamedTuple):
    """What the entry takes. Masks are None where nothing is padded, references None where there are none. `canvas_hw0`
    has no elements: its shape carries the latent's height and width."""

    x_BTC: torch.Tensor
    rope_BTE: torch.Tensor
    text_BLD: torch.Tensor
    text_mask_BL: torch.Tensor | None
    text_rope_BLE: torch.Tensor
    reference_NTC: torch.Tensor | None
    reference_mask_NT: torch.Tensor | None
    reference_rope_NTE: torch.Tensor | None
    t_B: torch.Tensor
    canvas_hw0: torch.Tensor


class OmniGen2Stream(NamedTuple):
    """What travels from layer to layer. `x_BTD`, its mask and its rotary table are the picture's until the first joined
    block, which puts text and references before it and sets their fields to None."""

    x_BTD: torch.Tensor
    mask_BT: torch.Tensor | None
    rope_BTE: torch.Tensor
    text_BLD: torch.Tensor | None
    text_mask_BL: torch.Tensor | None
    text_rope_BLE: torch.Tensor | None
    reference_NTD: torch.Tensor | None
    reference_mask_NT: torch.Tensor | None
    reference_rope_NTE: torch.Tensor | None
    time_BD: torch.Tensor
    canvas_hw0: torch.Tensor

    @property
    def reference_time_ND(self) -> torch.Tensor:
        """The time of each reference's sample."""
        return self.time_BD.repeat_interleave(len(self.reference_NTD) // len(self.time_BD), dim=0)


class Entry(nn.Module):
    """Embeds tokens, references, text and time."""

    def __init__(self, denoiser: OmniGen2Transformer2DModel):
        super().__init__()
        self.x_embedder = denoiser.x_embedder
        self.ref_image_patch_embedder = denoiser.ref_image_patch_embedder
        self.image_index_embedding = denoiser.image_index_embedding
        self.time_caption_embed = denoiser.time_caption_embed

    def forward(self, inputs: OmniGen2Inputs) -> OmniGen2Stream:
        dtype = self.x_embedder.weight.dtype
        x_BTD = self.x_embedder(inputs.x_BTC.to(dtype))
        # The time stays float32 until it is embedded.
        time_BD, text_BLD = self.time_caption_embed(x_BTD, inputs.t_B, inputs.text_BLD.to(dtype))
        reference_NTD = None
        if inputs.reference_NTC is not None:
            batch, each = len(x_BTD), len(inputs.reference_NTC) // len(x_BTD)
            index_ND = self.image_index_embedding[:each].repeat(batch, 1)
            reference_NTD = self.ref_image_patch_embedder(inputs.reference_NTC.to(dtype)) + index_ND[:, None]
        return OmniGen2Stream(
            x_BTD=x_BTD,
            mask_BT=None,
            rope_BTE=inputs.rope_BTE,
            text_BLD=text_BLD,
            text_mask_BL=inputs.text_mask_BL,
            text_rope_BLE=inputs.text_rope_BLE,
            reference_NTD=reference_NTD,
            reference_mask_NT=inputs.reference_mask_NT,
            reference_rope_NTE=inputs.reference_rope_NTE,
            time_BD=time_BD,
            canvas_hw0=inputs.canvas_hw0,
        )


class OfReferences(Middle):
    """A block that refines references, if there are any."""

    def forward(self, stream: OmniGen2Stream) -> OmniGen2Stream:
        return stream if stream.reference_NTD is None else super().forward(stream)


class FirstJoined(Middle):
    """The first block that sees text, references and picture in a row."""

    def forward(self, stream: OmniGen2Stream) -> OmniGen2Stream:
        batch = len(stream.x_BTD)
        parts = [(stream.text_BLD, stream.text_mask_BL, stream.text_rope_BLE)]
        if stream.reference_NTD is not None:
            fields = (stream.reference_NTD, stream.reference_mask_NT, stream.reference_rope_NTE)
            # The references of a sample follow one another.
            parts.append(tuple(None if one is None else one.unflatten(0, (batch, -1)).flatten(1, 2) for one in fields))
        parts.append((stream.x_BTD, None, stream.rope_BTE))
        tokens, masks, ropes = zip(*parts, strict=True)
        mask_BT = None
        if any(mask is not None for mask in masks):
            seen = dict(dtype=torch.bool, device=stream.x_BTD.device)
            filled = (
                torch.ones(x_BTD.shape[:2], **seen) if mask is None else mask
                for x_BTD, mask in zip(tokens, masks, strict=True)
            )
            mask_BT = torch.cat(list(filled), dim=1)
        row = stream._replace(
            x_BTD=torch.cat(tokens, dim=1),
            mask_BT=mask_BT,
            rope_BTE=torch.cat(ropes, dim=1),
            text_BLD=None,
            text_mask_BL=None,
            text_rope_BLE=None,
            reference_NTD=None,
            reference_mask_NT=None,
            reference_rope_NTE=None,
        )
        return super().forward(row)


class Exit(nn.Module):
    """Projects the picture's tokens, the last of the row, to the latent (B, C, h, w)."""

    def __init__(self, denoiser: OmniGen2Transformer2DModel):
        super().__init__()
        self.norm_out = denoiser.norm_out

    def forward(self, stream: OmniGen2Stream) -> torch.Tensor:
        height, width, _ = stream.canvas_hw0.shape
        tokens = (height // PATCH) * (width // PATCH)
        return latent_of(self.norm_out(stream.x_BTD[:, -tokens:], stream.time_BD), height, width, PATCH)


class RootShift(ResolutionShift):
    """s is the root of the number of tokens over the tokens of a side: the publisher's scheduler."""

    fitted_to = None

    def mu(self, tokens: int, steps: int = 50) -> float:
        return math.log(math.sqrt(tokens) / UNSHIFTED_SIDE)


class OmniGen2Pipeline(PicturePipeline):
    """OmniGen2 of VectorSpaceLab, from text, and from reference pictures (edits). The dataset gives references the
    target's size, or the area of `control_resolution` in its shape. Their latents are all that is seen of them: the
    chat mode, which shows them to the language model too, is not trained."""

    Options = OmniGen2Options
    denoiser_class = "OmniGen2Transformer2DModel"
    config_keys = (
        "axes_dim_rope",
        "axes_lens",
        "hidden_size",
        "in_channels",
        "num_attention_heads",
        "patch_size",
        "text_feat_dim",
    )
    text_parts = (TextPart(TEXT, "Qwen2_5_VLModel", "mllm", "processor"),)
    objective = FlowMatching(predicts_data_minus_noise=True, time_is_cleanness=True)
    blocks = ("context_refiner", "noise_refiner", "ref_image_refiner", "layers")
    stream_type = OmniGen2Stream
    resolution_shift = RESOLUTION_SHIFTS["flux"]
    sampling_shift = RootShift()
    original_layout = OMNIGEN2_LAYOUT
    guided_by_second_prediction = True
    max_controls = REFERENCES

    def problems_of_parts(self) -> Iterator[Problem]:
        config, length = self.parts.denoiser_config, self.options.max_sequence_length
        channels, made = config["in_channels"], self.vae_config["latent_channels"]
        _, read = self._text_encoder.shapes[TEXT]
        turned, width = sum(config["axes_dim_rope"]), config["hidden_size"] // max(1, config["num_attention_heads"])
        if config["patch_size"] != PATCH:
            yield self.parts.misfit(f"has patches of side {config['patch_size']}; give OmniGen2, whose are {PATCH}")
        if channels != made:
            yield self.parts.misfit(f"takes latents of {channels} channels and the VAE makes {made}; give Flux.1's VAE")
        if (config.get("out_channels") or channels) != channels:
            yield self.parts.misfit(f"takes {channels} channels and makes {config['out_channels']}; both must be one")
        if config["text_feat_dim"] != read:
            yield self.parts.misfit(
                f"takes text of {config['text_feat_dim']} features and Qwen2.5-VL makes {read}; give that of 3B"
            )
        if turned != width or any(axis % 2 for axis in config["axes_dim_rope"]):
            yield self.parts.misfit(
                f"`axes_dim_rope` must be even and add up to the {width} channels of a head, and are "
                f"{config['axes_dim_rope']}"
            )
        # Text has the places from 0 on, and the picture the one after it.
        if length >= config["axes_lens"][0]:
            message = (
                f"{length} tokens are more than this model has places for; set at most {config['axes_lens'][0] - 1}"
            )
            yield Problem("", "[model] max_sequence_length", message)

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        """A row's places are those of the text, of the longer side of each reference, and of the picture."""
        places, length = self.parts.denoiser_config["axes_lens"][0], self.options.max_sequence_length
        side = self.cell * PATCH
        for sample in samples:
            sides = sum(max(one.bucket.width, one.bucket.height) // side for one in sample.controls)
            if sides and length + sides >= places:
                message = (
                    f"the references of {sample.media.locator} take {sides} of the {places} places in a row, which "
                    f"leaves {places - 1 - sides} for text: set [model] max_sequence_length to at most as many, or a "
                    "smaller control_resolution"
                )
                return [Problem("", "[[directory]]", message)]
        return []

    def problems_of_samples(self, sampling: SamplingSettings) -> Iterator[Problem]:
        if not sampling.control_images and "image_guidance" in self.options.model_fields_set:
            message = "is for samples with control images, and there are none; leave it out, or give some"
            yield Problem("", "[model] image_guidance", message)

    @property
    def places(self) -> tuple[int, int]:
        _, rows, columns = self.parts.denoiser_config["axes_lens"]
        return rows, columns

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        # As in inference, references are drawn from their distribution; here each always alike.
        references = (
            ImageAutoencoder(options.diffusers_path, options.vae_path, self.dtype, reads=name)
            for name in control_names(controls)
        )
        return [self.autoencoder(), self._text_encoder, *references]

    @property
    def _text_encoder(self) -> ModelEncoder:
        return self.parts.text_encoder(Prompt(TEXT, TEMPLATE, 0, self.options.max_sequence_length))

    def to_layers(self, denoiser: OmniGen2Transformer2DModel) -> list[nn.Module]:
        text = {"hidden_states": "text_BLD", "attention_mask": "text_mask_BL", "image_rotary_emb": "text_rope_BLE"}
        row = {
            "hidden_states": "x_BTD",
            "attention_mask": "mask_BT",
            "image_rotary_emb": "rope_BTE",
            "temb": "time_BD",
        }
        reference = {
            "hidden_states": "reference_NTD",
            "attention_mask": "reference_mask_NT",
            "image_rotary_emb": "reference_rope_NTE",
            "temb": "reference_time_ND",
        }
        first, *others = denoiser.layers
        return [
            Entry(denoiser),
            *(Middle(block, text, writes=("text_BLD",)) for block in denoiser.context_refiner),
            *(Middle(block, row, writes=("x_BTD",)) for block in denoiser.noise_refiner),
            *(OfReferences(block, reference, writes=("reference_NTD",)) for block in denoiser.ref_image_refiner),
            FirstJoined(first, row, writes=("x_BTD",)),
            *(Middle(block, row, writes=("x_BTD",)) for block in others),
            Exit(denoiser),
        ]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> OmniGen2Inputs:
        text_BLD, mask_BL = features[TEXT], features[f"{TEXT}_mask"].bool()
        given = [f"{name}_latents" for name in control_names(REFERENCES)]
        latents = [features[name].float() for name in given if name in features]
        references = [[one[sample] for one in latents] for sample in range(len(x_t))]
        grids = [[grid_of(one, PATCH) for one in own] for own in references]
        places = positions(text_BLD.shape[1], mask_BL.sum(1).tolist(), grids, grid_of(x_t, PATCH))
        axes = self.parts.denoiser_config["axes_dim_rope"]
        reference_NTC = reference_mask_NT = reference_rope_NTE = None
        if latents:
            reference_BRTC, reference_mask_BRT = reference_tokens(references, PATCH)
            reference_NTC = reference_BRTC.flatten(0, 1)
            reference_mask_NT = None if reference_mask_BRT.all() else reference_mask_BRT.flatten(0, 1)
            reference_rope_NTE = rotary_table(places.reference_BRT3, axes).flatten(0, 1)
        return OmniGen2Inputs(
            x_BTC=tokens_of(x_t, PATCH),
            rope_BTE=rotary_table(places.picture_BT3, axes),
            text_BLD=text_BLD,
            text_mask_BL=None if mask_BL.all() else mask_BL,
            text_rope_BLE=rotary_table(places.text_BL3, axes),
            reference_NTC=reference_NTC,
            reference_mask_NT=reference_mask_NT,
            reference_rope_NTE=reference_rope_NTE,
            t_B=self.objective.model_time(t_B),
            canvas_hw0=torch.empty(*x_t.shape[2:], 0),
        )

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """diffusers' scheduler with the publisher's steps; theirs, whose name is the same, has another time."""
        config = read_json(self.options.diffusers_path / SCHEDULER_FILE, kinds={"dynamic_time_shift": bool | None})
        shifts = config.get("dynamic_time_shift") is not False
        return of_diffusers("FlowMatchEulerDiscreteScheduler")(use_dynamic_shifting=shifts)

    def contrasts(self, controls: int) -> Sequence[bool]:
        if not controls:
            return (True,)
        return (True, False) if self.options.image_guidance > 1.0 else (False,)

    def guided(
        self, prompted: torch.Tensor, negative: torch.Tensor, guidance: float, blind: torch.Tensor | None = None
    ) -> torch.Tensor:
        """b + q (n - b) + g (p - n), where n sees the references, b does not, and q is `image_guidance`; without b the
        usual guidance, in which n sees none."""
        if blind is None:
            return super().guided(prompted, negative, guidance)
        return blind + self.options.image_guidance * (negative - blind) + guidance * (prompted - negative)
