"""A whole tiny HunyuanVideo of picture to video in diffusers' layout, with a first frame in place of the noisy one;
`tiny_hunyuan_video_i2v_33` has it as further channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanVideoImageToVideoPipeline as StockPipeline
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as stock_module
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from models.hunyuan_video import HunyuanVideoPipeline
from tests.models import tiny_hunyuan_video
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, randomised, write_index
from utils.diffusion.seeds import normal
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.media.writing import tensor_to_image
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SIZES = [(48, 32, 9), (32, 64, 5)]
PICTURE = MINI_FLUX.parents[1] / "docs" / "quickstart.png"
SAMPLING = {**tiny_hunyuan_video.SAMPLING, "control_images": [str(PICTURE)]}
SIDE, TOKENS_A_SIDE, BEGIN = 16, 4, 5
TEMPLATE = {
    **stock_module.DEFAULT_PROMPT_TEMPLATE,
    "image_emb_start": BEGIN,
    "image_emb_end": BEGIN + TOKENS_A_SIDE**2,
    "image_emb_len": TOKENS_A_SIDE**2,
}
"""The stock pipeline's, for a picture of fewer tokens."""
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": SIDE // TOKENS_A_SIDE,
}


def write_folder(folder: Path, condition: str = "token_replace", **changes: Any) -> Path:
    """`changes` are the transformer's."""
    parts = tiny_hunyuan_video.write_parts(folder, image_condition_type=condition, **changes)
    tokenizer = tiny_hunyuan_video.tokenizer(TEMPLATE["template"], ("<image>",))
    tokenizer.save_pretrained(folder / "tokenizer")
    pad, image = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<image>")
    text = {**tiny_hunyuan_video.LLAMA, "model_type": "llama", "pad_token_id": pad}
    config = LlavaConfig(text_config=text, vision_config=VISION, image_token_index=image, pad_token_id=pad)
    randomised(LlavaForConditionalGeneration(config), 3).save_pretrained(folder / "text_encoder")
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessorPil(**sizes).save_pretrained(folder / "image_processor")
    read = {"text_encoder": LlavaForConditionalGeneration, "image_processor": CLIPImageProcessorPil}
    write_index(folder, STOCK, {**read, **parts})
    return folder


pipeline = tiny_hunyuan_video.pipeline
features = tiny_hunyuan_video.features


def features_of_pictures(latent_shape: tuple[int, ...], batch: int = 2) -> dict[str, torch.Tensor]:
    """Random features of the first frames of a batch."""
    channels, _, *size = latent_shape
    return {"first_frame_latents": normal((batch, channels, 1, *size), 0, "first frame")}


def whole(
    denoiser: HunyuanVideoTransformer3DModel,
    pipeline: HunyuanVideoPipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    first = features["first_frame_latents"]
    if denoiser.config.image_condition_type == "token_replace":
        seen = torch.cat([first, x_t[:, :, 1:]], dim=2)
    else:
        picture, mask = torch.zeros_like(x_t), torch.zeros_like(x_t[:, :1])
        picture[:, :, :1], mask[:, :, 0] = first, 1
        seen = torch.cat([x_t, picture, mask], dim=1)
    return tiny_hunyuan_video.whole(denoiser, pipeline, features, seen, t_B)


stock_latents = tiny_hunyuan_video.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    last = []

    def keep(pipeline: Any, step: int, timestep: Any, values: dict) -> dict:
        last[:] = [values["latents"]]
        return {}

    picture = tensor_to_image(load_image(PICTURE, View(sampling.width, sampling.height, "center")))
    keys = {"image": picture, "num_frames": sampling.frames, "max_sequence_length": tiny_hunyuan_video.TEXT_TOKENS}
    drawn(stock, sampling, noise, **keys, prompt_template=TEMPLATE, callback_on_step_end=keep)
    # Before it cuts off the first frame of models with further channels.
    return last[0]
