"""A whole tiny PixArt-alpha for 1024 pixels, which is told sizes, in diffusers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import PixArtAlphaPipeline as StockPipeline

from tests.models import tiny_pixart

STOCK, SAMPLING = StockPipeline, tiny_pixart.SAMPLING
pipeline, features, whole, draw = tiny_pixart.pipeline, tiny_pixart.features, tiny_pixart.whole, tiny_pixart.draw


def write_folder(folder: Path, **changes: Any) -> Path:
    """`changes` are the transformer's."""
    return tiny_pixart.write_folder(folder, STOCK, **{"sample_size": 128, "interpolation_scale": None, **changes})
