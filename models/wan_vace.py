"""Wan VACE: Wan's text to video, whose blocks are given hints by blocks of a second chain, which reads a clip to
follow.

The stock module makes all hints first. Here each block of the second chain stands just before the block to which its
hint is added, so that one hint at a time is kept.

Shapes: B batch, C latent channels, f h w latent frames, height and width, T video tokens, L text tokens, R rows of
time, D width of the transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import nn

from models.base import Features, ModelEncoder
from models.foundation.checkpoints.layouts.wan import VACE_LAYOUT
from models.foundation.encoders.guide import MADE_ANEW, GuideAutoencoder, LedAutoencoder, RegionsAutoencoder, unpacked
from models.foundation.layers.chain import Middle
from models.wan import Entry, Exit, WanPipeline, WanStream
from utils.dataset.encoders import Encoder
from utils.dataset.inputs import control_names
from utils.dataset.samples import MediaFile, Sample
from utils.errors import Problem, UserError
from utils.media.geometry import same_shape
from utils.settings.dataset_schema import ControlFit
from utils.settings.model_schema import ModelSettings
from utils.settings.run_tables import SamplingSettings
from utils.settings.values import Count, Natural

if TYPE_CHECKING:
    from diffusers import WanVACETransformer3DModel


class WanVaceOptions(ModelSettings):
    """`[model]` of `type = "wan_vace"`.

    The first control image of each sample, in the first folder of `control_path`, is what is followed: a clip for each
    clip, as long and in the same shape (depth, poses, lines, the clip without colours ...), or a still, which lasts for
    all of it; a grey one says nothing. All of the clip is made anew, unless masks say what is kept.
    """

    tells_apart: ClassVar[tuple[str, ...]] = (*ModelSettings.tells_apart, "expert")

    expert: Literal["high", "low"] = "high"
    """Which expert of VACE for Wan 2.2 A14B is trained, as of `type = "wan"`. Wan 2.1 has a single model, which is in
    the folder of the high one."""
    max_sequence_length: Count = 512
    """Number of UMT5 tokens that the model sees, including padding."""
    references: Natural = 0
    """How many reference pictures each sample has behind what it follows, in further folders of `control_path`. In
    inference they are fitted whole into the clip's shape, on white: `control_fit = "pad"`."""
    mask_means: Literal["weight", "made_anew"] = "weight"
    """What masks of the dataset mean: weights of the loss, or, brighter than grey, what of the clip that is followed is
    made anew, and else what is kept of it, for inpainting, outpainting, and, by masks that are clips, going on from
    first frames. Of what is kept it shows what is kept. It may be the trained clip itself (`control_path` is then
    `path`): where that is made anew, it is shown grey, as in inference. Any other file is shown as it is, and must not
    show the answer where its mask is white. Files without a mask are made anew throughout. The loss counts all of a
    clip. Samples have `mask_images`."""


class WanVaceInputs(NamedTuple):
    """The inputs of the entry: those of Wan, without a first frame, and what is followed."""

    x_BCfhw: torch.Tensor
    text_BLD: torch.Tensor
    t_BR: torch.Tensor
    first_frame_BLD: None
    control_BCfhw: torch.Tensor


class WanVaceStream(NamedTuple):
    """What travels from layer to layer: Wan's stream, the second chain's tokens up to its last block, and the hint for
    the next block, if there is one."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor
    modulation_BR6D: torch.Tensor
    time_BRD: torch.Tensor
    row_T: torch.Tensor | None
    rope_1T1D: tuple[torch.Tensor, torch.Tensor]
    canvas_fhw0: torch.Tensor
    control_BTD: torch.Tensor | None
    hint_BTD: torch.Tensor | None

    modulation = WanStream.modulation


class VaceEntry(Entry):
    """Wan's entry, which embeds what is followed too."""

    def __init__(self, denoiser: WanVACETransformer3DModel, text_tokens: int):
        super().__init__(denoiser, text_tokens)
        self.vace_patch_embedding = denoiser.vace_patch_embedding

    def forward(self, inputs: WanVaceInputs) -> WanVaceStream:
        control_BCfhw = inputs.control_BCfhw.to(self.vace_patch_embedding.weight.dtype)
        patches_BDfhw = self.vace_patch_embedding(control_BCfhw)
        control_BTD = rearrange(patches_BDfhw, "b d f h w -> b (f h w) d").contiguous()
        return WanVaceStream(*super().forward(inputs), control_BTD=control_BTD, hint_BTD=None)


class Hinting(Middle):
    """A block of the second chain."""

    def __init__(self, block: nn.Module, reads: Mapping[str, str], *, is_last: bool):
        super().__init__(block, reads, writes=("hint_BTD", "control_BTD"))
        self.is_last = is_last

    def forward(self, stream: WanVaceStream) -> WanVaceStream:
        stream = super().forward(stream)
        return stream._replace(control_BTD=None) if self.is_last else stream


class Hinted(Middle):
    """A block to which a hint is added."""

    def forward(self, stream: WanVaceStream) -> WanVaceStream:
        stream = super().forward(stream)
        return stream._replace(x_BTD=stream.x_BTD + stream.hint_BTD, hint_BTD=None)


class WanVacePipeline(WanPipeline):
    """Wan VACE of Alibaba: clips that follow others, in their depth, poses, lines or whatever the dataset's
    `control_path` shows of each clip, that keep parts of them, and show what is on reference pictures."""

    Options = WanVaceOptions
    denoiser_class = "WanVACETransformer3DModel"
    config_keys = ("in_channels", "vace_in_channels", "vace_layers")
    blocks = ("blocks", "vace_blocks")
    stream_type = WanVaceStream
    original_layout = VACE_LAYOUT
    starts_from_picture = False
    ends_in_picture = False
    follows_clip = True

    @property
    def max_controls(self) -> int:
        return 1 + self.options.references

    @property
    def masks_weigh(self) -> bool:
        return self.options.mask_means == "weight"

    @property
    def control_fit(self) -> ControlFit:
        return "pad" if self.options.references else None

    def problems_of_parts(self) -> Iterator[Problem]:
        config, made = self.parts.denoiser_config, self._vae_config["z_dim"]
        read = 2 * made + self._cell**2
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes {config['in_channels']} channels, and the VAE makes {made}; give its own VAE"
            )
        elif config["vace_in_channels"] != read:
            yield self.parts.misfit(
                f"takes {config['vace_in_channels']} channels of what it follows, and the VAE makes {read} with the "
                "mask; give its own VAE"
            )
        if config.get("image_dim") is not None:
            yield self.parts.misfit("sees a first frame by CLIP (`image_dim`), as no VACE does; download it again")
        if config["vace_layers"] != sorted(set(config["vace_layers"])):
            yield self.parts.misfit("`vace_layers` must be in ascending order, each once; download it again")

    @property
    def _cell(self) -> int:
        """The side of a latent cell in pixels."""
        return self._vae_config.get("scale_factor_spatial", 8)

    def problems_of_data(self, samples: Sequence[Sample]) -> list[Problem]:
        reasons = _reasons_of_weights if self.masks_weigh else _reasons_of_regions
        found = [
            (key, reason, next((one for one in samples if is_wrong(one)), None))
            for key, (reason, is_wrong) in reasons(self.options.references).items()
        ]
        return [
            Problem("", f"[[directory]] {key}", f"{reason}, and {one.media.locator} is one with it; leave it out")
            for key, reason, one in found
            if one is not None
        ] + [*_problems_of_guides(samples), *(() if self.masks_weigh else _problems_of_masks(samples))]

    def problems_of_samples(self, sampling: SamplingSettings) -> Iterator[Problem]:
        asked = 1 + self.options.references
        if sampling.prompts and any(len(given) != asked for given in sampling.control_images or [()]):
            message = (
                "this model follows a clip: give one, or a still picture, for each prompt"
                + f", and behind it as many references as [model] has, {asked - 1}" * (asked > 1)
            )
            yield Problem("", "[sampling] control_images", message)

    def encoders_for(self, controls: int) -> list[Encoder]:
        references = self.options.references
        if controls != 1 + references:
            raise UserError.of(
                f"this model follows clips, and is shown {references} reference pictures: the samples have {controls} "
                f"files beside them, and need {1 + references}; name their folders in control_path, first that of what "
                'is followed, and set [model] references; for text to video alone give a model of type "wan"',
                where="[[directory]]",
            )
        return self.encoders(controls)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options = self.options
        vae = (options.diffusers_path, options.vae_path, self.dtype)
        references = control_names(1 + options.references)[1:]
        plain, text = super().encoders()
        led = LedAutoencoder(*vae, draw=options.latents, references=references) if references else plain
        guide = GuideAutoencoder if self.masks_weigh else RegionsAutoencoder
        return [led, text, *([guide(*vae, references=references)] if controls else [])]

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        channels, own, *size = super().latent_shape(width, height, frames)
        return channels, own + self.options.references, *size

    def to_layers(self, denoiser: WanVACETransformer3DModel) -> list[nn.Module]:
        reads = {
            "hidden_states": "x_BTD",
            "encoder_hidden_states": "text_BLD",
            "temb": "modulation",
            "rotary_emb": "rope_1T1D",
        }
        hinting = dict(zip(denoiser.config.vace_layers, denoiser.vace_blocks, strict=True))
        layers: list[nn.Module] = [VaceEntry(denoiser, self.options.max_sequence_length)]
        for number, block in enumerate(denoiser.blocks):
            if number in hinting:
                controlled = {**reads, "control_hidden_states": "control_BTD"}
                layers.append(Hinting(hinting[number], controlled, is_last=number == max(hinting)))
            layers.append((Hinted if number in hinting else Middle)(block, reads, writes=("x_BTD",)))
        return [*layers, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> WanVaceInputs:
        guide_BCfhw = features["guide_latents"].to(x_t)
        # The mask of what is made anew, whose cells' pixels are channels: never the references.
        mask_BCfhw = x_t.new_zeros(len(x_t), self._cell**2, *x_t.shape[2:])
        mask_BCfhw[:, :, self.options.references :] = unpacked(features[MADE_ANEW]) if MADE_ANEW in features else 1.0
        return WanVaceInputs(
            x_BCfhw=x_t,
            text_BLD=features["umt5"],
            t_BR=t_B[:, None],
            first_frame_BLD=None,
            control_BCfhw=torch.cat([guide_BCfhw, mask_BCfhw], dim=1),
        )

    def given_frames(self, latent_shape: Sequence[int], quantile: float) -> int:
        return 0


_Reasons = dict[str, tuple[str, Callable[[Sample], Any]]]
"""Keys of a dataset -> why they cannot be used, and by which samples they are."""


def _reasons(references: int) -> _Reasons:
    return {"control_resolution": ("clips are followed at their own size", lambda one: one.rules.control_resolution)}


def _reasons_of_weights(references: int) -> _Reasons:
    """Where masks weigh the loss."""
    reason = (
        "masks do not say what they mean for reference pictures, unless they say what of a clip is kept: "
        '[model] mask_means = "made_anew"'
    )
    return {**_reasons(references), "mask_path": (reason, lambda one: one.mask is not None and references)}


def _reasons_of_regions(references: int) -> _Reasons:
    """Where masks say what is made anew."""
    no_weight = 'masks are no weights of the loss with [model] mask_means = "made_anew"'
    return {
        **_reasons(references),
        "color_jitter": (
            "what is kept would have other colours than the clip",
            lambda one: one.mask is not None and any(one.rules.color_jitter or ()),
        ),
        "unmasked_weight": (no_weight, lambda one: one.rules.unmasked_weight),
        "normalize_masked_area": (no_weight, lambda one: one.rules.normalize_masked_area),
        "mask_probability": (
            f"{no_weight}, and a mask always holds; list the folder again without mask_path for clips of which nothing "
            "is kept",
            lambda one: one.rules.mask_probability < 1,
        ),
    }


def _problems_of_masks(samples: Sequence[Sample]) -> Iterator[Problem]:
    """Masks that are clips, and shorter than those on which they lie."""
    masked = [(one, one.mask.media) for one in samples if one.mask is not None and not one.mask.is_alpha]
    short = [(one.media, mask) for one, mask in masked if _is_too_short(one, mask)]
    if short:
        media, mask = short[0]
        message = (
            f"{len(short)} of the samples go on where their mask has ended: the first is {media.locator}, and "
            f"{mask.locator} has {mask.frames} frames, {mask.fps:g} per second; replace those files, have clips "
            'begin where their files do (video_clip_mode = "single_beginning"), or use stills, which last for ever'
        )
        yield Problem("", "[[directory]] mask_path", message)


def _problems_of_guides(samples: Sequence[Sample]) -> Iterator[Problem]:
    """Clips to follow that do not lie on the clips that follow them, in place or in time."""
    guided = [(one, one.controls[0].media) for one in samples if one.controls]
    turned = [(one.media, guide) for one, guide in guided if not same_shape(_size(guide), _size(one.media))]
    short = [(one.media, guide) for one, guide in guided if _is_too_short(one, guide)]
    if turned:
        media, guide = turned[0]
        sizes = f"{guide.width} x {guide.height} and {media.width} x {media.height}"
        message = (
            f"{len(turned)} of the samples have another shape than what they follow, so that neither lies on the "
            f"other: the first are {guide.locator} and {media.locator}, {sizes}; scale one to the shape of the other"
        )
        yield Problem("", "[[directory]] control_path", message)
    if short:
        media, guide = short[0]
        message = (
            f"{len(short)} of the samples go on where what they follow has ended: the first is {media.locator}, and "
            f"{guide.locator} has {guide.frames} frames, {guide.fps:g} per second; use shorter clips, or replace those "
            "files"
        )
        yield Problem("", "[[directory]] control_path", message)


def _size(media: MediaFile) -> tuple[int, int]:
    return media.width, media.height


def _is_too_short(sample: Sample, beside: MediaFile) -> bool:
    # A still lasts for ever.
    if beside.frames == 1 or sample.bucket.frames == 1:
        return False
    last = (sample.bucket.frames - 1) / sample.fps
    return any(take.start + last >= beside.frames / beside.fps for take in sample.takes)
