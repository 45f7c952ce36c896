"""fal's names of AuraFlow, which are also ComfyUI's."""

from __future__ import annotations

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule

PICTURE = {"w2q": "to_q", "w2k": "to_k", "w2v": "to_v", "w2o": "to_out.0"}
TEXT = {"w1q": "add_q_proj", "w1k": "add_k_proj", "w1v": "add_v_proj", "w1o": "to_add_out"}
JOINED = {"w1q": "to_q", "w1k": "to_k", "w1v": "to_v", "w1o": "to_out.0"}
MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
DOUBLE = ("double_layers.{}", "joint_transformer_blocks.{}")
SINGLE = ("single_layers.{}", "single_transformer_blocks.{}")


def _rules(block: tuple[str, str], there: str, here: str, names: dict[str, str]) -> list[KeyRule]:
    return [KeyRule(f"{block[0]}.{there}.{a}", (f"{block[1]}.{here}.{b}",)) for a, b in names.items()]


AURAFLOW_LAYOUT = KeyLayout(
    [
        *_rules(DOUBLE, "attn", "attn", PICTURE),
        *_rules(DOUBLE, "attn", "attn", TEXT),
        *_rules(DOUBLE, "mlpX", "ff", MLP),
        *_rules(DOUBLE, "mlpC", "ff_context", MLP),
        *_rules(DOUBLE, "modX", "norm1", {"1": "linear"}),
        *_rules(DOUBLE, "modC", "norm1_context", {"1": "linear"}),
        *_rules(SINGLE, "attn", "attn", JOINED),
        *_rules(SINGLE, "mlp", "ff", MLP),
        *_rules(SINGLE, "modCX", "norm1", {"1": "linear"}),
        KeyRule("positional_encoding", ("pos_embed.pos_embed",)),
        KeyRule("init_x_linear", ("pos_embed.proj",)),
        KeyRule("register_tokens", ("register_tokens",)),
        KeyRule("cond_seq_linear", ("context_embedder",)),
        KeyRule("t_embedder.mlp.0", ("time_step_proj.linear_1",)),
        KeyRule("t_embedder.mlp.2", ("time_step_proj.linear_2",)),
        KeyRule("modF.1", ("norm_out.linear",), swap_halves=True),
        KeyRule("final_linear", ("proj_out",)),
    ]
)
