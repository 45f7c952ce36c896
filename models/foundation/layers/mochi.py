"""What Mochi's layers and samples need beside the stock modules.

Shapes: B batch, T tokens of a clip, L text tokens, D width, H heads, E half the features of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Rope = tuple[torch.Tensor, torch.Tensor]
AREA = 192 * 192
"""Of a frame, in whose unit the distances of tokens are."""


class OwnTextAttention:
    """The stock attention of clip and text, for each sample with the tokens of its own text. The stock processor looks
    for these in a mask, and so waits for the GPU in every block."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: tuple[torch.Tensor, ...] | None,
        image_rotary_emb: Rope,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip (B, T, D) and text (B, L, D), whose padding gets what is projected of zeros.

        Args:
            attention_mask: for each sample a tensor without elements, as long as its text; None if no text is padded.
        """
        query, key, value = self._heads(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        query, key = (rotated(norm(one), image_rotary_emb) for norm, one in ((attn.norm_q, query), (attn.norm_k, key)))
        of_text = self._heads(attn, encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_query, text_key, text_value = attn.norm_added_q(of_text[0]), attn.norm_added_k(of_text[1]), of_text[2]
        pairs = [
            (clip.transpose(1, 2), text.transpose(1, 2))
            for clip, text in ((query, text_query), (key, text_key), (value, text_value))
        ]
        if attention_mask is None:
            joined = functional.scaled_dot_product_attention(*(torch.cat(pair, dim=2) for pair in pairs))
        else:
            joined = torch.cat([self._of_sample(number, len(own), pairs) for number, own in enumerate(attention_mask)])
        sizes = hidden_states.shape[1], encoder_hidden_states.shape[1]
        clip, text = joined.transpose(1, 2).flatten(2, 3).split(sizes, dim=1)
        clip = attn.to_out[1](attn.to_out[0](clip))
        return clip, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text

    @staticmethod
    def _heads(attn: nn.Module, states: torch.Tensor, *projections: nn.Module) -> list[torch.Tensor]:
        return [project(states).unflatten(2, (attn.heads, -1)) for project in projections]

    @staticmethod
    def _of_sample(number: int, length: int, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """What the heads of a sample give, (1, H, T + L, 2 E), with zeros for the padding behind its text."""
        one = slice(number, number + 1)
        seen = [torch.cat([clip[one], text[one, :, :length]], dim=2) for clip, text in pairs]
        padding = pairs[0][1].shape[2] - length
        return functional.pad(functional.scaled_dot_product_attention(*seen), (0, 0, 0, padding))


def rotated(heads_BTHE: torch.Tensor, rope_THE: Rope) -> torch.Tensor:
    """Pairs of neighbouring features, turned by angles that each head has learned."""
    cos, sin = rope_THE
    even, odd = heads_BTHE[..., 0::2].float(), heads_BTHE[..., 1::2].float()
    turned = even * cos - odd * sin, even * sin + odd * cos
    return torch.stack([one.to(heads_BTHE.dtype) for one in turned], dim=-1).flatten(-2)


def rope_of(frequencies_3HE: torch.Tensor, frames: int, height: int, width: int) -> Rope:
    """Cosines and sines (T, H, E), in float32, of the angles of a grid of tokens: frames are counted, rows and columns
    lie around the middle, as far apart as if all tokens of a frame filled the same area."""
    device, apart = frequencies_3HE.device, math.sqrt(AREA / (height * width))
    axes = [torch.arange(frames, dtype=torch.float32, device=device)]
    for side in (height, width):
        edges = torch.linspace(-side * apart / 2, side * apart / 2, side + 1, device=device)
        axes.append((edges[:-1] + edges[1:]) / 2)
    places_T3 = torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1).view(-1, 3)
    angles_THE = torch.einsum("td,dhe->the", places_T3, frequencies_3HE.float())
    return angles_THE.cos(), angles_THE.sin()


class InvertedSteps:
    """A scheduler whose sigmas are how clean a latent is, with noise levels t times 1000 as timesteps. Has the
    interface of a scheduler of diffusers.

    Args:
        stock: `FlowMatchEulerDiscreteScheduler` with `invert_sigmas`.
    """

    def __init__(self, stock: Any):
        self.stock, self.config = stock, stock.config
        self.timesteps = torch.empty(0)

    def set_timesteps(self, sigmas: Any) -> None:
        """Steps at these noise levels, which the stock scheduler shifts."""
        self.stock.set_timesteps(sigmas=sigmas)
        self.timesteps = (1 - self.stock.sigmas[:-1]) * self.config.num_train_timesteps

    def step(
        self, velocity: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, *, return_dict: bool
    ) -> tuple[torch.Tensor]:
        """The latents of the next step, for the velocity n - x_0."""
        number = (self.timesteps == timestep).nonzero()[0].item()
        return self.stock.step(-velocity, self.stock.timesteps[number], latents, return_dict=return_dict)
