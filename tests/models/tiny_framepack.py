"""A whole tiny FramePack in diffusers' layout, with random weights: the tiny HunyuanVideo, and a SigLIP. Its sections
are of two latent frames."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import HunyuanVideoFramepackPipeline as StockPipeline
from diffusers import HunyuanVideoFramepackTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from transformers import LlamaConfig, LlamaModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from models.framepack import FramepackOptions, FramepackPipeline
from tests.models import tiny_hunyuan_video
from tests.models.tiny_folder import certain_of, randomised, write_index
from tests.models.tiny_hunyuan_video import TEXT_TOKENS, features, prompt_features, stock_latents  # noqa: F401
from tests.models.tiny_hunyuan_video_i2v import PICTURE
from utils.diffusion.seeds import normal
from utils.media.decode import load_image
from utils.media.geometry import View
from utils.media.writing import tensor_to_image, write_clip
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
WINDOW = 2
SIZES = [(48, 32, 17), (32, 64, 9)]
"""Clips of two sections and of one."""
SAMPLING = {
    "width": 48,
    "height": 32,
    "frames": 17,
    "steps": 2,
    "guidance": 6.0,
    "control_images": [str(PICTURE)],
}
"""Two steps of each of two sections."""
SIDE, PICTURE_TOKENS, PICTURE_WIDTH = 16, 9, 8
CUT = {"partition_method": "uniform"}
"""The entry has so many parameters here that a stage would have nothing else."""
SEEN = {"inverted_anti_drifting": [1, 2, 16], "vanilla": [16, 2, 1]}
"""How many latent frames the stock pipeline shows of each kind, in the order in which it has them."""
VISION = {
    "hidden_size": PICTURE_WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 5,
}
TRANSFORMER = {
    **tiny_hunyuan_video.TRANSFORMER,
    "has_image_proj": True,
    "has_clean_x_embedder": True,
    "image_proj_dim": PICTURE_WIDTH,
}


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    parts = tiny_hunyuan_video.write_parts(folder)
    transformer = HunyuanVideoFramepackTransformer3DModel(**{**TRANSFORMER, **changes})
    randomised(transformer, 1).save_pretrained(folder / "transformer")
    tiny_hunyuan_video.tokenizer().save_pretrained(folder / "tokenizer")
    randomised(LlamaModel(LlamaConfig(**tiny_hunyuan_video.LLAMA)), 3).save_pretrained(folder / "text_encoder")
    randomised(SiglipVisionModel(SiglipVisionConfig(**VISION)), 5).save_pretrained(folder / "image_encoder")
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "feature_extractor")
    own = {
        "transformer": HunyuanVideoFramepackTransformer3DModel,
        "text_encoder": LlamaModel,
        "image_encoder": SiglipVisionModel,
        "feature_extractor": SiglipImageProcessorPil,
    }
    write_index(folder, STOCK, {**parts, **own})
    return folder


def pipeline(folder: Path, **options: Any) -> FramepackPipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, "latent_window_size": WINDOW, **options}
    return FramepackPipeline(FramepackOptions(type="framepack", diffusers_path=folder, **options), seed=0)


def dataset_of(pictures: Path) -> dict[str, Any]:
    """Clips of one section, of the pictures' colours."""
    folder = pictures.with_name("clips")
    folder.mkdir()
    for file in pictures.glob("*.png"):
        still_CFHW = load_image(file, View(32, 32))
        write_clip(still_CFHW.expand(-1, 9, -1, -1), 30, folder / f"{file.stem}.mp4")
        (folder / f"{file.stem}.txt").write_text(file.with_suffix(".txt").read_text())
    return {"directory": [{"path": str(folder)}], "frame_buckets": [9]}


def features_of_pictures(latent_shape: tuple[int, ...], batch: int = 2) -> dict[str, torch.Tensor]:
    """Random features of the first frames of a batch."""
    channels, _, *size = latent_shape
    return {
        "first_frame_latents": normal((batch, channels, 1, *size), 0, "first frame"),
        "siglip_vision": normal((batch, PICTURE_TOKENS, PICTURE_WIDTH), 0, "picture"),
    }


def section_of(
    sampling_type: str, clip: torch.Tensor, first: torch.Tensor, number: int, count: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A section of clips (B, C, f, h, w), and what the stock pipeline's module is given with it, computed as there.

    Args:
        number: of the section, from the start of the clip.
        count: of all sections.
    """
    sizes, begin = SEEN[sampling_type], 1 + number * WINDOW
    clip = torch.cat([first, clip[:, :, 1:]], dim=2)
    nothing = torch.zeros(*clip.shape[:2], sum(sizes), *clip.shape[3:])
    if sampling_type == "vanilla":
        places = torch.arange(1 + sum(sizes) + WINDOW).split([1, *sizes, WINDOW])
        prefix, far, middle, near, own = places
        history = torch.cat([nothing, clip[:, :, :begin]], dim=2)[:, :, -sum(sizes) :]
        seen_far, seen_middle, seen_near = history.split(sizes, dim=2)
    else:
        paddings = list(reversed(range(count)))
        if count > 4:
            paddings = [3] + [2] * (count - 3) + [1, 0]
        padding = paddings[count - 1 - number] * WINDOW
        places = torch.arange(1 + padding + WINDOW + sum(sizes)).split([1, padding, WINDOW, *sizes])
        prefix, _, own, near, middle, far = places
        history = torch.cat([clip[:, :, begin + WINDOW :], nothing], dim=2)[:, :, : sum(sizes)]
        seen_near, seen_middle, seen_far = history.split(sizes, dim=2)
    return clip[:, :, begin : begin + WINDOW], {
        "indices_latents": own,
        "latents_clean": torch.cat([first, seen_near], dim=2),
        "indices_latents_clean": torch.cat([prefix, near]),
        "latents_history_2x": seen_middle,
        "indices_latents_history_2x": middle,
        "latents_history_4x": seen_far,
        "indices_latents_history_4x": far,
    }


def whole(
    denoiser: HunyuanVideoFramepackTransformer3DModel,
    pipeline: FramepackPipeline,
    features: dict,  # noqa: F811
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    """With what a sample's first section sees, or that in `features`, among `latents`."""
    for block in (*denoiser.transformer_blocks, *denoiser.single_transformer_blocks):
        block.attn.set_processor(HunyuanVideoAttnProcessor2_0())
    sampling_type = pipeline.options.sampling_type
    count = (x_t.shape[2] - 1) // WINDOW
    if "section" in features:
        (begin,) = set(features["section"].tolist())
    else:
        begin = 1 if sampling_type == "vanilla" else 1 + (count - 1) * WINDOW
    clean, first = features.get("latents", x_t), features["first_frame_latents"]
    _, seen = section_of(sampling_type, clean, first, (begin - 1) // WINDOW, count)
    made = denoiser(
        hidden_states=x_t[:, :, begin : begin + WINDOW],
        timestep=t_B * 1000,
        encoder_hidden_states=features["llama"],
        encoder_attention_mask=features["llama_mask"],
        pooled_projections=features["clip_pooled"],
        image_embeds=features["siglip_vision"],
        guidance=torch.full((len(x_t),), 1000.0),
        **seen,
        return_dict=False,
    )[0]
    before, behind = (
        made.new_zeros(*made.shape[:2], n, *made.shape[3:]) for n in (begin, x_t.shape[2] - begin - WINDOW)
    )
    return torch.cat([before, made, behind], dim=2)


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor, **keys: Any) -> torch.Tensor:
    """From this noise, the part of each section for itself, and from the mode of what the VAE makes of the picture, of
    which the stock pipeline draws."""
    sections = sections_of(noise, keys.get("sampling_type"))

    def of_levels(picture: torch.Tensor, **where: Any) -> torch.Tensor:
        """What SigLIP sees of whole levels, as the publisher gives them: of fractions, its processor without
        torchvision takes the next lower ones."""
        levels = ((picture + 1) * 127.5).round().to(torch.uint8)
        return stock.image_encoder(**stock.feature_extractor(images=levels, return_tensors="pt")).last_hidden_state

    asked = {
        "image": tensor_to_image(load_image(PICTURE, View(sampling.width, sampling.height, "center"))),
        "prompt": sampling.prompts[0],
        "width": sampling.width,
        "height": sampling.height,
        # It counts its sections by frames of which they would have fewer if each had a first one.
        "num_frames": (sampling.frames - 1) // (4 * WINDOW) * (4 * (WINDOW - 1) + 1),
        "latent_window_size": WINDOW,
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "max_sequence_length": TEXT_TOKENS,
        "output_type": "latent",
    }
    with (
        patch.object(stock.vae, "encode", certain_of(stock.vae)),
        patch.object(stock, "encode_image", of_levels),
        patch.object(stock, "prepare_latents", lambda *sizes, **further: next(sections)),
    ):
        # The latents after each section.
        return stock(**asked, **keys).frames[-1]


def sections_of(clip: torch.Tensor, sampling_type: str | None) -> Iterator[torch.Tensor]:
    """The sections of a clip's latents in the order in which they are made."""
    sections = clip[:, :, 1:].split(WINDOW, dim=2)
    return iter(sections if sampling_type == "vanilla" else sections[::-1])
