"""Latent frames that a model of clips receives without noise, and from which it goes on: the first ones of a clip, or
all but those of a section.

Where these are the first ones, each frame has a time of its own. Times and what is made of them have a row for each
frame, or one row for all.

Shapes: B batch, C channels, f h w latent frames, height and width, T tokens, the frames outermost, R rows of time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def with_given_frames(
    features: Mapping[str, torch.Tensor], x_t: torch.Tensor, t_B: torch.Tensor, time: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents (B, C, f, h, w) with the frames in place that are given, and the times (B, R): one row if none is.

    Args:
        features: `latents`, and how many frames of each are given, `given_frames` (B,); without that, none is.
        x_t: noised latents.
        t_B: noise levels.
        time: what the model is told as the time of a given frame.
    """
    if "given_frames" not in features:
        return x_t, t_B.unsqueeze(1)
    is_given_Bf = is_given(features["given_frames"], x_t.shape[2])
    x_t = torch.where(is_given_Bf[:, None, :, None, None], features["latents"].to(x_t), x_t)
    return x_t, torch.where(is_given_Bf, time, t_B.unsqueeze(1))


def beside_first_frame(x_t: torch.Tensor, first_BC1hw: torch.Tensor | None) -> torch.Tensor:
    """The latents (B, 2 C + 1, f, h, w) with the first frame as further channels: its latent and a mask of ones, with
    zeros for the frames behind it; all zeros if there is none."""
    if first_BC1hw is None:
        given = x_t.new_zeros(len(x_t), x_t.shape[1] + 1, 0, *x_t.shape[3:])
    else:
        given = torch.cat([first_BC1hw, torch.ones_like(first_BC1hw[:, :1])], dim=1).to(x_t)
    behind = given.new_zeros(*given.shape[:2], x_t.shape[2] - given.shape[2], *given.shape[3:])
    return torch.cat([x_t, torch.cat([given, behind], dim=2)], dim=1)


def is_given(given_B: torch.Tensor, frames: int) -> torch.Tensor:
    """Which frames are given, (B, f), when so many of each clip are."""
    return torch.arange(frames, device=given_B.device) < given_B.unsqueeze(1)


def loss_weights(given_B: torch.Tensor, frames: int) -> torch.Tensor:
    """The weights of the frames in the loss (B, 1, f, 1, 1): 0 for those that are given, as the model need not predict
    them, and 1 on average."""
    counts_Bf = (~is_given(given_B, frames)).float()
    return (counts_Bf / counts_Bf.mean(dim=1, keepdim=True))[:, None, :, None, None]


def weights_of_sections(begin_B: torch.Tensor, length: int, frames: int) -> torch.Tensor:
    """The weights of the frames in the loss (B, 1, f, 1, 1) where of each clip a section of this length counts: 1 on
    average, and 0 outside.

    Args:
        begin_B: the first frame of each section.
    """
    place_Bf = torch.arange(frames, device=begin_B.device) - begin_B.unsqueeze(1)
    within_Bf = (place_Bf >= 0) & (place_Bf < length)
    return (within_Bf.float() * frames / length)[:, None, :, None, None]


def row_of_token(rows: int, frame_tokens: int, device: torch.device) -> torch.Tensor | None:
    """The row of time of each token, (T,); None if there is one row for all."""
    return torch.arange(rows, device=device).repeat_interleave(frame_tokens) if rows > 1 else None


def of_tokens(rows_BR: torch.Tensor, row_T: torch.Tensor | None) -> torch.Tensor:
    """What each token has of (B, R, ...): (B, T, ...), or (B, 1, ...) if that is the same for all."""
    return rows_BR if row_T is None else rows_BR[:, row_T]
