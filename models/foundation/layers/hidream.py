"""The blocks of HiDream as layers: experts that a router chooses, and a state of Llama for each block.

Shapes: B batch, T image tokens, L text tokens, S all positions, E rotary features, K losses, D width. From the first
single block on, T also counts the text, which follows the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from models.foundation.layers.chain import capture_outputs
from utils.diffusion.auxiliary import load_balancing

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_hidream_image import MoEGate


class HiDreamStream(NamedTuple):
    """What travels from layer to layer. `llama3_BLD` are the states that later blocks project, each once;
    `last_BLD` is the projected state of the last block. `text_BLD` is None after it has joined `x_BTD`. `mask_BT` has
    ones and zeros, by which the keys of a padded picture are multiplied."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor | None
    llama3_BLD: tuple[torch.Tensor, ...]
    last_BLD: torch.Tensor
    time_BD: torch.Tensor
    mask_BT: torch.Tensor | None
    positions_1S3: torch.Tensor
    rope_1S1E22: torch.Tensor
    terms_K: torch.Tensor
    canvas_hw0: torch.Tensor


class Route(NamedTuple):
    """Which of the arriving states a block projects, and which it passes on."""

    own: int
    onward: tuple[int, ...]


def routes(layers: Sequence[int]) -> list[Route]:
    """The routes of the entry, which projects the last block's state, and of all other blocks.

    Args:
        layers: the Llama layer of each block.
    """
    arriving = [sorted(set(layers)), *(sorted(set(layers[block:-1])) for block in range(len(layers)))]
    wanted = [layers[-1], *layers[:-1]]
    return [
        Route(here.index(layer), tuple(here.index(later) for later in there))
        for layer, here, there in zip(wanted, arriving[:-1], arriving[1:], strict=True)
    ]


class Block(nn.Module):
    """The common part of both kinds of blocks: a state of Llama that only this block sees, and experts whose balance is
    a loss.

    Args:
        projection: projects the state; None for the last block, whose state the entry projects.
    """

    recomputable = True

    def __init__(self, block: nn.Module, projection: nn.Module | None, route: Route | None, balance_weight: float):
        super().__init__()
        self.block = block
        self.projection = projection
        self.route = route
        self.balance_weight = balance_weight
        # Here, since they are subclasses of diffusers'; see `checkpoints/stock.py`.
        from models.foundation.layers.grouped_experts import group_experts

        self.routers = group_experts(block)

    def forward(self, stream: HiDreamStream) -> HiDreamStream:
        if self.route is None:
            own_BLD, onward = stream.last_BLD, ()
        else:
            own_BLD = self.projection(stream.llama3_BLD[self.route.own])
            onward = tuple(stream.llama3_BLD[index] for index in self.route.onward)
        active_routers = self.routers if self.training and self.balance_weight > 0 else []
        with capture_outputs(active_routers, balance_of) as balances:
            stream = self.advance(stream, own_BLD)
        terms_K = stream.terms_K + self.balance_weight * sum(balances) if balances else stream.terms_K
        return stream._replace(llama3_BLD=onward, terms_K=terms_K)

    def advance(self, stream: HiDreamStream, own_BLD: torch.Tensor) -> HiDreamStream:
        """The stream with the block's results."""
        raise NotImplementedError


def balance_of(router: MoEGate, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The balance of a router's choice (`load_balancing`), from its input (B, T, D) and output. Its probabilities are
    computed again, since its output only has those of the chosen experts."""
    logits_TE = functional.linear(inputs[0].flatten(0, 1), router.weight)
    return load_balancing(logits_TE.softmax(dim=-1), output[0])


class DoubleBlock(Block):
    """A block in which picture and text have weights of their own."""

    def advance(self, stream: HiDreamStream, own_BLD: torch.Tensor) -> HiDreamStream:
        x_BTD, text_BLD = self.block(
            hidden_states=stream.x_BTD,
            hidden_states_masks=stream.mask_BT,
            encoder_hidden_states=torch.cat([stream.text_BLD, own_BLD], dim=1),
            temb=stream.time_BD,
            image_rotary_emb=stream.rope_1S1E22,
        )
        return stream._replace(x_BTD=x_BTD, text_BLD=text_BLD[:, : stream.text_BLD.shape[1]])


class SingleBlock(Block):
    """A block that sees picture and text as one sequence; the first such block joins them."""

    def advance(self, stream: HiDreamStream, own_BLD: torch.Tensor) -> HiDreamStream:
        x_BTD, mask_BT = stream.x_BTD, stream.mask_BT
        if stream.text_BLD is not None:
            x_BTD = torch.cat([x_BTD, stream.text_BLD], dim=1)
            if mask_BT is not None:
                texts = stream.text_BLD.shape[1] + own_BLD.shape[1]
                mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), texts)], dim=1)
        result_BTD = self.block(
            hidden_states=torch.cat([x_BTD, own_BLD], dim=1),
            hidden_states_masks=mask_BT,
            temb=stream.time_BD,
            image_rotary_emb=stream.rope_1S1E22,
        )
        return stream._replace(x_BTD=result_BTD[:, : x_BTD.shape[1]], text_BLD=None, mask_BT=mask_BT)
