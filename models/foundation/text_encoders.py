"""Text encoders of transformers as encoders for the cache.

Shapes: B captions, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, PreTrainedModel, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from models.foundation.weights import check_shape, fingerprint, load_tensors
from utils.dataset.buckets import Bucket

Encode = Callable[[nn.Module, Any, list[str]], dict[str, torch.Tensor]]


def clip_pooled(text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
    """The pooled output of CLIP (B, D), over the tokenizer's whole length, without a mask."""
    tokens = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return {"clip_pooled": text_encoder(tokens.input_ids.to(text_encoder.device)).pooler_output}


@dataclass(frozen=True)
class T5Features:
    """The last hidden state of T5 (B, L, D), padded to `length` tokens without a mask, as inference makes it."""

    length: int

    def __call__(self, text_encoder: nn.Module, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        tokens = tokenizer(captions, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        return {"t5": text_encoder(tokens.input_ids.to(text_encoder.device))[0]}


class TextEncoder:
    """A frozen text encoder as an `Encoder`: captions -> features.

    Args:
        name: of its store.
        model_class: of transformers.
        folder: the diffusers folder; `subfolder` has the configuration and weights, `tokenizer` the tokenizer.
        file: a single .safetensors file, or a folder, with weights that replace the folder's.
        dtype: in which it computes.
        encode: captions -> named features; its repr is part of the fingerprint.
        shapes: of one caption's features, by name.
    """

    reads = ("caption",)

    def __init__(
        self,
        name: str,
        model_class: type[PreTrainedModel],
        folder: Path,
        subfolder: str,
        tokenizer: str,
        file: Path | None,
        dtype: torch.dtype,
        encode: Encode,
        shapes: Mapping[str, tuple[int, ...]],
    ):
        self.name, self.model_class, self.folder = name, model_class, folder
        self.subfolder, self.tokenizer_folder = subfolder, folder / tokenizer
        self.file, self.dtype, self.features, self.shapes = file, dtype, encode, shapes
        self.model: nn.Module | None = None
        self.tokenizer: Any = None

    @cached_property
    def fingerprint(self) -> str:
        how = getattr(self.features, "__name__", repr(self.features))
        folder = self.folder / self.subfolder
        weights = [self.file, folder / "config.json"] if self.file else [folder]
        return fingerprint(self.name, how, str(self.dtype), self.tokenizer_folder, *weights)

    def load(self, device: torch.device) -> None:
        disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_folder)
        self.model = self._load_model().to(device).eval().requires_grad_(False)

    def _load_model(self) -> nn.Module:
        source = self.file or self.folder / self.subfolder
        # transformers knows the names of older files, which tensors are tied, and what must stay in float32. What
        # a file lacks it fills with random numbers: its report is what tells.
        how = {"dtype": self.dtype, "ignore_mismatched_sizes": True, "output_loading_info": True}
        if source.is_dir():
            model, report = self.model_class.from_pretrained(source, **how)
        else:
            config = AutoConfig.from_pretrained(self.folder / self.subfolder)
            tensors = load_tensors(source, self.dtype)
            model, report = self.model_class.from_pretrained(None, config=config, state_dict=tensors, **how)
        for name in sorted(report["missing_keys"]):
            check_shape(name, None, (), source)
        for name, stored, asked in report["mismatched_keys"]:
            check_shape(name, stored, asked, source)
        return model

    def unload(self) -> None:
        self.model = self.tokenizer = None

    @torch.no_grad()
    def encode(self, caption: list[str]) -> dict[str, torch.Tensor]:
        return self.features(self.model, self.tokenizer, caption)

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (shape, self.dtype) for name, shape in self.shapes.items()}


def clip_l(folder: Path, file: Path | None, dtype: torch.dtype) -> TextEncoder:
    """CLIP's pooled output, from `text_encoder` and `tokenizer` of a diffusers folder."""
    width = AutoConfig.from_pretrained(folder / "text_encoder").hidden_size
    return TextEncoder(
        "clip", CLIPTextModel, folder, "text_encoder", "tokenizer", file, dtype, clip_pooled, {"clip_pooled": (width,)}
    )


def t5(folder: Path, file: Path | None, dtype: torch.dtype, length: int) -> TextEncoder:
    """T5's features of `length` tokens, from `text_encoder_2` and `tokenizer_2` of a diffusers folder."""
    width = AutoConfig.from_pretrained(folder / "text_encoder_2").d_model
    return TextEncoder(
        "t5",
        T5EncoderModel,
        folder,
        "text_encoder_2",
        "tokenizer_2",
        file,
        dtype,
        T5Features(length),
        {"t5": (length, width)},
    )
