"""Mistral's models of texts and pictures as text encoders, of which ComfyUI's files have the text model alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.weights import CheckpointNames

VISION = ("vision_tower.", "multi_modal_projector.")


def _of_text_alone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file of Mistral's text model, as ComfyUI has it, under the names of the whole model."""
    whole = ("language_model.", *VISION)
    named = ((name.removeprefix("model."), tensor) for name, tensor in tensors.items())
    return {name if name.startswith(whole) else f"language_model.{name}": tensor for name, tensor in named}


MISTRAL = TextPart("mistral3", "Mistral3Model", names=CheckpointNames("model.", _of_text_alone), vision=VISION)
