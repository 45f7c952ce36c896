"""How well pictures fit their prompts, as CLIP sees it (Hessel et al. 2021): 100 times the cosine between both, without
a bound below."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from utils.run.attempts import reason_of

logger = logging.getLogger(__name__)


class ClipScore:
    """A CLIP of transformers, which is loaded for each use and freed after it.

    Args:
        folder: of its weights, tokenizer and picture processor.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device, self._fails = folder, device, False

    @torch.no_grad()
    def of(self, pictures: Sequence[Path], prompts: Sequence[str]) -> float | None:
        """The mean over the samples; None if CLIP cannot be loaded or used, which is told once."""
        if self._fails or not pictures:
            return None
        try:
            return self._mean(pictures, prompts)
        except Exception as error:
            self._fails = True
            logger.warning("no samples/clip_score is measured: %s cannot be used: %s", self.folder, reason_of(error))
            return None
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _mean(self, pictures: Sequence[Path], prompts: Sequence[str]) -> float:
        # It takes seconds to import.
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

        model = CLIPModel.from_pretrained(self.folder, local_files_only=True).to(self.device).eval()
        tokenizer = CLIPTokenizerFast.from_pretrained(self.folder, local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(self.folder, local_files_only=True)
        cosines = []
        for file, prompt in zip(pictures, prompts, strict=True):
            length = model.config.text_config.max_position_embeddings
            tokens = tokenizer([prompt], max_length=length, truncation=True, return_tensors="pt")
            with Image.open(file, formats=["PNG"]) as picture:
                pixels = processor(picture.convert("RGB"), return_tensors="pt")
            output = model(**tokens.to(self.device), **pixels.to(self.device))
            cosines.append(torch.cosine_similarity(output.text_embeds, output.image_embeds).item())
        return 100 * sum(cosines) / len(cosines)
