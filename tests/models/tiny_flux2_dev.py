"""A whole tiny Flux.2 dev: with a guidance embedding and references, the rest as in `tiny_flux2.py` but for the text,
which Mistral 3 reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline as StockPipeline
from transformers import Mistral3Config, Mistral3Model

from tests.models import tiny_flux2, tiny_z_image
from tests.models.tiny_flux2 import TEXT_TOKENS, TEXT_WIDTH, draw, pipeline, stock_latents, whole
from tests.models.tiny_folder import randomised
from utils.diffusion.seeds import normal

__all__ = ["SAMPLING", "STOCK", "draw", "features", "pipeline", "stock_latents", "whole", "write_folder"]
STOCK = StockPipeline
"""Its index alone: `Flux2Pipeline` needs a processor of pictures for its text encoder."""
SAMPLING = tiny_flux2.SAMPLING
TEMPLATE = (
    "<s>{% for message in messages %}[{{ message.role }}]"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
TEXT = {**tiny_flux2.TEXT, "num_hidden_layers": 31, "model_type": "mistral"}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
    "model_type": "pixtral",
}


def tokenizer() -> Any:
    made = tiny_z_image.tokenizer()
    made.chat_template = TEMPLATE
    return made


def write_folder(folder: Path, **changes: Any) -> Path:
    tiny_flux2.write_folder(folder, guidance_embeds=True, **changes)
    for part in ("text_encoder", "tokenizer"):
        for file in (folder / part).iterdir():
            file.unlink()
    tokenizer().save_pretrained(folder / "tokenizer")
    config = Mistral3Config(text_config=TEXT, vision_config=VISION, image_token_index=299)
    torch.manual_seed(0)
    randomised(Mistral3Model(config), 4).save_pretrained(folder / "text_encoder")
    return folder


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features; they have all the same number of tokens."""
    return {"mistral3": normal((len(lengths), TEXT_TOKENS, 3 * TEXT_WIDTH), 0, "text", *lengths)}


def features_of_pictures(latent_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Two references, the second of another size."""
    channels, height, width = latent_shape
    return {
        "control_latents": normal((2, channels, height, width), 0, "reference"),
        "control_2_latents": normal((2, channels, 1, 3), 0, "reference 2"),
    }
