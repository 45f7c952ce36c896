"""Gemma 3 with the connectors of LTX-2, small transformers of the model's own which make its text of all of Gemma's
states: one for video, one for sound.

Shapes: B captions, L tokens, S states of a token, D features of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.foundation.checkpoints.configs import made_of
from models.foundation.checkpoints.folders import read_config
from models.foundation.checkpoints.gguf_files import is_gguf
from models.foundation.checkpoints.headers import fingerprint, read_header
from models.foundation.checkpoints.layouts.ltx2 import CONNECTORS as PUBLISHED
from models.foundation.checkpoints.layouts.ltx2 import connectors_of
from models.foundation.checkpoints.weights import assign, build_empty, mapped_tensors, meta_tensors
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import HiddenStates, Shapes
from utils.errors import UserError
from utils.quantised.formats import FORMATS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONNECTORS = "connectors"
CLASS = "LTX2TextConnectors"
OWN = "video_connector."
"""With what names of the connectors begin in diffusers."""
CONNECTORS_PATH = "[model] connectors_path"
NEEDED = (
    "connectors make the model's text; give a file with `video_embeddings_connector` and `text_embedding_projection`, "
    "such as Lightricks' checkpoint"
)
FOR_PICTURES = ("vision_tower", "multi_modal_projector")
"""The parts of Gemma by which it sees pictures, which it is not shown."""
FOR_TEXT, OF_ONE_FILE = "language_model.", "model."
"""With what the names of its other tensors begin, and those of files for text alone."""
KEYS = ("caption_channels", "text_proj_in_factor", "video_connector_num_attention_heads")


def connectors_config(folder: Path) -> dict[str, Any]:
    """The configuration of the connectors in a diffusers folder.

    Raises:
        UserError: it is missing or damaged, or belongs to another model.
    """
    return read_config(folder, CONNECTORS, model=CLASS, keys=KEYS)


def text_width(config: dict[str, Any]) -> int:
    """The features of a token of the text that connectors of this configuration make for video."""
    return config["video_connector_num_attention_heads"] * config.get("video_connector_attention_head_dim", 128)


class Connected(nn.Module):
    """Gemma, which loses the parts for pictures, and connectors."""

    def __init__(self, gemma: nn.Module, connectors: nn.Module):
        super().__init__()
        for part in FOR_PICTURES:
            delattr(gemma, part)
        self.gemma, self.connectors = gemma, connectors

    @property
    def device(self) -> torch.device:
        return self.gemma.device

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        """The text for video (B, L, D) of tokens (B, L) that are padded on the left."""
        states = self.gemma(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        text_BLD, _, _ = self.connectors(torch.stack(states, dim=-1), mask_BL, padding_side="left")
        return text_BLD


@dataclass(frozen=True)
class ConnectedFeatures(HiddenStates):
    """What the connectors make for video of a caption without the spaces around it (B, L, D): its own tokens, and
    learned ones in the place of what pads it to `length`, all of which the model sees."""

    name: str
    length: int
    width: int

    def shapes(self, config: PretrainedConfig) -> Shapes:
        return {self.name: (self.length, self.width)}

    def written(self, tokenizer: Any, caption: str) -> str:
        return caption.strip()

    def __call__(self, text_encoder: Connected, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        tokens = tokenizer(
            [self.written(tokenizer, caption) for caption in captions],
            padding="max_length",
            padding_side="left",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        ).to(text_encoder.device)
        return {self.name: text_encoder(tokens.input_ids, tokens.attention_mask)}


class ConnectedGemma(TextEncoder):
    """Gemma 3 with connectors as an `Encoder`. A single file of Gemma may have the tensors for text alone.

    Args:
        connectors: a checkpoint that has them too, under Lightricks' names, or a file with them alone; None for the
            folder's.
        others, further: as of `TextEncoder`.
    """

    def __init__(self, *others: Any, connectors: Path | None = None, **further: Any):
        super().__init__(*others, **further)
        self.connectors = connectors or self.folder / CONNECTORS

    @cached_property
    def fingerprint(self) -> str:
        # Of a file the configuration is not a part.
        return fingerprint(super().fingerprint, *{self.folder / CONNECTORS: None, self.connectors: None})

    def check(self) -> None:
        super().check()
        is_other = self.connectors.is_file() and is_gguf(self.connectors)
        names = () if is_other else read_header(self.connectors).files
        if self.connectors.is_file() and not any(start in name for name in names for start in (OWN, *PUBLISHED)):
            raise UserError.of(f"is required: {self.connectors} has none; {NEEDED}", where=CONNECTORS_PATH)
        self._connectors(meta_tensors)

    def load(self, device: torch.device) -> None:
        super().load(device)
        connectors = self._connectors(lambda path, _: mapped_tensors(path)).to(device)
        if self.kept:
            from models.foundation.encoders.quantised import quantise_blocks

            quantise_blocks(connectors, FORMATS[self.kept])
        self.model = Connected(self.model, connectors.eval().requires_grad_(False))

    def empty(self) -> nn.Module:
        return Connected(super().empty(), self._quantised(self._connectors(meta_tensors).to("meta").eval()))

    def _tensors(self, read: Callable[[Path, torch.dtype, str], dict[str, Any]]) -> dict[str, Any]:
        tensors = super()._tensors(read)
        if not any(FOR_TEXT in name for name in tensors):
            own = {name.removeprefix(OF_ONE_FILE): one for name, one in tensors.items() if name.startswith(OF_ONE_FILE)}
            tensors = {f"{FOR_TEXT}{name}": one for name, one in own.items()}
        return tensors

    def _connectors(self, read: Callable[[Path, torch.dtype], Mapping[str, Any]]) -> nn.Module:
        place, config = self.folder / CONNECTORS, connectors_config(self.folder)
        connectors = build_empty(lambda: made_of(CLASS, config, place / "config.json"))
        tensors = read(self.connectors, self.dtype)
        # Of a checkpoint nothing else is read, which may be forty gigabytes.
        own = connectors_of(tensors) or tensors
        assign(connectors, {name: one[...].to(self.dtype) for name, one in own.items()}, self.connectors)
        return connectors
