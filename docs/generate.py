"""Writes the pages and schemas that are made from the code: `python docs/generate.py`."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
OBJECTIVES = {
    "flow": "flow matching",
    "edm": "EDM",
    None: "DDPM's steps; predicts the noise or v, as the folder's scheduler says",
}
"""By its kind; None if a model's files decide."""

sys.path.insert(0, str(DOCS.parent))


def pages() -> dict[str, str]:
    """File name under docs/ -> content."""
    import models
    from utils.settings.document import dataset_json_schema, settings_json_schema, settings_page
    from utils.settings.foreign_page import foreign_page

    pipelines = {name: models.find(name) for name in models.available()}
    classes = {section: choice.classes for section, choice in models.choices().items()}
    classes["model"] = {name: pipeline.Options for name, pipeline in pipelines.items()}
    return {
        "coming_from_diffusion_pipe.md": foreign_page(),
        "settings.md": settings_page(classes),
        "settings.schema.json": settings_json_schema(classes),
        "dataset.schema.json": dataset_json_schema(),
        "supported_models.md": supported_models(pipelines),
    }


def supported_models(pipelines: dict[str, type]) -> str:
    """One section a model, from what its class states."""
    sections = [section(name, pipeline) for name, pipeline in pipelines.items()]
    return "\n\n".join(["# Supported models", "This page is generated from `models/`.", *sections]) + "\n"


def section(name: str, pipeline: type) -> str:
    from utils import adapters

    media = pipeline.media
    known = pipeline.original_layout is not None
    facts = {
        "Trains on": (
            "still pictures" if media.max_frames == 1 else f"pictures, and clips of up to {media.max_frames} frames"
        )
        + f"; sides are multiples of {media.spatial} pixels",
        "Objective": OBJECTIVES[getattr(pipeline.objective, "kind", None)],
        "Trains as": ", ".join([*(kind.name for kind in adapters.available().values()), "or in full"]),
        "Weights from": "a diffusers folder" + (", or a single file with the publisher's keys" if known else ""),
        "Exports for": "diffusers" + (", ComfyUI" if known else ""),
        "Blocks that are adapted and recomputed": ", ".join(f"`{block}`" for block in pipeline.blocks),
    }
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    return f"## `{name}`\n\n{pipeline.__doc__}\n\n| | |\n|---|---|\n{rows}\n\nIts own keys: [settings](settings.md)."


def main() -> int:
    for name, content in pages().items():
        (DOCS / name).write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
