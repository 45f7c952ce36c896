"""The first frame of a clip as a condition, for some models together with the last one: encoded by the clip's VAE, and
seen by CLIP or SigLIP.

Shapes: B batch, C channels, F frames, H W pixels, f h w latent cells, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from PIL import Image
from torch import nn

from models.foundation.checkpoints.configs import check_processor, explained
from models.foundation.checkpoints.folders import read_config
from models.foundation.checkpoints.headers import fingerprint
from models.foundation.checkpoints.loading import loaded
from models.foundation.checkpoints.stock import of_transformers
from models.foundation.checkpoints.weights import load_tensors, meta_tensors
from models.foundation.encoders.video_vae import WanAutoencoder
from utils.dataset.inputs import ENDS
from utils.dataset.samples import Bucket
from utils.first_values import none_without_memory

if TYPE_CHECKING:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PART, PROCESSOR = "image_encoder", "image_processor"
Processor = TypeVar("Processor")
CONFIG_KEYS = ("hidden_size", "image_size", "patch_size")


def clip_processor(folder: Path) -> CLIPImageProcessorPil:
    """The processor of a diffusers folder that turns pictures into CLIP's input.

    Raises:
        UserError: its settings are missing or damaged.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return processor_of(folder / PROCESSOR, CLIPImageProcessorPil)


def processor_of(folder: Path, stock: type[Processor]) -> Processor:
    """The processor of this class of transformers with the settings in `folder`.

    Raises:
        UserError: they are missing or damaged.
    """
    check_processor(folder)
    with explained(folder, "image processor"):
        return stock.from_pretrained(folder, local_files_only=True)


def first_pictures(pixels_BCFHW: torch.Tensor, frame: int = 0) -> list[Image.Image]:
    """The first frames of clips in [-1, 1], or others, as pictures."""
    levels_BHWC = ((pixels_BCFHW[:, :, frame] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(levels_HWC.cpu().numpy()) for levels_HWC in levels_BHWC]


class FirstFrameAutoencoder(WanAutoencoder):
    """Wan's VAE as an `Encoder` of a clip whose first frame is kept and whose other frames are grey, as models that
    make clips from pictures see it. Yields `first_frame_latents`, the mode of their distribution.

    Args:
        to_last: the last frame is kept too, which in samples is a second picture.
    """

    def __init__(self, folder: Path, file: Path | None, dtype: torch.dtype, *, to_last: bool = False):
        super().__init__(folder, file, dtype, draw="mode")
        self.kept = (0, -1) if to_last else (0,)
        self.reads = (ENDS,) if to_last else ("pixels",)
        self.name = "vae_first_and_last_frame" if to_last else "vae_first_frame"
        self.outputs = ["first_frame_latents"]

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, C, f, h, w) of `pixels_BCFHW` in [-1, 1]."""
        (pixels_BCFHW,) = inputs.values()
        alone_BCFHW = torch.zeros_like(pixels_BCFHW)
        for frame in self.kept:
            alone_BCFHW[:, :, frame] = pixels_BCFHW[:, :, frame]
        return super().encode(pixels=alone_BCFHW)


class LoneFrameAutoencoder(WanAutoencoder):
    """Wan's VAE as an `Encoder` of a clip's first frame by itself: `first_frame_latents`, one latent frame, the mode of
    their distribution."""

    def __init__(self, folder: Path, file: Path | None, dtype: torch.dtype):
        super().__init__(folder, file, dtype, draw="mode")
        self.name, self.outputs = "vae_lone_frame", ["first_frame_latents"]

    def encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents (B, C, 1, h, w) of the first frames of `pixels_BCFHW` in [-1, 1]."""
        return super().encode(pixels=pixels[:, :, :1])

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return super().feature_shapes(replace(bucket, frames=1))


class ClipVision:
    """CLIP's picture encoder as an `Encoder` of the first frame: `clip_vision`, the hidden state before the last layer
    (L, D), as in inference.

    In inference CLIP sees the picture that the user gives; here it sees the picture at the size of the clip, without
    what was cropped to get the clip's shape.

    Attributes:
        name: of the encoder and of its features.
        stock_class, model_type: of transformers.
        processor_part: the part of the diffusers folder with the settings of the processor.
        further_tokens: how many tokens there are beside those of the patches.

    Args:
        file: file or folder of weights that replace those in the diffusers folder.
        to_last: the tokens of the last frame follow those of the first.
    """

    name = "clip_vision"
    stock_class: ClassVar[str] = "CLIPVisionModel"
    model_type: ClassVar[str] = "clip_vision_model"
    processor_part: ClassVar[str] = PROCESSOR
    further_tokens: ClassVar[int] = 1

    def __init__(self, folder: Path, file: Path | None, dtype: torch.dtype, *, to_last: bool = False):
        self.folder, self.file, self.dtype = folder, file, dtype
        self.frames = (0, -1) if to_last else (0,)
        self.reads = (ENDS,) if to_last else ("pixels",)
        self.model: nn.Module | None = None

    @cached_property
    def fingerprint(self) -> str:
        part = self.folder / PART
        weights = [self.file, part / "config.json"] if self.file else [part]
        return fingerprint(self.name, str(self.dtype), *weights, self.folder / self.processor_part)

    @cached_property
    def config(self) -> dict:
        """The configuration of the encoder.

        Raises:
            UserError: it is missing, damaged, or belongs to another model.
        """
        return read_config(self.folder, PART, model=self.model_type, keys=CONFIG_KEYS)

    @cached_property
    def processor(self) -> Any:
        """The processor that turns a picture into the encoder's input.

        Raises:
            UserError: its settings are missing or damaged.
        """
        return clip_processor(self.folder)

    def check(self) -> None:
        """Whether its files are there and fit one another, from their headers.

        Raises:
            UserError: they are not, or do not.
        """
        assert self.config and self.processor
        with none_without_memory():
            self._build(meta_tensors, device_map="meta")

    def load(self, device: torch.device) -> None:
        self.model = self._build(load_tensors).to(device).eval().requires_grad_(False)

    def empty(self) -> nn.Module:
        """What `load` makes, without memory."""
        stock, config = self._stock()
        with none_without_memory(), torch.device("meta"):
            return stock(config).to(self.dtype).eval()

    def _stock(self) -> tuple[Any, Any]:
        """Its class of transformers, and its configuration for this."""
        stock = of_transformers(self.stock_class)
        with explained(self.folder / PART / "config.json", self.stock_class):
            return stock, stock.config_class.from_pretrained(self.folder / PART)

    def _build(self, read: Callable[[Path, torch.dtype, str], dict[str, torch.Tensor]], **how: Any) -> nn.Module:
        """The model with the tensors that `read` gives."""
        (stock, config), source = self._stock(), self.file or self.folder / PART
        tensors = read(source, self.dtype, "")
        return loaded(stock, None, source, config=config, state_dict=tensors, dtype=self.dtype, **how)

    def unload(self) -> None:
        self.model = None

    @torch.no_grad()
    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features (B, L, D) of the first frames of `pixels_BCFHW` in [-1, 1], and of the last ones."""
        (pixels_BCFHW,) = inputs.values()
        return {self.name: torch.cat([self._seen(pixels_BCFHW, frame) for frame in self.frames], dim=1)}

    def _seen(self, pixels_BCFHW: torch.Tensor, frame: int) -> torch.Tensor:
        inputs = self.processor(images=first_pictures(pixels_BCFHW, frame), return_tensors="pt").pixel_values
        return self.state(inputs.to(self.model.device, self.dtype))

    def state(self, inputs: torch.Tensor) -> torch.Tensor:
        """The hidden state that is read (B, L, D)."""
        return self.model(inputs, output_hidden_states=True).hidden_states[-2]

    @property
    def tokens(self) -> int:
        """L."""
        of_patches = (self.config["image_size"] // self.config["patch_size"]) ** 2
        return len(self.frames) * (of_patches + self.further_tokens)

    def feature_shapes(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {self.name: ((self.tokens, self.config["hidden_size"]), self.dtype)}


class SiglipVision(ClipVision):
    """SigLIP's picture encoder as an `Encoder` of the first frame: `siglip_vision`, the last hidden state (L, D)."""

    name = "siglip_vision"
    stock_class = "SiglipVisionModel"
    model_type = "siglip_vision_model"
    processor_part = "feature_extractor"
    further_tokens = 0

    @cached_property
    def processor(self) -> Any:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        return processor_of(self.folder / self.processor_part, SiglipImageProcessorPil)

    def state(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs).last_hidden_state


def given_frames(latents: torch.Tensor, group: int, *, to_last: bool = False) -> torch.Tensor:
    """The mask channels for such a clip's latents (B, C, f, h, w): (B, group, f, h, w), ones for the given first frame
    and perhaps the last. Each latent frame covers `group` frames; the first covers a single one, which counts `group`
    times."""
    mask = latents.new_zeros(len(latents), group, *latents.shape[2:])
    mask[:, :, 0] = 1.0
    if to_last:
        mask[:, -1, -1] = 1.0
    return mask
