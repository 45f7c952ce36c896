"""What the tiny folders of all models share: random weights, and the index that a stock pipeline is loaded by.

A model's folder is made by `tiny_<type>.py`, whose names the generic tests in tests/test_models.py call. A variant of a
type, which has another denoiser or is fed otherwise, has a `tiny_<variant>.py` too, and `VARIANTS` names the tests that
show something of it. The names are:

- STOCK: the stock pipeline class;
- write_folder(place) -> place: a whole diffusers folder, the same each time;
- pipeline(folder, **options): ours, in float32 with seed 0;
- features(lengths): random features of a batch whose texts have these many tokens;
- whole(denoiser, pipeline, features, x_t, t_B): what the stock module gives, called as the stock pipeline calls it, as
  a latent;
- prompt_features(stock, captions): for each caption the features that the stock pipeline computes, at true length;
- stock_latents(stock, pixels_BCFHW): the mode of its VAE's latents, normalised as it does;
- SAMPLING, draw(stock, sampling, noise): the latents that it draws for the first prompt;
- optional: SIZES of (width, height, frames) that are tried; features_of_pictures(latent_shape): random features of a
  batch that do not come from text; PIXELS, channels and number of the pictures that a latent is made of, which are
  decoded side by side; SUMMED_OTHERWISE, beginnings of the names of parameters whose gradients are summed in another
  order than in the stock module, and why; ROUNDED_OTHERWISE, that the stock module multiplies other numbers of rows by
  the same weights, which on some processors changes the last bits, and why; CUT, keys of a run by which each stage gets
  a block; dataset_of(pictures): keys of the dataset that it is trained on, of a folder
  of pictures.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import nn

from models.base import BasePipeline
from optimizers.adamw import AdamWSettings
from utils.dataset.batches import pad_ragged
from utils.dataset.encoders import Encoder, text_of
from utils.dataset.samples import Bucket, version_of_prompt
from utils.diffusion.seeds import normal
from utils.settings.dataset_schema import DirectorySettings
from utils.settings.run_tables import SamplingSettings
from utils.settings.schema import AdapterSettings, Settings

UNKNOWN_TO_COMFYUI = ("cogview4", "ernie_image", "framepack")
"""Types that ComfyUI has no model of, so that nothing is exported by its names."""
MASKED = (
    "anima",
    "chroma",
    "ernie_image",
    "framepack",
    "hunyuan_image",
    "hunyuan_video",
    "hunyuan_video_15",
    "ideogram4",
    "krea2",
    "ltx_video",
    "lumina2",
    "mochi",
    "omnigen2",
    "pixart",
    "qwen_image",
    "sana",
)
"""Types that mask the padding of the shorter of the generic tests' captions in attention. Z-Image fills
captions of their lengths to the same; the others mask nothing."""
OF_ANY_DENOISER = (
    "test_layers_equal_the_whole_module",
    "test_layers_hold_every_parameter_once",
    "test_stages_and_recomputing_change_nothing",
)
OF_OTHER_INPUTS = (
    *OF_ANY_DENOISER,
    "test_samples_are_those_of_the_stock_pipeline",
    "test_an_adapter_is_loaded_by_the_stock_pipeline_and_gone_on_from",
    "test_all_weights_are_read_from_what_was_exported",
)
VARIANTS = {
    # Its samples are in tests/models/test_cogvideox.py.
    "cogvideox_15_i2v": (OF_OTHER_INPUTS[0],),
    "cosmos_v2w": OF_OTHER_INPUTS[:-1],
    # Its layers equal the whole module within rounding alone, which tests/models/test_cosmos_predict2.py shows.
    "cosmos_predict2_v2w": OF_OTHER_INPUTS[1:],
    "flux2_dev": OF_ANY_DENOISER,
    "hunyuan_video_15_i2v": OF_OTHER_INPUTS[:-1],
    "hunyuan_video_i2v": OF_OTHER_INPUTS[:-1],
    "hunyuan_video_i2v_33": (OF_OTHER_INPUTS[0], "test_samples_are_those_of_the_stock_pipeline"),
    # Its samples are in tests/models/test_kandinsky5.py.
    "kandinsky5_i2v": (OF_OTHER_INPUTS[0],),
    "kandinsky5_t2i": (
        OF_OTHER_INPUTS[0],
        "test_samples_are_those_of_the_stock_pipeline",
        "test_latents_are_those_of_the_stock_pipeline",
    ),
    "ltx2_3": (
        *OF_ANY_DENOISER,
        "test_text_is_that_of_the_stock_pipeline",
        "test_all_weights_are_read_from_what_was_exported",
    ),
    "minimax_h3_fl": (OF_OTHER_INPUTS[0], "test_samples_are_those_of_the_stock_pipeline"),
    "minimax_h3_ref": (
        OF_OTHER_INPUTS[0],
        "test_stages_and_recomputing_change_nothing",
        "test_samples_are_those_of_the_stock_pipeline",
        "test_an_adapter_is_loaded_by_the_stock_pipeline_and_gone_on_from",
        "test_all_weights_are_read_from_what_was_exported",
    ),
    "omnigen2_edit": (*OF_ANY_DENOISER, "test_samples_are_those_of_the_stock_pipeline"),
    "pixart_alpha": (OF_OTHER_INPUTS[0], "test_samples_are_those_of_the_stock_pipeline"),
    "qwen_image_21_edit": (*OF_ANY_DENOISER, "test_samples_are_those_of_the_stock_pipeline"),
    "sdxl_texts": OF_ANY_DENOISER,
    "wan_flf": (*OF_ANY_DENOISER, "test_all_weights_are_read_from_what_was_exported"),
    "wan_i2v": (
        *OF_OTHER_INPUTS,
        "test_text_is_that_of_the_stock_pipeline",
        "test_latents_are_those_of_the_stock_pipeline",
    ),
    "wan_i2v_blind": OF_OTHER_INPUTS,
}
"""Variants of types, and the generic tests that show something of them."""


def tiny(model: str) -> ModuleType:
    """The module that writes a tiny folder of the type or variant."""
    return importlib.import_module(f"tests.models.tiny_{model}")


def settings_of(pipeline: BasePipeline, adapter: AdapterSettings | None = None, **keys: Any) -> Settings:
    """Settings of a run that trains this model."""
    return Settings(
        output_dir=Path("runs"),
        dataset=Path("dataset.toml"),
        model=pipeline.options,
        adapter=adapter,
        optimizer=AdamWSettings(type="adamw", lr=1e-3),
        **keys,
    )


def write_index(folder: Path, pipeline: type, parts: dict[str, type | None], **values: Any) -> None:
    """`model_index.json`: which class each part of a diffusers folder is of; None for one that is left out."""
    index = {"_class_name": pipeline.__name__, "_diffusers_version": diffusers.__version__, **values}
    for name, part in parts.items():
        index[name] = [part.__module__.partition(".")[0], part.__name__] if part else [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """Noise on all parameters: those born as ones or zeros would hide what is behind them."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
    return module


def encoded(encoder: Encoder, captions: Sequence[str], *, weighted_tags: bool = False) -> dict[str, Any]:
    """What a text encoder, loaded here, makes of the captions of a dataset."""
    encoder.load(torch.device("cpu"))
    return encoded_as_loaded(encoder, captions, weighted_tags=weighted_tags)


def encoded_as_loaded(encoder: Encoder, captions: Sequence[str], *, weighted_tags: bool = False) -> dict[str, Any]:
    """The same of one that is loaded already."""
    rules = DirectorySettings(path=Path(), weighted_tags=weighted_tags)
    prompts = [version_of_prompt(caption, Bucket(64, 64, 1)) for caption in captions]
    shown = [replace(prompt, sample=replace(prompt.sample, rules=rules)) for prompt in prompts]
    return encoder.encode(
        **{input_name: [text_of(one, encoder, input_name) for one in shown] for input_name in encoder.reads}
    )


def ragged(name: str, lengths: tuple[int, ...], width: int) -> dict[str, torch.Tensor]:
    """Random features of texts with these many tokens each, and their mask, padded as a batch is."""
    rows = [normal((length, width), 0, "text", length) for length in lengths]
    masks = [torch.ones(length, dtype=torch.bool) for length in lengths]
    return {name: pad_ragged(rows), f"{name}_mask": pad_ragged(masks)}


def of_true_length(
    name: str, text_BLD: Sequence[torch.Tensor], lengths: Sequence[int]
) -> list[dict[str, torch.Tensor]]:
    """For each text its own tokens alone and a mask of ones, as ragged features are cached."""
    return [
        {name: text_LD[:length], f"{name}_mask": torch.ones(length, dtype=torch.bool)}
        for text_LD, length in zip(text_BLD, lengths, strict=True)
    ]


def certain_of(vae: nn.Module) -> Callable[[torch.Tensor], Any]:
    """`encode` of a VAE with the mode for whatever is drawn of its distribution."""
    encode = vae.encode

    def certain(pixels: torch.Tensor) -> Any:
        mode = encode(pixels).latent_dist.mode()
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator: mode))

    return certain


def drawn(stock: Any, sampling: SamplingSettings, noise: torch.Tensor, **keys: Any) -> Any:
    """What a stock pipeline draws for the first prompt from this noise, as it comes: latents, perhaps as tokens."""
    asked = {
        "prompt": sampling.prompts[0],
        "negative_prompt": sampling.negative_prompt,
        "width": sampling.width,
        "height": sampling.height,
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "latents": noise,
        "output_type": "latent",
    }
    return stock(**{**asked, **keys})
