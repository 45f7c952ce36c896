"""ComfyUI's names of Anima: Cosmos-Predict2's, and those of the text conditioner, which lies in the same file."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule
from models.foundation.checkpoints.layouts.cosmos_predict2 import COSMOS_PREDICT2_LAYOUT

CONDITIONER = "text_conditioner"
ATTENTIONS = ("self_attn", "cross_attn")
PARTS_OF_A_BLOCK = (
    *(f"{one}.{part}_proj" for one in ATTENTIONS for part in "qkvo"),
    *(f"{one}.{part}_norm" for one in ATTENTIONS for part in "qk"),
    *(f"norm_{part}" for part in (*ATTENTIONS, "mlp")),
    "mlp.0",
    "mlp.2",
)
NAMES = ("embed", "in_proj", "out_proj", "norm", *(f"blocks.{{}}.{part}" for part in PARTS_OF_A_BLOCK))
ANIMA_LAYOUT = KeyLayout(
    [
        # Modules that no other model has, so that they identify a file.
        *(KeyRule(f"llm_adapter.{name}", (f"{CONDITIONER}.{name}",)) for name in NAMES),
        *(
            KeyRule(rule.there, tuple(f"transformer.{name}" for name in rule.here))
            for rule in COSMOS_PREDICT2_LAYOUT.rules
        ),
    ]
)
"""Its names here begin with the folder of the part."""
