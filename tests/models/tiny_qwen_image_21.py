"""A whole tiny Qwen-Image 2.1 in diffusers' layout, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage21, FlowMatchEulerDiscreteScheduler, QwenImage21Transformer2DModel
from diffusers import QwenImage21Pipeline as Stock21Pipeline
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21AttnProcessor
from einops import rearrange
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from models.qwen_image_21 import QwenImage21Options, QwenImage21Pipeline
from tests.models import tiny_cosmos_predict25, tiny_qwen_image
from tests.models.tiny_folder import ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings


class Processor(Qwen3VLProcessor):
    """The stock processor without its part for clips, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        """There is none."""


def made_processor() -> Processor:
    images = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=1024, max_pixels=2**20)
    return Processor(images, tokenizer(), None, chat_template=tiny_cosmos_predict25.CHAT_TEMPLATE)


class StockPipeline(Stock21Pipeline):
    """With the processor for text and pictures."""

    _optional_components = ["processor"]

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        transformer: Any,
        processor: Any = None,
        sample_sigmas: list[float] | None = None,
    ):
        super().__init__(scheduler, vae, text_encoder, made_processor(), transformer, sample_sigmas)


STOCK = StockPipeline
SIZES = [(32, 64, 1), (64, 32, 1)]
PIXELS = (4, 1)
CUT = {"partition_method": "uniform"}
"""What embeds the time has a fixed width, at which it takes more parameters than a tiny block."""
ROUNDED_OTHERWISE = True
"""The samples are given one after the other, see `whole`."""
SAMPLING = {"width": 96, "height": 64, "guidance": 3.0, "negative_prompt": "blurred"}
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 160, 16, 4
"""With a byte a token, the template takes 132; of the captions of the generic tests one is longer than the rest."""
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "context_in_dim": TEXT_WIDTH,
    "mlp_ratio": 2,
    "axes_dims_rope": (4, 6, 6),
}
VAE = {
    "base_dim": 4,
    "decoder_base_dim": 6,
    "z_dim": CHANNELS,
    "dim_mult": [1, 1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.7, 1.0, 2.0],
}
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.6,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "time_shift_type": "exponential",
}


def tokenizer() -> Qwen2Tokenizer:
    """That of the tiny Qwen-Image, with the model's chat template."""
    made = tiny_qwen_image.tokenizer()
    made.chat_template = tiny_cosmos_predict25.CHAT_TEMPLATE
    return made


def text_encoder(layers: int = 2) -> Qwen3VLForConditionalGeneration:
    number = tokenizer().convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    return randomised(Qwen3VLForConditionalGeneration(config), 3)


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    torch.manual_seed(0)
    tokenizer().save_pretrained(folder / "processor")
    made_processor().image_processor.save_pretrained(folder / "processor")
    randomised(QwenImage21Transformer2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    randomised(AutoencoderKLQwenImage21(**VAE), 2).save_pretrained(folder / "vae")
    text_encoder().save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "text_encoder": Qwen3VLForConditionalGeneration,
        "transformer": QwenImage21Transformer2DModel,
        "vae": AutoencoderKLQwenImage21,
    }
    write_index(folder, Stock21Pipeline, parts)
    return folder


def pipeline(folder: Path, **options: Any) -> QwenImage21Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return QwenImage21Pipeline(QwenImage21Options(type="qwen_image_21", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("qwen3_vl", lengths, TEXT_WIDTH)


def packed(x_BC1hw: torch.Tensor) -> torch.Tensor:
    return rearrange(x_BC1hw, "b c 1 h w -> b (h w) c")


def whole(
    denoiser: QwenImage21Transformer2DModel,
    pipeline: QwenImage21Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    """With the stock attention, one sample after the other: in a batch it moves a picture behind the longest text.
    Control images stand where the text encoder has a token for every four of theirs."""
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(QwenImage21AttnProcessor())
    controls = [latents for name, latents in features.items() if name.startswith("control")]
    shapes = [(1, *picture.shape[3:]) for picture in (*controls, x_t)]
    height, width = x_t.shape[3:]
    made = []
    for number, mask_L in enumerate(features["qwen3_vl_mask"]):
        one = slice(number, number + 1)
        own_LD, rows, slots, read = features["qwen3_vl"][number, : mask_L.sum()], [], [], 0
        for place, control in zip(
            features["qwen3_vl_places"][number].tolist() if controls else [], controls, strict=True
        ):
            count = control.shape[3] * control.shape[4] // 4
            rows += [own_LD[read:place], torch.ones(count, TEXT_WIDTH)]
            slots += [torch.zeros(place - read), torch.ones(count)]
            read = place
        slots += [torch.zeros(len(own_LD) - read), torch.ones(height * width // 4)]
        (output_BSC,) = denoiser(
            hidden_states=torch.cat([packed(picture[one]) for picture in (*controls, x_t)], dim=1),
            encoder_hidden_states=torch.cat([*rows, own_LD[read:]])[None],
            timestep=t_B[one],
            img_shapes=[shapes],
            img_mask=torch.cat(slots).bool()[None],
            return_dict=False,
        )
        made.append(rearrange(output_BSC[:, -height * width :], "b (h w) c -> b c 1 h w", h=height))
    return torch.cat(made)


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    made = []
    for caption in captions:
        # It reads all of a caption.
        template = stock.prompt_template_t2i.format("")
        caption = caption[: TEXT_TOKENS - len(stock.processor(text=[template]).input_ids[0])]
        (text_LD,), _, _ = stock.encode_prompt([caption], device="cpu")
        made.append({"qwen3_vl": text_LD, "qwen3_vl_mask": torch.ones(len(text_LD), dtype=torch.bool)})
    return made


def stock_latents(stock: StockPipeline, pixels_B41HW: torch.Tensor) -> torch.Tensor:
    return stock._encode_vae_image(pixels_B41HW, None)


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor, **keys: Any) -> torch.Tensor:
    asked = {
        "prompt": sampling.prompts[0],
        "negative_prompt": sampling.negative_prompt,
        "width": sampling.width,
        "height": sampling.height,
        "num_inference_steps": sampling.steps,
        "true_cfg_scale": sampling.guidance,
        "latents": packed(noise),
        "output_type": "latent",
        **keys,
    }
    return stock._unpack_latents(stock(**asked).images, sampling.height, sampling.width, 16)
