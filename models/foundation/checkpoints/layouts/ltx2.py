"""Lightricks' names of LTX-2, which are also ComfyUI's: those of LTX-Video, and more for sound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule
from models.foundation.checkpoints.layouts.ltx_video import ATTENTION, BLOCK

T = TypeVar("T")
ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
EMBEDDED = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
TIMES = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
}
"""Embeddings of the time; the last two are LTX-2.3's."""
OTHERWISE = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    f"{BLOCK}.scale_shift_table_a2v_ca_video": f"{BLOCK}.video_a2v_cross_attn_scale_shift_table",
    f"{BLOCK}.scale_shift_table_a2v_ca_audio": f"{BLOCK}.audio_a2v_cross_attn_scale_shift_table",
}
SAME = (
    *(f"{sound}caption_projection.linear_{number}" for sound in ("", "audio_") for number in (1, 2)),
    *(f"{BLOCK}.{sound}ff.net.{linear}" for sound in ("", "audio_") for linear in ("0.proj", "2")),
    *(f"{BLOCK}.{name}" for name in ("norm1", "norm2", "norm3", "audio_norm1", "audio_norm2", "audio_norm3")),
    *(f"{BLOCK}.{name}" for name in ("audio_to_video_norm", "video_to_audio_norm")),
    *(
        f"{BLOCK}.{sound}{table}"
        for sound in ("", "audio_")
        for table in ("scale_shift_table", "prompt_scale_shift_table")
    ),
    *(f"{sound}{name}" for sound in ("", "audio_") for name in ("scale_shift_table", "proj_out")),
)
CONNECTORS = {
    "video_embeddings_connector.": "video_connector.",
    "audio_embeddings_connector.": "audio_connector.",
    "text_embedding_projection.": "",
}
"""What makes texts of Gemma's states, which checkpoints have beside the denoiser, and its name in diffusers."""
OF_CONNECTORS = {
    ".transformer_1d_blocks.": ".transformer_blocks.",
    ".q_norm.": ".norm_q.",
    ".k_norm.": ".norm_k.",
    "aggregate_embed.": "text_proj_in.",
}
"""Parts of the names there and here; the last one of LTX-2.3 says before it for what."""
LTX2_LAYOUT = KeyLayout(
    [
        *(KeyRule(there, (here,)) for there, here in OTHERWISE.items()),
        *(
            KeyRule(f"{BLOCK}.{attention}.{there}", (f"{BLOCK}.{attention}.{here}",))
            for attention in ATTENTIONS
            for there, here in {**ATTENTION, "to_gate_logits": "to_gate_logits"}.items()
        ),
        *(KeyRule(f"{there}.{name}", (f"{here}.{name}",)) for there, here in TIMES.items() for name in EMBEDDED),
        *(KeyRule(name, (name,)) for name in SAME),
    ],
    unused=tuple(CONNECTORS),
)


def connectors_of(tensors: Mapping[str, T]) -> dict[str, T]:
    """The connectors' tensors in a checkpoint, under diffusers' names; none if it has none."""
    found = {}
    for name, tensor in tensors.items():
        start = next((start for start in CONNECTORS if start in name), None)
        if start is None:
            continue
        own = CONNECTORS[start] + name.partition(start)[2]
        for there, here in OF_CONNECTORS.items():
            own = own.replace(there, here)
        found[own] = tensor
    return found
