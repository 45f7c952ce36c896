"""diffusers' VAE of MiniMax-H3, which decodes pictures too.

Shapes: B batch, C latent channels, f h w latent frames, height and width.
"""

from __future__ import annotations

import diffusers
import torch


class AutoencoderKLMiniMaxH3(diffusers.AutoencoderKLMiniMaxH3):
    """A latent of one frame is decoded as the first one of a piece is; the stock class makes nothing of it."""

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        """Pixels of latents (B, C, f, h, w)."""
        if z.shape[2] > 1:
            return super()._decode(z)
        # What is before the first frame of a piece fills up the group of frames that one latent frame stands for.
        return self._decode_clip(z)[:, :, self.frame_pre_padding :]
