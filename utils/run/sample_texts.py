"""What is written into a sample's file: how it was drawn, in the form that viewers of generated pictures show."""

from __future__ import annotations

from dataclasses import dataclass

from utils.settings.sample_requests import SampleRequest

PARAMETERS = "parameters"
"""The name of the text in a PNG that such viewers look for."""


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from.

    Attributes:
        model: the weights that the run began with.
        run: name of the run's folder, or of an export.
        step: after which it was drawn; None for an export.
    """

    model: str
    run: str
    step: int | None


def parameters(request: SampleRequest, origin: Origin, sampler: str) -> str:
    """The prompt, below it the negative prompt, and a line of `name: value`, with commas between.

    Args:
        sampler: name of the scheduler.
    """
    one = request.settings
    values = {
        "Steps": one.steps,
        "Sampler": sampler,
        "CFG scale": f"{one.guidance:g}",
        "Seed": one.seed,
        # Of noise that follows from the seed of all samples.
        **({} if request.seeded else {"Place": request.place}),
        "Size": f"{one.width}x{one.height}",
        **({"Frames": one.frames} if one.frames > 1 else {}),
        **({"Control images": " + ".join(file.name for file in request.control_images)} if one.control_images else {}),
        **({"Mask": request.mask_image.name} if request.mask_image else {}),
        **({} if one.adapter_scale == 1.0 else {"Adapter scale": f"{one.adapter_scale:g}"}),
        "Model": origin.model,
        "Run": origin.run,
        **({} if origin.step is None else {"Training step": origin.step}),
    }
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items())
    negative = [f"Negative prompt: {one.negative_prompt}"] if one.negative_prompt else []
    return "\n".join([request.prompt, *negative, line])


def _quoted(value: str) -> str:
    """A value with a comma or colon in quotes, by which viewers would divide it."""
    if not any(mark in value for mark in ",:\n"):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
