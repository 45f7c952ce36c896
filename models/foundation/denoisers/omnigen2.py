"""The denoiser of OmniGen2 (Wu et al. 2025), which diffusers lacks: Lumina 2's blocks, and what lies around them.

Shapes: B batch, R references of a sample at most, T tokens of a picture or of the largest reference, L text tokens, F
text features, C latent channels, D width, S all tokens of a row, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.normalization import LuminaLayerNormContinuous
from diffusers.models.transformers.transformer_lumina2 import (
    Lumina2CombinedTimestepCaptionEmbedding,
    Lumina2TransformerBlock,
)
from torch import nn

from models.foundation.denoisers.omnigen2_rows import (
    References,
    grid_of,
    latent_of,
    positions,
    reference_tokens,
    rotary_table,
    tokens_of,
)

MOST_REFERENCES = 5
TIME_WIDTH = 1024
"""The time's embedding is at most as wide."""
SINUSOIDS = 256
HEAD_EPSILON = 1e-6
SMALL = 0.02
"""Standard deviation of what is drawn for the embeddings of a new model."""


class TimeCaptionEmbedding(Lumina2CombinedTimestepCaptionEmbedding):
    """Lumina 2's embedding of time and text, for a time in [0, 1] that is scaled within the sinusoids: scaled before,
    it would be rounded otherwise."""

    def __init__(self, hidden_size: int, text_feat_dim: int, norm_eps: float, timestep_scale: float):
        super().__init__(hidden_size, text_feat_dim, SINUSOIDS, norm_eps)
        self.time_proj = Timesteps(SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=0.0, scale=timestep_scale)


class OmniGen2Transformer2DModel(ModelMixin, ConfigMixin):
    """The whole denoiser; its arguments are the keys of the published configuration. `axes_lens` are the numbers of
    places for which the publisher has tables; here they are computed for any place."""

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2520,
        num_layers: int = 32,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 21,
        num_kv_heads: int = 7,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        axes_dim_rope: tuple[int, int, int] = (40, 40, 40),
        axes_lens: tuple[int, int, int] = (1024, 1664, 1664),
        text_feat_dim: int = 2048,
        timestep_scale: float = 1000.0,
    ):
        super().__init__()
        sizes = (hidden_size, num_attention_heads, num_kv_heads, multiple_of, ffn_dim_multiplier, norm_eps)

        def blocks(number: int, *, modulation: bool = True) -> nn.ModuleList:
            return nn.ModuleList(Lumina2TransformerBlock(*sizes, modulation=modulation) for _ in range(number))

        cells = patch_size**2
        self.x_embedder = nn.Linear(cells * in_channels, hidden_size)
        self.ref_image_patch_embedder = nn.Linear(cells * in_channels, hidden_size)
        self.image_index_embedding = nn.Parameter(torch.empty(MOST_REFERENCES, hidden_size))
        self.time_caption_embed = TimeCaptionEmbedding(hidden_size, text_feat_dim, norm_eps, timestep_scale)
        self.context_refiner = blocks(num_refiner_layers, modulation=False)
        self.noise_refiner = blocks(num_refiner_layers)
        self.ref_image_refiner = blocks(num_refiner_layers)
        self.layers = blocks(num_layers)
        self.norm_out = LuminaLayerNormContinuous(
            embedding_dim=hidden_size,
            conditioning_embedding_dim=min(hidden_size, TIME_WIDTH),
            elementwise_affine=False,
            eps=HEAD_EPSILON,
            bias=True,
            out_dim=cells * (out_channels or in_channels),
        )
        self.begin_anew()

    @torch.no_grad()
    def begin_anew(self) -> None:
        """The weights of a new model, as the publisher draws them: its blocks pass their input on, and its output is
        zero."""
        for linear in self._linears(self):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for linear in self._linears(self.time_caption_embed.timestep_embedder):
            nn.init.normal_(linear.weight, std=SMALL)
        for linear in self._linears(self.time_caption_embed.caption_embedder):
            nn.init.trunc_normal_(linear.weight, std=SMALL)
        nn.init.normal_(self.image_index_embedding, std=SMALL)
        modulations = [module for name, module in self.named_modules() if name.endswith("norm1.linear")]
        for linear in (*modulations, *self._linears(self.norm_out)):
            nn.init.zeros_(linear.weight)

    @staticmethod
    def _linears(module: nn.Module) -> Iterator[nn.Linear]:
        return (one for one in module.modules() if isinstance(one, nn.Linear))

    def forward(
        self,
        x_BChw: torch.Tensor,
        time_B: torch.Tensor,
        text_BLF: torch.Tensor,
        text_mask_BL: torch.Tensor,
        references: References | None = None,
    ) -> torch.Tensor:
        """The prediction x_0 - noise (B, C, h, w).

        Args:
            x_BChw: the noised latents.
            time_B: in [0, 1], 1 is clean.
            text_mask_BL: which tokens are true, bool; the others are at the end.
            references: for each sample its latents, each (C, h, w) in a size of its own.
        """
        references, patch = references or [[] for _ in x_BChw], self.config.patch_size
        grids = [[grid_of(one, patch) for one in own] for own in references]
        places = positions(text_BLF.shape[1], text_mask_BL.sum(1).tolist(), grids, grid_of(x_BChw, patch))
        x_BTD = self.x_embedder(tokens_of(x_BChw, patch))
        time_BD, text_BLD = self.time_caption_embed(x_BTD, time_B, text_BLF)
        text_rope, rope = self._rope(places.text_BL3), self._rope(places.picture_BT3)
        mask_BL = text_mask_BL.bool()
        for block in self.context_refiner:
            text_BLD = block(text_BLD, None if mask_BL.all() else mask_BL, text_rope)
        for block in self.noise_refiner:
            x_BTD = block(x_BTD, None, rope, time_BD)
        parts, masks, ropes = [text_BLD], [mask_BL], [text_rope]
        if places.reference_BRT3 is not None:
            reference_rope = self._rope(places.reference_BRT3)
            reference_BRTD, mask_BRT = self._refined(references, reference_rope, time_BD)
            parts.append(reference_BRTD.flatten(1, 2))
            masks.append(mask_BRT.flatten(1))
            ropes.append(reference_rope.flatten(1, 2))
        row_BSD = torch.cat([*parts, x_BTD], dim=1)
        mask_BS = torch.cat([*masks, mask_BL.new_ones(x_BTD.shape[:2])], dim=1)
        row_rope = torch.cat([*ropes, rope], dim=1)
        for block in self.layers:
            row_BSD = block(row_BSD, None if mask_BS.all() else mask_BS, row_rope, time_BD)
        made_BTC = self.norm_out(row_BSD[:, -x_BTD.shape[1] :], time_BD)
        return latent_of(made_BTC, *x_BChw.shape[2:], patch)

    def _refined(
        self, references: References, rope_BRTE: torch.Tensor, time_BD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The references (B, R, T, D), each refined by itself, and which of their tokens are there (B, R, T)."""
        x_BRTC, mask_BRT = reference_tokens(references, self.config.patch_size)
        most = x_BRTC.shape[1]
        x_NTD = self.ref_image_patch_embedder(x_BRTC.flatten(0, 1))
        x_NTD = x_NTD + self.image_index_embedding[:most].repeat(len(x_BRTC), 1)[:, None]
        mask_NT, times = mask_BRT.flatten(0, 1), time_BD.repeat_interleave(most, dim=0)
        # A reference that is not there sees all of itself: of no tokens at all, attention makes no numbers.
        mask_NT = mask_NT | ~mask_NT.any(dim=1, keepdim=True)
        for block in self.ref_image_refiner:
            x_NTD = block(x_NTD, None if mask_NT.all() else mask_NT, rope_BRTE.flatten(0, 1), times)
        return x_NTD.unflatten(0, mask_BRT.shape[:2]), mask_BRT

    def _rope(self, places: torch.Tensor) -> torch.Tensor:
        return rotary_table(places, self.config.axes_dim_rope).to(self.x_embedder.weight.device)
