"""Classes of diffusers and transformers by name, as facts about models have them; and denoisers in diffusers' form that
it lacks.

To import these libraries takes seconds, in which a mistake in a config should long be told: nothing that is imported to
read a config may import them when it is itself imported. Names of their classes in annotations stand behind
`TYPE_CHECKING`, and what functions call is imported in them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

ELSEWHERE = {
    "AutoencoderKLMiniMaxH3": "models.foundation.encoders.minimax_h3_pictures",
    "LTX2TextConnectors": "diffusers.pipelines.ltx2",
    "OmniGen2Transformer2DModel": "models.foundation.denoisers.omnigen2",
}
"""Classes that diffusers has inside of a pipeline, or that do less there than is needed, and denoisers that it lacks,
with the modules that have them."""


def of_diffusers(name: str) -> Any:
    """The class of this name in diffusers, or of ours in its place."""
    return _named(ELSEWHERE.get(name, "diffusers"), name)


def is_of_diffusers(name: str) -> bool:
    """Whether diffusers has a class of this name, or ours are in its place."""
    return name in ELSEWHERE or hasattr(import_module("diffusers"), name)


def of_transformers(name: str) -> Any:
    """The class of this name in transformers."""
    return _named("transformers", name)


def _named(library: str, name: str) -> Any:
    cls = getattr(import_module(library), name, None)
    assert cls is not None, f"{library} has no {name}"
    return cls
