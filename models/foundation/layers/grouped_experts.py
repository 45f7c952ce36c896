"""HiDream's experts, without waiting for the GPU at each.

Shapes: B batch, T tokens, D width; N all tokens of the batch, A experts chosen for each.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU, MoEGate
from torch import nn


class GroupedExperts(MOEFeedForwardSwiGLU):
    """diffusers' experts, for which the host waits once and not for every expert: the tokens are sorted by expert. On
    the meta device each expert gets the same number."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        chosen_NA, weights_NA, _ = self.gate(x_BTD)
        x_ND, chosen = x_BTD.flatten(0, 1), chosen_NA.flatten()
        order = chosen.argsort(stable=True)
        parts = x_ND[order // self.num_activated_experts].split(self._numbers(chosen))
        made = torch.cat([expert(part).to(x_ND.dtype) for expert, part in zip(self.experts, parts, strict=True)])
        made_NAD = made[order.argsort()].unflatten(0, weights_NA.shape)
        y_ND = (made_NAD * weights_NA.unsqueeze(-1)).sum(dim=1)
        return y_ND.to(x_ND.dtype).view_as(x_BTD) + self.shared_experts(x_BTD)

    def _numbers(self, chosen: torch.Tensor) -> list[int]:
        """How many tokens each expert gets."""
        count = len(self.experts)
        if chosen.is_meta:
            return [len(chosen) // count + (index < len(chosen) % count) for index in range(count)]
        # `bincount` would let the host wait, too.
        experts = torch.arange(count, device=chosen.device)
        return (chosen.unsqueeze(1) == experts).sum(dim=0).tolist()


def group_experts(block: nn.Module) -> list[MoEGate]:
    """Makes the experts of a block `GroupedExperts`, with the same parameters under the same names. Returns the block's
    routers."""
    for module in block.modules():
        if type(module) is MOEFeedForwardSwiGLU:
            module.__class__ = GroupedExperts
            # Or it would compute a loss in training that nobody asks for.
            module.gate._force_inference_output = True
    return [module for module in block.modules() if isinstance(module, MoEGate)]
