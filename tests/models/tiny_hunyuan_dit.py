"""A whole tiny HunyuanDiT 1.2 in diffusers' layout: the miniature Flux's T5, the rest of its own."""

from __future__ import annotations

import json
from pathlib import Path
from string import printable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, HunyuanDiT2DModel
from diffusers import HunyuanDiTPipeline as StockPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed_from_grid
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch.nn import functional
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedTokenizerFast, T5EncoderModel

from models.hunyuan_dit import HunyuanDitOptions, HunyuanDitPipeline
from tests.models.tiny_flux import MINI_FLUX
from tests.models.tiny_folder import drawn, randomised, write_index
from tests.models.tiny_sd15 import write_vae
from utils.dataset.batches import pad_ragged
from utils.diffusion import seeds
from utils.diffusion.seeds import normal
from utils.settings.run_tables import SamplingSettings

STOCK = StockPipeline
SAMPLING = {"width": 96, "height": 64, "guidance": 4.0, "negative_prompt": "blurred"}
# The stock pipeline has these lengths written down.
BERT_TOKENS, MT5_TOKENS = 77, 256
BERT_WIDTH, MT5_WIDTH = 32, 64
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 6,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "cross_attention_dim": BERT_WIDTH,
    "cross_attention_dim_t5": MT5_WIDTH,
    "pooled_projection_dim": 16,
    "text_len": BERT_TOKENS,
    "text_len_t5": MT5_TOKENS,
    "use_style_cond_and_image_meta_size": False,
}
VERSION_1_1 = {"use_style_cond_and_image_meta_size": True}
"""Such a model is told sizes, and has an entry larger than all its tiny blocks."""
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.03}


def write_tokenizer(folder: Path) -> BertTokenizer:
    """Every letter is a word, in the files that the publisher's folder has."""
    folder.mkdir()
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    letters = [letter for letter in printable.lower() if not letter.isspace()]
    words = [*marks.values(), *sorted({*letters, *(f"##{letter}" for letter in letters)})]
    (folder / "vocab.txt").write_text("\n".join(words))
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": BERT_TOKENS, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return BertTokenizer.from_pretrained(folder)


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's, as `VERSION_1_1`. BERT has no layer that pools."""
    torch.manual_seed(0)
    (folder / "text_encoder_2").symlink_to(MINI_FLUX / "text_encoder_2")
    (folder / "tokenizer_2").symlink_to(MINI_FLUX / "tokenizer_2")
    write_vae(folder)
    bert = BertConfig(
        vocab_size=len(write_tokenizer(folder / "tokenizer")),
        hidden_size=BERT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    randomised(BertModel(bert, add_pooling_layer=False), 2).save_pretrained(folder / "text_encoder")
    randomised(HunyuanDiT2DModel(**{**TRANSFORMER, **changes}), 1).save_pretrained(folder / "transformer")
    DDPMScheduler(**NOISE, prediction_type="v_prediction", clip_sample=False).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": DDPMScheduler,
        "text_encoder": BertModel,
        "text_encoder_2": T5EncoderModel,
        "tokenizer": BertTokenizer,
        "tokenizer_2": PreTrainedTokenizerFast,
        "transformer": HunyuanDiT2DModel,
        "vae": AutoencoderKL,
        "feature_extractor": None,
        "safety_checker": None,
    }
    write_index(folder, STOCK, parts, requires_safety_checker=False)
    return folder


def pipeline(folder: Path, **options: Any) -> HunyuanDitPipeline:
    options = {"dtype": "float32", **options}
    return HunyuanDitPipeline(HunyuanDitOptions(type="hunyuan_dit", diffusers_path=folder, **options), seed=0)


def features(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random features of texts with these many tokens of BERT's and half as many more of mT5's, whose padding is no
    zeros."""
    masks = [torch.ones(length, dtype=torch.bool) for length in lengths]
    mt5_lengths = torch.tensor(lengths) * 3 // 2
    return {
        "bert": pad_ragged([normal((length, BERT_WIDTH), 0, "bert", length) for length in lengths]),
        "bert_mask": pad_ragged(masks),
        "mt5": normal((len(lengths), MT5_TOKENS, MT5_WIDTH), 0, "mt5", *lengths),
        "mt5_mask": torch.arange(MT5_TOKENS) < mt5_lengths[:, None],
    }


def publishers_rotary_tables(
    features: int, extent: tuple[tuple[int, int], tuple[int, int]], grid: tuple[int, int], **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of positions that are numpy's `linspace` without the end, as in the publisher's code; diffusers', whose
    place they take here, are others for pictures that are not square."""
    (top, left), (bottom, right) = extent
    rows, columns = (
        np.linspace(start, stop, count, endpoint=False, dtype=np.float32)
        for start, stop, count in ((top, bottom, grid[0]), (left, right, grid[1]))
    )
    positions = torch.from_numpy(np.stack(np.meshgrid(columns, rows)))
    return get_2d_rotary_pos_embed_from_grid(features, positions, use_real=True)


def whole(
    denoiser: HunyuanDiT2DModel,
    pipeline: HunyuanDitPipeline,
    features: dict,
    x_t: torch.Tensor,
    t_B: torch.Tensor,
    sizes: tuple[float, ...] | None = None,
) -> torch.Tensor:
    """`sizes` are those that version 1.1 is told of each picture."""
    height, width = x_t.shape[2:]
    grid = (height // 2, width // 2)
    rope = publishers_rotary_tables(
        denoiser.config.attention_head_dim, get_resize_crop_region_for_grid(grid, 512 // 8 // 2), grid
    )
    missing = BERT_TOKENS - features["bert"].shape[1]
    # Width first, as the publisher's code; the stock pipeline has heights first, which is another picture to the model.
    sizes = sizes or (1024, 1024, 8 * width, 8 * height, 0, 0)
    return denoiser(
        x_t,
        (t_B * 1000).long().float(),
        encoder_hidden_states=functional.pad(features["bert"], (0, 0, 0, missing), value=7.0),
        text_embedding_mask=functional.pad(features["bert_mask"], (0, missing)),
        encoder_hidden_states_t5=features["mt5"],
        text_embedding_mask_t5=features["mt5_mask"],
        image_meta_size=torch.tensor([sizes] * len(x_t), dtype=torch.float32),
        style=torch.zeros(len(x_t), dtype=torch.int64),
        image_rotary_emb=rope,
        return_dict=False,
    )[0]


def prompt_features(stock: StockPipeline, captions: list[str]) -> list[dict[str, torch.Tensor]]:
    lengths = (BERT_TOKENS, MT5_TOKENS)
    (bert, _, bert_mask, _), (mt5, _, mt5_mask, _) = (
        stock.encode_prompt(
            captions, do_classifier_free_guidance=False, max_sequence_length=length, text_encoder_index=n
        )
        for n, length in enumerate(lengths)
    )
    return [
        {
            "bert": bert[n][bert_mask[n].bool()],
            "bert_mask": bert_mask[n][bert_mask[n].bool()],
            "mt5": mt5[n],
            "mt5_mask": mt5_mask[n],
        }
        for n in range(len(captions))
    ]


def stock_latents(stock: Any, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
    return stock.vae.encode(pixels_BCFHW[:, :, 0]).latent_dist.mode() * stock.vae.config.scaling_factor


def draw(stock: StockPipeline, sampling: SamplingSettings, noise: torch.Tensor) -> torch.Tensor:
    keys = {
        # Width first, as the publisher's code; of itself the stock pipeline gives heights first.
        "target_size": (sampling.width, sampling.height),
        "use_resolution_binning": False,
        "generator": seeds.generator(sampling.seed, "sample steps", 0),
    }
    with patch("diffusers.pipelines.hunyuandit.pipeline_hunyuandit.get_2d_rotary_pos_embed", publishers_rotary_tables):
        return drawn(stock, sampling, noise, **keys).images
