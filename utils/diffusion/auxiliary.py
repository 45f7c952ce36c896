"""Losses besides the loss of the prediction.

Shapes: T tokens, E experts, K experts that a token is sent to, or kinds of losses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Output(NamedTuple):
    """What the last layer returns if layers add losses of their own, such as a router's balance of its experts.

    Attributes:
        prediction: what goes to the loss.
        terms_K: the sums of these losses over the layers, each with its weight, in the order of `loss_terms`. They
            travel from stage to stage as a field of the stream, so that their gradients come back with the others.
    """

    prediction: torch.Tensor
    terms_K: torch.Tensor


def load_balancing(probabilities_TE: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """E * sum over experts of f_e P_e, a scalar: 1 if all experts are used equally, E if one is used alone.

    f_e is the share of the T K choices that fell on expert e, P_e the mean of its probability. Only P has a gradient:
    it lowers the probability of experts in proportion to how often they are chosen. Fedus et al. 2021 ("Switch
    Transformers"), equations 4 to 6, for several experts a token; HiDream-I1's gate, whose weight on it is 0.01.

    Args:
        probabilities_TE: the router's softmax.
        chosen_TK: indices of the experts, int64.
    """
    experts = probabilities_TE.shape[1]
    # A mean over thousands of tokens in 16 bits would have two digits.
    mean_E = probabilities_TE.mean(0, dtype=torch.promote_types(probabilities_TE.dtype, torch.float32))
    # Not bincount, for which the host waits for a GPU.
    numbers_E = torch.arange(experts, device=chosen_TK.device)
    share_E = (chosen_TK.flatten()[:, None] == numbers_E).sum(dim=0) / chosen_TK.numel()
    return experts * (share_E * mean_E).sum()
