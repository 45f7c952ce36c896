"""`docs/optimizers.md`: every `[optimizer] type`, from what the kinds state and from a step of each."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import nn

SHAPE = (4096, 4096)
"""Of the matrix whose state is counted."""
LR = 1e-4
HEAD = """# Optimizers

This page is generated from `optimizers/`. `[optimizer] type` is one of these names, with or without capitals, hyphens
and underlines; or the path of any class of a `torch.optim.Optimizer`, as in `type = "torch.optim.Adamax"`; or a name
that [pytorch-optimizer](https://pytorch-optimizers.readthedocs.io) knows, as in `type = "Adan"`. The arguments that
such a class names are its keys, and others are refused. It is tried on a small parameter before anything is loaded.
What it keeps for each parameter and in its groups is in checkpoints; what it keeps in other places is not known.

*Bytes* are those of state for a weight of a 4096 x 4096 matrix, whose own 4 or 2 and whose gradient come on top.
*16 bits* says what becomes of steps that a 16-bit weight has no digits for: a *master* is a float32 copy that is
stepped (its bytes are among those counted); *Kahan* is a second 16-bit number with what is lost; *chance* rounds up or
down by chance; *lost* means that small steps are lost, so that such an optimizer is for adapters in float32; a run that
trains weights of 16 bits with it is told so. *Schedule* is which `lr_scheduler` it takes. Those that do not run on the
CPU are not for `offload_optimizer`.
"""
FURTHER = """
## What is saved, and where it is the same

Every optimizer's state is in checkpoints by the names of parameters, and so goes on at another number of stages and
data ranks; the tests compare the next step to the bit. What all parameters share (a count of steps, the distance that
Prodigy and D-Adaptation have found, the weights of an average) is saved with each of them.

"prodigy", the "dadapt" family and "prodigy_plus_schedule_free" find one learning rate by sums over all parameters. The
stages, and the data ranks where `zero_stage` divides them, add their parts up in every step, so that all have the same
one. All parameters share it: a model's own rates for its parts (`unet_lr`) are refused.

Those with "schedule_free" in their names train other weights than those that are to be used, which are an average of
what was trained. Evaluation, samples, exports, `--export` and moving averages have that average; checkpoints hold what
training goes on from.

Of the same samples, sums in another order (`activation_checkpointing` of a full fine-tune, another number of data
ranks) make gradients that differ in their last digits. Steps then differ as little, with two exceptions. "soap" takes
its directions from the gradients so far, and "genericoptim" with a "subspace" by "svd" from the last one. Where these
have fewer directions than are asked for, as in the first steps, with few samples, and in the weights of the time's
embedding, the rest are chosen by rounding alone, and later gradients go there too: losses of two such runs differ by
some thousandths soon, and neither is nearer to the truth. The same run on the same machine is the same to the bit.

`beta2_half_life` of "adamw", "adamw8bitkahan" and "genericoptim" says in samples how long squares of gradients count.

## Weights of 16 bits

`rounding` of "adamw" says what keeps the steps for which a bfloat16 weight has no digits. After 1,000 steps of 1e-5 on
weights of about 1, the movement of the same steps in float32 is missing by this share in the mean, and each weight is
off by this share of its movement:

| `rounding` | bytes beside the moments | missing | off |
|---|---|---|---|
| `"master"` | 4 | 0.0 % | 0.0 % |
| `"kahan"` | 2 | 3.2 % | 15 % |
| `"stochastic"` | 0 | 0.3 % | 75 % |
| `"nearest"` | 0 | 99.8 % | 100 % |

Steps that are larger beside their weights miss less. An adapter in float32, the default, needs none of this.

## The quickstart with other optimizers

Loss of the quickstart's held-out stars, after so many of its 800 steps of 16 pictures, at one stage, without weight
decay. Before the first step it is 2.855. One run each, with learning rates that were not searched for, but for AdamW's.

| `[optimizer]` | `lr_scheduler` | 200 | 400 | 600 | 800 |
|---|---|---|---|---|---|
| `type = "adamw"`, `lr = 1e-3` | cosine | 0.483 | 0.382 | 0.361 | 0.356 |
| `type = "prodigy"`, `lr = 1` | cosine | 0.396 | 0.350 | 0.334 | 0.334 |
| `type = "adamw_schedule_free"`, `lr = 3e-3` | constant | 0.420 | 0.342 | 0.331 | 0.311 |
| `type = "muon"`, `lr = 1e-3` | cosine | 0.550 | 0.395 | 0.368 | 0.361 |
| `type = "automagic"`, `lr = 1e-4`, `lr_bump = 1e-5`, `max_lr = 0.01` | constant | 0.574 | 0.459 | 0.423 | 0.401 |
"""


@cache
def optimizers_page() -> str:
    import optimizers

    heads = ["type", "bytes, float32", "bytes, bfloat16", "16 bits", "CPU", "schedule", "of"]
    kinds = optimizers.available().values()
    rows = [f"| {' | '.join(_row(kind))} |" for kind in kinds]
    says = [f"- `{kind.type}`: {_said(kind)}" for kind in kinds]
    table = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *rows]
    return "\n".join([HEAD, *table, "", "## What they are", "", *says, FURTHER])


def _row(kind: Any) -> list[str]:
    settings = kind.settings(type=kind.type, lr=LR)
    kept = [
        kind.state_bytes(settings, nn.Parameter(torch.empty(SHAPE, dtype=dtype, device="meta"))) / (SHAPE[0] * SHAPE[1])
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return [
        f"`{kind.type}`",
        *(f"{bytes_:.2f}".rstrip("0").rstrip(".") for bytes_ in kept),
        _in_16_bits(kind, settings),
        "" if "cpu" in kind.not_on else "yes",
        "constant" if kind.constant_rate else "any",
        kind.library,
    ]


def _in_16_bits(kind: Any, settings: Any) -> str:
    """What a step of a parameter in bfloat16 keeps of it."""
    import optimizers

    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = optimizers.made([{"params": [parameter]}], settings)
    parameter.grad = torch.ones_like(parameter)
    with warnings.catch_warnings():
        # Those in pages have none on a CPU.
        warnings.simplefilter("ignore")
        optimizer.step()
    keys = optimizer.state[parameter].keys()
    for key, word in {"master": "master", "kahan_comp": "Kahan", "compensation": "Kahan"}.items():
        if key in keys:
            return word
    return "lost" if kind.loses_small_steps(settings) else "chance"


def _said(kind: Any) -> str:
    return " ".join((kind.settings.__doc__ or "").split("`: ", 1)[-1].split())
