"""Names of Chroma: those of Flux.1, and its own for the network that makes modulations."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule
from models.foundation.checkpoints.layouts.flux import BFL_LAYOUT, USO

# Parts of Flux that Chroma does not have: the modulations of each block, and their inputs.
LEFT_OUT = ("_mod.lin", "modulation.lin", "adaLN_modulation", "time_in", "vector_in", "guidance_in")
CHROMA_LAYOUT = KeyLayout(
    [
        *(rule for rule in BFL_LAYOUT.rules if not any(part in rule.there for part in LEFT_OUT)),
        *(
            KeyRule(f"distilled_guidance_layer.{part}", (f"distilled_guidance_layer.{part}",))
            for part in ("in_proj", "out_proj")
        ),
        KeyRule("distilled_guidance_layer.layers.{}.in_layer", ("distilled_guidance_layer.layers.{}.linear_1",)),
        KeyRule("distilled_guidance_layer.layers.{}.out_layer", ("distilled_guidance_layer.layers.{}.linear_2",)),
        KeyRule("distilled_guidance_layer.norms.{}", ("distilled_guidance_layer.norms.{}",), weight_there="scale"),
    ],
    further=USO,
    parts_are_known=True,
)
