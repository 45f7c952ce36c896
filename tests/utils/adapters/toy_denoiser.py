"""A denoiser of three blocks, to be adapted."""

from __future__ import annotations

import torch
from torch import nn

from utils.adapters import attach
from utils.settings.schema import AdapterSettings

BLOCKS = ("first_blocks", "blocks")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.to_q, self.to_k, self.out = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        normed_BD = self.norm(x_BD)
        return x_BD + self.out(self.to_q(normed_BD) * self.to_k(normed_BD))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.first_blocks = nn.ModuleList([Block()])
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        x_BD = self.embed(x_BD)
        for block in [*self.first_blocks, *self.blocks]:
            x_BD = block(x_BD)
        return x_BD


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser()


def initialised(settings: AdapterSettings, seed: int = 0) -> Denoiser:
    adapted = denoiser()
    attach.attach(adapted, BLOCKS, settings)
    attach.initialise(adapted, [adapted], settings, seed)
    return adapted


def factors(adapted: nn.Module) -> dict[str, torch.Tensor]:
    """An adapter's parameters, under the names that they have in files."""
    return {attach.base_name(name): p for name, p in adapted.named_parameters() if attach.is_factor(name)}
