"""The common part of Stable Diffusion 1.5 and SDXL: a UNet in layers, CLIPs that are cached or trained with it, and
files that are diffusers folders or the publisher's checkpoints.

Shapes: B batch, C latent channels, h w latent cells, L tokens, D text features, P pooled text features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from models.base import Features, ModelEncoder
from models.families.ddpm import DDPMOptions, ddpm_objective, ddpm_scheduler
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.denoiser import EnsembleDenoiserWeights
from models.foundation.checkpoints.folders import (
    TextPart,
    problems_of,
)
from models.foundation.checkpoints.sd_single_file import (
    MARKS,
    UNET,
    CheckpointLayout,
    open_clip_to_original,
    part_of,
    vae_to_original,
    with_parts_of_checkpoint,
)
from models.foundation.checkpoints.storage import Storage, StorageRules
from models.foundation.checkpoints.unet_names import unet_layout
from models.foundation.checkpoints.weights import build_empty, load_tensors, meta_tensors
from models.foundation.encoders.clip import (
    ClipEncoder,
    ClipFeatures,
    ClipTokens,
    Pooled,
    clip_module,
)
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.vae import AUTOENCODER_KL, ImageAutoencoder
from models.foundation.layers.ensemble import Ensemble
from models.foundation.layers.unet import UNetStream, unet_layers, unknown_variant
from utils.dataset.buckets import MediaFacts
from utils.diffusion.objectives import Epsilon
from utils.errors import Problem, UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.values import OptionalRate, Positive

Tensors = dict[str, torch.Tensor]
OPENAI_ACTIVATION = "quick_gelu"
"""The activation that distinguishes CLIPs of OpenAI from OpenCLIPs."""


class StableDiffusionOptions(DDPMOptions):
    """The common keys of `[model]`."""

    unet_lr: Positive | None = None
    """Learning rate of the UNet; default: `lr` of `[optimizer]`."""
    text_encoder_1_lr: OptionalRate = None
    """Train the first text encoder (CLIP-L) too, with this learning rate; default, and with 0: it is frozen, and its
    features of captions are cached."""


@dataclass(frozen=True, kw_only=True)
class ClipPart(TextPart):
    """A text encoder of the model.

    Attributes:
        lr_option: the option with its learning rate.
        lora_prefixes: what its modules' names begin with in kohya's files, first what is written.
        is_open_clip: whether it is OpenCLIP, which has names of its own in checkpoints.
    """

    lr_option: str
    lora_prefixes: tuple[str, ...]
    is_open_clip: bool = False

    @property
    def pooled(self) -> Pooled | None:
        """The pooled feature that the model reads, if any."""
        return "text_embeds" if self.model_class == "CLIPTextModelWithProjection" else None


class UNetInputs(NamedTuple):
    """The inputs of the entry. For each text encoder, `texts` has its features (B, L, D), or the ids and weights of
    tokens, both (B, L), if the encoder is trained. `pooled_BP` is None if the model has no pooled text or if the
    encoder that makes it is trained."""

    x_BChw: torch.Tensor
    step_B: torch.Tensor
    texts: tuple[torch.Tensor | tuple[torch.Tensor, torch.Tensor], ...]
    pooled_BP: torch.Tensor | None = None
    sizes_B6: torch.Tensor | None = None


class Entry(nn.Module):
    """Runs the text encoders that are trained, embeds the time and SDXL's sizes, and convolves the latent.

    Args:
        readers: for each text encoder how its features are made; None if they are given.
    """

    def __init__(self, ensemble: Ensemble, readers: Sequence[tuple[str, ClipFeatures] | None]):
        super().__init__()
        unet = ensemble.unet
        self.conv_in, self.time_proj, self.time_embedding = unet.conv_in, unet.time_proj, unet.time_embedding
        self.add_time_proj = getattr(unet, "add_time_proj", None)
        self.add_embedding = getattr(unet, "add_embedding", None)
        self.readers = [reader and reader[1] for reader in readers]
        self.text_encoders = nn.ModuleList(getattr(ensemble, reader[0]) for reader in readers if reader)

    def forward(self, inputs: UNetInputs) -> UNetStream:
        dtype = self.conv_in.weight.dtype
        text_BLD, pooled_BP = self._texts(inputs)
        time_BD = self.time_embedding(self.time_proj(inputs.step_B).to(dtype))
        if self.add_embedding is not None:
            # Sizes stay float32 until they are embedded: in bfloat16, 1000 and 1001 are the same.
            sizes_BD = self.add_time_proj(inputs.sizes_B6.flatten()).reshape(len(pooled_BP), -1)
            time_BD = time_BD + self.add_embedding(torch.cat([pooled_BP, sizes_BD], dim=-1).to(dtype))
        x_BChw = self.conv_in(inputs.x_BChw.to(dtype))
        return UNetStream(x_BChw, (x_BChw,), time_BD, text_BLD.to(dtype))

    def _texts(self, inputs: UNetInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text (B, L, D) of all encoders side by side, and the pooled text (B, P)."""
        encoders, made, pooled_BP = iter(self.text_encoders), [], inputs.pooled_BP
        for reader, text in zip(self.readers, inputs.texts, strict=True):
            features = {} if reader is None else reader.of_tokens(next(encoders), *text)
            made.append(text if reader is None else features[reader.name])
            if reader is not None and reader.pooled:
                pooled_BP = features[f"{reader.name}_pooled"]
        return torch.cat(made, dim=-1), pooled_BP


class StableDiffusionPipeline(PicturePipeline):
    """A Stable Diffusion. The denoiser is an `Ensemble` of the UNet and the text encoders that are trained.

    Attributes:
        text_parts: its text encoders, in the order in which their features are concatenated.
        addition: `addition_embed_type` of its UNet.
        other: the name of a UNet with another value there.
    """

    Options: ClassVar[type[ModelSettings]] = StableDiffusionOptions
    # The UNet halves the sides of a latent three times.
    media = MediaFacts(spatial=64, temporal=1, max_frames=1)
    patch = 1
    blocks = (f"{UNET}.*.attentions", "text_encoder*.layers")
    convolutional_blocks = (f"{UNET}.*.resnets", f"{UNET}.*.downsamplers", f"{UNET}.*.upsamplers")
    stream_type = UNetStream
    denoiser_class = "UNet2DConditionModel"
    denoiser_folder = UNET
    config_keys = (
        "block_out_channels",
        "cross_attention_dim",
        "down_block_types",
        "in_channels",
        "layers_per_block",
        "up_block_types",
    )
    scheduler_sets_levels = True
    guided_by_second_prediction = True
    text_parts: ClassVar[tuple[ClipPart, ...]]
    addition: ClassVar[str | None]
    other: ClassVar[str]

    def __init__(self, options: StableDiffusionOptions, seed: int = 0):
        # Done here, so that everything else only has to ask the options where a part is.
        super().__init__(with_parts_of_checkpoint(options, self.text_parts), seed)
        self._given = options.model_fields_set

    def text_features(self) -> dict[str, Any]:
        """The fields of `ClipFeatures` that differ from their defaults."""
        return {}

    @cached_property
    def objective(self) -> Epsilon:
        return ddpm_objective(self.options)

    @cached_property
    def original_layout(self) -> CheckpointLayout:
        prefixes = {
            part.folder: (*(f"{prefix}_" for prefix in part.lora_prefixes), f"text_encoders.{part.name}.transformer.")
            for part in self.text_parts
        }
        return CheckpointLayout(unet_layout(self.parts.denoiser_config), prefixes, self._beside_the_unet)

    @property
    def trained_texts(self) -> list[ClipPart]:
        """The text encoders that have a learning rate."""
        return [part for part in self.text_parts if getattr(self.options, part.lr_option)]

    def check_folder(self) -> None:
        if problems := problems_of([self._check_rates, super().check_folder]):
            raise UserError(problems)

    def _check_rates(self) -> None:
        if self.options.text_encoder_dtype and self.trained_texts:
            raise UserError.of(
                f"is for text encoders that stay as they are, and {self.trained_texts[0].lr_option} trains one, in "
                "`dtype`; leave one of them out",
                where="[model] text_encoder_dtype",
            )
        if self.options.from_scratch and self.trained_texts:
            raise UserError.of(
                "begins the UNet from random numbers, from which a text encoder would only unlearn; leave it out, or "
                f"{self.trained_texts[0].lr_option}",
                where="[model] from_scratch",
            )

    def problems_of_parts(self) -> Iterator[Problem]:
        self.scheduler()
        config, latent = self.parts.denoiser_config, self.vae_config["latent_channels"]
        width = sum(self._text_encoder(part).shapes[part.name][1] for part in self.text_parts)
        if config.get("addition_embed_type") != self.addition:
            yield self.parts.misfit(f"is {self.other}, not this model's UNet")
        if variant := unknown_variant(config):
            yield self.parts.misfit(f"is of another kind of UNet ({variant})")
        if config["in_channels"] != latent:
            yield self.parts.misfit(
                f"takes {config['in_channels']} channels and the VAE makes {latent}; a UNet that paints inside masks "
                "or edits pictures is not trained here"
            )
        if config["cross_attention_dim"] != width:
            yield self.parts.misfit(
                f"takes text of {config['cross_attention_dim']} features and the text encoders make {width}"
            )
        if self.vae_config.get("latents_mean") is not None:
            yield self.parts.misfit(
                "lies beside a VAE with statistics of its latents (latents_mean), which are not known here; give "
                "another vae"
            )
        for part in self.text_parts:
            act = self.parts.text_config(part.name).get("hidden_act", OPENAI_ACTIVATION)
            if (act != OPENAI_ACTIVATION) != part.is_open_clip:
                message = (
                    f"is a CLIP with the activation {act}, as {'OpenAI' if part.is_open_clip else 'Stable Diffusion 2'}"
                    " has it, which is not trained here; give this model's own"
                )
                yield Problem(str(self.options.diffusers_path / part.folder / "config.json"), "", message)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        return [self.autoencoder(), *(self._text_encoder(part) for part in self.text_parts)]

    def autoencoder(self) -> ImageAutoencoder:
        # Many VAEs overflow in float16.
        dtype = torch.float32 if self.dtype == torch.float16 and self.vae_config.get("force_upcast") else self.dtype
        return ImageAutoencoder(self.options.diffusers_path, self.options.vae_path, dtype, draw=self.options.latents)

    def _text_encoder(self, part: ClipPart) -> TextEncoder:
        length = self.parts.text_config(part.name)["max_position_embeddings"]
        features = ClipFeatures(part.name, length, part.pooled, **self.text_features())
        return self.parts.text_encoder(features, ClipTokens if part in self.trained_texts else ClipEncoder)

    def build_denoiser(self) -> Ensemble:
        unet, parts = super().build_denoiser(), self.trained_texts
        texts = {part.folder: clip_module(self._text_encoder(part), loaded=False) for part in parts}
        configs = {part.folder: self.parts.text_config(part.name) for part in parts}
        return Ensemble({UNET: unet, **texts}, {UNET: dict(unet.config), **configs})

    @property
    def weights(self) -> EnsembleDenoiserWeights:
        texts = {
            part.folder: partial(clip_module, self._text_encoder(part), loaded=True) for part in self.trained_texts
        }
        return EnsembleDenoiserWeights(**vars(super().weights), part=UNET, loaders=texts)

    def remarks(self) -> Iterator[tuple[str, str]]:
        yield from super().remarks()
        for mark, (option, value) in MARKS.items():
            if option not in self._given and getattr(self.options, option) == value:
                yield option, f"taken as {str(value).lower()}: the checkpoint has the mark `{mark}`"
        frozen = [part.lr_option for part in self.text_parts if part not in self.trained_texts]
        if unsaid := [option for option in frozen if option not in self.options.model_fields_set]:
            yield (
                " and ".join(unsaid),
                "not given: these text encoders are not trained (diffusion-pipe and kohya's scripts train them with "
                "the rate of the rest; 0 says that it is meant)",
            )

    def learning_rate(self, name: str) -> float | None:
        rates = {
            UNET: self.options.unet_lr,
            **{part.folder: getattr(self.options, part.lr_option) for part in self.text_parts},
        }
        return rates[name.partition(".")[0]]

    @property
    def storage(self) -> StorageRules:
        rules = super().storage
        texts = tuple((f"{part.folder}.*", Storage(self.dtype)) for part in self.text_parts)
        return replace(rules, rules=(*texts, *rules.rules))

    def to_layers(self, denoiser: Ensemble) -> list[nn.Module]:
        readers = [
            (part.folder, self._text_encoder(part).features) if part in self.trained_texts else None
            for part in self.text_parts
        ]
        return [Entry(denoiser, readers), *unet_layers(denoiser.unet)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> UNetInputs:
        texts = tuple(
            (features[f"{part.name}_tokens"], features[f"{part.name}_weights"])
            if part in self.trained_texts
            else features[part.name]
            for part in self.text_parts
        )
        pooled = next((features.get(f"{part.name}_pooled") for part in self.text_parts if part.pooled), None)
        return UNetInputs(x_t, self.objective.model_time(t_B), texts, pooled)

    def scheduler(self) -> Any:
        return ddpm_scheduler(self.options)

    def _beside_the_unet(self, tensors: Tensors) -> Tensors:
        """The other parts of a checkpoint: the VAE, and the text encoders, trained or original; on the meta device, and
        not read, if the tensors are."""
        first = next(iter(tensors.values()))
        dtype, read = first.dtype, meta_tensors if first.is_meta else load_tensors
        vae = AUTOENCODER_KL.load(self.options.diffusers_path, self.options.vae_path, dtype, read)
        checkpoint = vae_to_original(vae.state_dict(), self.vae_config)
        for part in self.text_parts:
            text = part_of(tensors, part.folder)
            if part not in self.trained_texts:
                make = partial(clip_module, self._text_encoder(part), loaded=not first.is_meta)
                text = dict((build_empty(make) if first.is_meta else make()).named_parameters())
            named = open_clip_to_original(text) if part.is_open_clip else text
            checkpoint |= {f"{part.names.prefix}{name}": tensor.detach().to(dtype) for name, tensor in named.items()}
        # ComfyUI reads from these what the model predicts.
        told = {"v_pred": self.objective.kind == "v", "ztsnr": self.objective.schedule.zero_terminal_snr}
        return {**checkpoint, **{name: torch.empty(0) for name, holds in told.items() if holds}}
