"""A whole tiny OmniGen2 in its publisher's layout, with random weights; the VAE is the miniature Flux's.

diffusers has neither its denoiser nor its pipeline. Our own denoiser in one piece is what the layers are compared with;
tests/models/foundation/denoisers/test_omnigen2.py compares it with numbers of the publisher's. The pipeline here is
written from the published sampling: text, steps and guidance, in its own words and without our functions for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from models.foundation.denoisers.omnigen2 import OmniGen2Transformer2DModel
from models.omnigen2 import OmniGen2Options, OmniGen2Pipeline
from tests.models import tiny_flux, tiny_qwen_image
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import ragged, randomised, write_index
from utils.settings.run_tables import SamplingSettings

SAMPLING = {"width": 96, "height": 64, "guidance": 3.0, "negative_prompt": "blurred"}
# Every byte is one; the template has some 110 of them.
TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 160, tiny_qwen_image.TEXT_WIDTH, 4
TRANSFORMER = {
    "in_channels": CHANNELS,
    "hidden_size": 48,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 40,
    "axes_dim_rope": [4, 2, 6],
    "axes_lens": [300, 64, 64],
    "text_feat_dim": TEXT_WIDTH,
}
SYSTEM = "You are a helpful assistant that generates high-quality images based on user instructions."
KEPT_SIDE = 40
"""Latent cells along the side of a picture for which the steps are even."""
References = Sequence[torch.Tensor]


class StockPipeline(NamedTuple):
    """The published pipeline for one picture."""

    transformer: OmniGen2Transformer2DModel
    vae: AutoencoderKL
    mllm: Qwen2_5_VLForConditionalGeneration
    tokenizer: Qwen2Tokenizer

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        return cls(
            OmniGen2Transformer2DModel.from_pretrained(folder / "transformer").eval(),
            AutoencoderKL.from_pretrained(folder / "vae").eval(),
            Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "mllm").eval(),
            Qwen2Tokenizer.from_pretrained(folder / "processor"),
        )

    def set_progress_bar_config(self, disable: bool) -> None:
        """It shows none."""

    def text(self, caption: str) -> torch.Tensor:
        """(L, D) of a prompt, or of a negative one."""
        said = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{caption}<|im_end|>\n"
        tokens = self.tokenizer(said, max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
        return self.mllm(**tokens, output_hidden_states=True).hidden_states[-1][0]

    @torch.no_grad()
    def draw(
        self, sampling: SamplingSettings, noise: torch.Tensor, references: References, image_guidance: float
    ) -> Any:
        """Euler's steps from t = 0, which is noise, to 1."""
        stretch = math.sqrt(noise.shape[2] * noise.shape[3]) / KEPT_SIDE
        even = [step / sampling.steps for step in range(sampling.steps)]
        times = [t / (stretch - stretch * t + t) for t in even] + [1.0]
        prompt, negative = self.text(sampling.prompts[0]), self.text(sampling.negative_prompt)
        x, g, q = noise, sampling.guidance, image_guidance if references else 1.0
        for t, later in zip(times, times[1:], strict=False):
            full = self._predicted(x, t, prompt, references)
            none = self._predicted(x, t, negative, ())
            v = none + g * (full - none)
            if q > 1:
                ref = self._predicted(x, t, negative, references)
                v = none + q * (ref - none) + g * (full - ref)
            x = x + (later - t) * v
        return x

    def _predicted(self, x: torch.Tensor, t: float, text_LD: torch.Tensor, references: References) -> torch.Tensor:
        mask_BL = torch.ones(1, len(text_LD), dtype=torch.bool)
        return self.transformer(x, torch.tensor([t]), text_LD[None], mask_BL, [list(references)])


STOCK = StockPipeline


class Named:
    """What the published index calls the pipeline."""

    __name__ = "OmniGen2Pipeline"


def write_folder(folder: Path, *, scheduler: str = "{}", **changes: Any) -> Path:
    """`changes` are the transformer's; `scheduler` is its configuration."""
    torch.manual_seed(0)
    (folder / "vae").symlink_to(MINI_FLUX / "vae")
    tiny_qwen_image.tokenizer().save_pretrained(folder / "processor")
    denoiser = randomised(OmniGen2Transformer2DModel(**{**TRANSFORMER, **changes}), 1)
    denoiser.save_pretrained(folder / "transformer")
    tiny_qwen_image.text_encoder().save_pretrained(folder / "mllm")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(scheduler)
    parts = {
        "mllm": Qwen2_5_VLForConditionalGeneration,
        "processor": Qwen2Tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler,
        "transformer": OmniGen2Transformer2DModel,
        "vae": AutoencoderKL,
    }
    write_index(folder, Named(), parts)
    return folder


def pipeline(folder: Path, **options: Any) -> OmniGen2Pipeline:
    options = {"dtype": "float32", "max_sequence_length": TEXT_TOKENS, **options}
    return OmniGen2Pipeline(OmniGen2Options(type="omnigen2", diffusers_path=folder, **options), seed=0)


def dataset_of(pictures: Path) -> dict[str, Any]:
    """Each picture is its own reference."""
    return {"directory": [{"path": str(pictures), "control_path": str(pictures)}]}


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random text features of these many tokens each."""
    return ragged("qwen2_5_vl", lengths, TEXT_WIDTH)


def whole(
    denoiser: OmniGen2Transformer2DModel,
    pipeline: OmniGen2Pipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
) -> torch.Tensor:
    given = [features[name] for name in ("control_latents", "control_2_latents") if name in features]
    references = [[one[sample] for one in given] for sample in range(len(x_t))]
    return denoiser(x_t, 1 - t_B, features["qwen2_5_vl"], features["qwen2_5_vl_mask"], references)


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    texts = [stock.text(caption) for caption in captions]
    return [{"qwen2_5_vl": text, "qwen2_5_vl_mask": torch.ones(len(text), dtype=torch.bool)} for text in texts]


stock_latents = tiny_flux.stock_latents


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    return stock.draw(sampling, noise, (), 1.0)
