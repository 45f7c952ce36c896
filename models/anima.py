"""Anima: the transformer of Cosmos-Predict2 for pictures alone, with a text conditioner in front of it, which makes the
text of the caption's T5 tokens and what Qwen3 makes of it.

Shapes: B batch, C latent channels, h w latent cells, L tokens of Qwen3, M tokens of T5, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from models.base import Features, ModelEncoder
from models.families.cosmos import CosmosInputs, CosmosStream, chain_of, kind_of, places_of
from models.families.cosmos import Entry as CosmosEntry
from models.families.qwen_pictures import QwenPicturePipeline
from models.foundation.checkpoints.configs import made_of
from models.foundation.checkpoints.denoiser import DenoiserWeights
from models.foundation.checkpoints.folders import TextPart, problems_of, read_config
from models.foundation.checkpoints.headers import read_header
from models.foundation.checkpoints.layouts.anima import ANIMA_LAYOUT, CONDITIONER
from models.foundation.checkpoints.weights import EnsembleWeights, Weights
from models.foundation.encoders.t5_tokens import TOKENIZER, TOKENS, PlainCaptions, WithT5Tokens
from models.foundation.layers.ensemble import Ensemble
from utils.adapters.presets import TensorSource
from utils.errors import Problem, UserError
from utils.settings.model_schema import ModelSettings
from utils.settings.values import Count

TRANSFORMER = "transformer"
TEXT = "qwen3"
CONDITIONER_CLASS = "AnimaTextConditioner"


class AnimaOptions(ModelSettings):
    """`[model]` of `type = "anima"`."""

    max_sequence_length: Count = 512
    """Number of tokens of a caption that are read, of Qwen3 and of T5 alike."""


class AnimaInputs(NamedTuple):
    """The inputs of the entry. `x_BCfhw` has the channel of the padding too. The masks say which tokens are a caption's
    own; None if all are."""

    x_BCfhw: torch.Tensor
    text_BLD: torch.Tensor
    mask_BL: torch.Tensor | None
    tokens_BM: torch.Tensor
    tokens_mask_BM: torch.Tensor | None
    t_B: torch.Tensor


class Entry(nn.Module):
    """Makes the text, and embeds patches, time and positions. Each stage makes the rotary tables itself."""

    remakes = CosmosEntry.remakes

    def __init__(self, ensemble: Ensemble):
        super().__init__()
        self.text_conditioner = ensemble.text_conditioner
        self.embedder = CosmosEntry(ensemble.transformer, None)

    def forward(self, inputs: AnimaInputs) -> CosmosStream:
        text_BLD = self.text_conditioner(
            source_hidden_states=inputs.text_BLD.to(self.text_conditioner.out_proj.weight.dtype),
            target_input_ids=inputs.tokens_BM,
            target_attention_mask=inputs.tokens_mask_BM,
            source_attention_mask=inputs.mask_BL,
        )
        return self.embedder(CosmosInputs(inputs.x_BCfhw, text_BLD, inputs.t_B.unsqueeze(1), None))

    def remake(self, stream: CosmosStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return self.embedder.remake(stream)


@dataclass(frozen=True)
class AnimaWeights(DenoiserWeights):
    """The weights of transformer and text conditioner: of one file of ComfyUI's, or of two folders.

    Attributes:
        conditioner: file or folder of the conditioner's weights, if the transformer's do not have them.
    """

    conditioner: Path | None = None

    def check_fit(self) -> None:
        if self._is_whole:
            super().check_fit()
        else:
            self._opened(self.build_empty())

    def _opened(self, denoiser: nn.Module) -> TensorSource:
        if self._is_whole:
            return super()._opened(denoiser)
        transformer = self._weights(denoiser.transformer)
        parts = {TRANSFORMER: transformer, CONDITIONER: Weights(self.conditioner, denoiser.text_conditioner)}
        for weights in parts.values():
            weights.tell_unused()
        return EnsembleWeights(parts, {})

    @property
    def _is_whole(self) -> bool:
        return self.layout.recognises(read_header(self.path, with_gguf=True).files)


class AnimaPipeline(QwenPicturePipeline):
    """Anima of CircleStone Labs. A full fine-tune trains its text conditioner too, an adapter the transformer alone."""

    Options = AnimaOptions
    denoiser_class = "CosmosTransformer3DModel"
    config_keys = ("in_channels", "max_size", "text_embed_dim")
    text_parts = (TextPart(TEXT, "Qwen3Model", further_tokenizers=(TOKENIZER,)),)
    blocks = (f"{TRANSFORMER}.transformer_blocks",)
    stream_type = CosmosStream
    original_layout = ANIMA_LAYOUT
    guided_by_second_prediction = True

    def check_folder(self) -> None:
        if problems := problems_of([super().check_folder, self._check_conditioner]):
            raise UserError(problems)

    def _check_conditioner(self) -> None:
        folder = self.options.diffusers_path
        for part in (CONDITIONER, TOKENIZER):
            if (folder / part).is_dir():
                continue
            if self.options.architecture is None:
                raise UserError.of("this part is missing; download the whole diffusers folder", str(folder), part)
            raise UserError.of(
                f"T5's tokenizer is missing: give a folder with a folder `{TOKENIZER}` in it, in which its words are",
                "[model] tokenizer_path",
            )
        if not self.options.from_scratch and not self.weights._is_whole:
            read_header(self._conditioner_path)

    def problems_of_parts(self) -> Iterator[Problem]:
        config, conditioner = self.parts.denoiser_config, self._conditioner_config
        made, read = self._vae_config["z_dim"], self.parts.text_config(TEXT)["hidden_size"]
        named, _ = kind_of(config)
        if named != "Cosmos-Predict2":
            yield self.parts.misfit(f"is of {named}; give Anima, whose transformer is that of Cosmos-Predict2")
        elif config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes {config['in_channels']} channels and the VAE makes {made}; give Qwen-Image's VAE"
            )
        if config["text_embed_dim"] != conditioner["target_dim"]:
            yield self.parts.misfit(
                f"takes text of {config['text_embed_dim']} features and the text conditioner makes "
                f"{conditioner['target_dim']}; give those of one model"
            )
        if conditioner["source_dim"] != read:
            message = f"takes text of {conditioner['source_dim']} features and Qwen3 makes {read}; give Qwen3 0.6B"
            yield Problem(str(self._conditioner_file), "", message)

    @property
    def places(self) -> tuple[int, int]:
        return places_of(self.parts.denoiser_config)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        features = PlainCaptions(TEXT, self.options.max_sequence_length)
        known = self._conditioner_config["target_vocab_size"]
        return [self.autoencoder(), self.parts.text_encoder(features, WithT5Tokens, known=known)]

    def build_denoiser(self) -> Ensemble:
        conditioner = made_of(CONDITIONER_CLASS, self._conditioner_config, self._conditioner_file)
        parts = {TRANSFORMER: super().build_denoiser(), CONDITIONER: conditioner}
        return Ensemble(parts, {name: dict(part.config) for name, part in parts.items()})

    @property
    def weights(self) -> AnimaWeights:
        return AnimaWeights(**vars(super().weights), conditioner=self._conditioner_path)

    def to_layers(self, denoiser: Ensemble) -> list[nn.Module]:
        return chain_of(Entry(denoiser), denoiser.transformer)

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> AnimaInputs:
        mask_BL, tokens_mask_BM = (features[f"{name}_mask"].bool() for name in (TEXT, TOKENS))
        channels = [x_t]
        if self.parts.denoiser_config.get("concat_padding_mask", True):
            # Nothing is padded.
            channels.append(x_t.new_zeros(len(x_t), 1, *x_t.shape[2:]))
        return AnimaInputs(
            x_BCfhw=torch.cat(channels, dim=1),
            text_BLD=features[TEXT],
            mask_BL=None if mask_BL.all() else mask_BL,
            tokens_BM=features[TOKENS],
            tokens_mask_BM=None if tokens_mask_BM.all() else tokens_mask_BM,
            t_B=t_B,
        )

    # Kept, as every micro-batch asks for the encoders' shapes.
    @cached_property
    def _conditioner_config(self) -> dict[str, Any]:
        keys = ("source_dim", "target_dim", "target_vocab_size")
        return read_config(self.options.diffusers_path, CONDITIONER, model=CONDITIONER_CLASS, keys=keys)

    @property
    def _conditioner_file(self) -> Path:
        return self.options.diffusers_path / CONDITIONER / "config.json"

    @property
    def _conditioner_path(self) -> Path:
        """Where the conditioner's weights lie: beside those of the transformer, as a full fine-tune is exported, or in
        the diffusers folder."""
        given = self.options.transformer_path
        beside = given and given.parent / CONDITIONER
        return beside if beside and beside.is_dir() else self.options.diffusers_path / CONDITIONER
