"""Every key a user may write, with its type, its default and what it does.

The documentation and the JSON schemas are generated from the strings under the keys.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    WrapValidator,
)

DType = Literal["float32", "float16", "bfloat16"]


def torch_dtype(name: DType) -> Any:
    """The `torch.dtype` called `name`."""
    # torch takes seconds to import, and a typo in a file should be told at once.
    import torch

    return getattr(torch, name)


class SettingsTable(BaseModel):
    """A table of a settings file: unknown keys are refused and `"10"` is no number."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def or_else(message: str) -> WrapValidator:
    """One `message` instead of the complaints of every member of a union."""

    def validate(value: Any, inner: Any) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise ValueError(message) from None

    return WrapValidator(validate)


def _at_home(path: Path) -> Path:
    # Unlike Path.expanduser, this leaves the ~name of an unknown user as it is, to be told of as missing.
    return Path(os.path.expanduser(path))


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Part = Annotated[float, Field(ge=0, le=1)]
"""A share that may be the whole."""
# TOML has neither paths nor tuples: these two alone are converted, from a text and from an array.
UserPath = Annotated[Path, Field(strict=False), AfterValidator(_at_home)]
Pair = Annotated[tuple[Count, Count], Field(strict=False)]
MicroBatch = Annotated[tuple[Count, Count], Field(strict=False)]
Betas = Annotated[tuple[Share, Share], Field(strict=False)]
Resolution = Annotated[Count | Pair, or_else("must be a side as in 512, or a size as in [768, 512]")]
AspectRatio = Annotated[Positive | Pair, or_else("must be a ratio as in 1.5, or a size as in [768, 512]")]
MicroBatches = Annotated[
    Count | Annotated[list[MicroBatch], Field(min_length=1)],
    or_else("must be a number, or pairs of a resolution and a number as in [[512, 4], [1024, 1]]"),
]
SizeBucket = Annotated[
    tuple[Count, Count, Count],
    Field(strict=False),
    or_else("must be [width, height, frames] as in [512, 512, 33]"),
]


class TextEncoderFile(SettingsTable):
    """One text encoder to read from a file or folder of its own."""

    type: str
    """Which of the model's text encoders this is, by the name that the model gives it."""
    path: UserPath
    """File or folder of the weights."""


class ModelSettings(SettingsTable):
    """`[model]`: the keys that all models share.

    The options of a model are a subclass, with the keys that only this model has.
    """

    type: str
    """Name of the model: a file name under `models/`, without `.py`."""
    dtype: DType = "bfloat16"
    """Type of the weights, and of the computation, unless another key says otherwise."""
    diffusers_path: UserPath | None = None
    """Folder in diffusers' layout, from which every part is read that has no path of its own."""
    transformer_path: UserPath | None = None
    """File or folder of the denoiser's weights (transformer or UNet); default: from `diffusers_path`."""
    transformer_dtype: DType | None = None
    """Type in which the denoiser's weights are kept; default: `dtype`."""
    vae_path: UserPath | None = None
    """File or folder of the VAE's weights; default: from `diffusers_path`."""
    latents: Literal["sample", "mode", "distribution"] = "sample"
    """What of the VAE's answer is cached: a sample of its distribution, the middle of it, or all of it, to draw another
    sample each epoch."""
    text_encoders: list[TextEncoderFile] = []
    """Text encoders read from elsewhere; those not listed come from `diffusers_path`."""
    from_scratch: bool = False
    """Start the denoiser from random weights: only its configuration is read."""
    timestep_sample_method: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution from which training timesteps are drawn."""
    sigmoid_scale: Positive = 1.0
    """Width of `logit_normal`: the factor on the normal number before the sigmoid."""
    shift: Positive | None = None
    """Moves timesteps towards noise: t becomes s*t / (1 + (s-1)*t); default: no shift."""
    flux_shift: bool = False
    """Shift by the size of the picture, as Flux does; excludes `shift`."""


class AdapterSettings(SettingsTable):
    """`[adapter]`: train an adapter instead of the model itself. Without this table: full fine-tuning."""

    type: Literal["lora"]
    """Kind of adapter."""
    rank: Count
    """Rank of the update of each adapted layer."""
    alpha: Positive | None = None
    """The update is scaled by alpha / rank; default: the rank, for a scale of 1."""
    dropout: Share = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    dtype: DType = "float32"
    """Type of the adapter's weights."""
    include: list[str] = []
    """Glob patterns that may match anywhere in a module's name: adapt only what matches one; empty: all Linears of the
    blocks."""
    exclude: list[str] = []
    """Glob patterns that may match anywhere in a module's name: do not adapt what matches one."""
    init_from_existing: UserPath | None = None
    """File or folder of an adapter to go on from; default: start from zero effect."""


class OptimizerSettings(SettingsTable):
    """`[optimizer]`: the keys that all optimizers share."""

    type: str
    """Algorithm; upper and lower case are alike."""
    lr: Positive
    """Learning rate, after warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decay of the weights a step, times the learning rate."""


class AdamWSettings(OptimizerSettings):
    """`type = "adamw"`: AdamW, with a float32 master of each parameter that is kept in 16 bits."""

    type: Literal["adamw"]
    """Algorithm; upper and lower case are alike."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the two running means, of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""


class AdamW8bitSettings(AdamWSettings):
    """`type = "adamw8bit"`: AdamW with its state in 8 bits, of bitsandbytes. Needs a GPU."""

    type: Literal["adamw8bit"]
    """Algorithm; upper and lower case are alike."""


class SGDSettings(OptimizerSettings):
    """`type = "sgd"`: plain gradient descent."""

    type: Literal["sgd"]
    """Algorithm; upper and lower case are alike."""
    momentum: Share = 0.0
    """Share of the last update that is kept in the next."""


def lower_type(table: Any) -> Any:
    """`table` with its `type` in lower case, so that AdamW and adamw are one."""
    if isinstance(table, dict) and isinstance(table.get("type"), str):
        return {**table, "type": table["type"].lower()}
    return table


AnyOptimizer = Annotated[
    Annotated[AdamWSettings | AdamW8bitSettings | SGDSettings, Field(discriminator="type")],
    BeforeValidator(lower_type),
]


def optimizer_types(
    classes: Iterable[type[OptimizerSettings]] = (AdamWSettings, AdamW8bitSettings, SGDSettings),
) -> dict[str, type[OptimizerSettings]]:
    """The settings class of every optimizer, by the `type` that chooses it."""
    return {get_args(cls.model_fields["type"].annotation)[0]: cls for cls in classes}


class MonitoringSettings(SettingsTable):
    """`[monitoring]`: where metrics go, besides the run folder's `metrics.jsonl`."""

    enable_tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    enable_wandb: bool = False
    """Send metrics to Weights & Biases."""
    wandb_api_key: Annotated[str | None, Field(repr=False)] = None
    """Key of the account; default: what `wandb login` or WANDB_API_KEY set. Never written to a run folder."""
    wandb_tracker_name: str | None = None
    """Project that the run is filed under; default: penstock."""
    wandb_run_name: str | None = None
    """Name of the run; default: that of its folder."""


class SamplingSettings(SettingsTable):
    """`[sampling]`: pictures drawn during the run, from fixed prompts and seeds."""

    prompts: list[str] = []
    """What to draw; empty: nothing."""
    sample_every_n_steps: Count | None = None
    """Draw after every n steps."""
    sample_every_n_epochs: Count | None = None
    """Draw after every n epochs."""
    sample_before_first_step: bool = False
    """Draw before training, to compare with."""
    steps: Count = 20
    """Denoising steps of a picture."""
    width: Count = 1024
    """Width, in pixels."""
    height: Count = 1024
    """Height, in pixels."""
    seed: Natural = 0
    """Seed of the first noise, the same at every turn."""
    guidance: Annotated[float, Field(ge=0)] = 3.5
    """Strength of guidance by the prompt."""


class EvalDataset(SettingsTable):
    """Data whose loss is measured."""

    name: Annotated[str, Field(min_length=1)]
    """Name in the metrics: `name/loss`."""
    config: UserPath
    """Dataset file, written as for training."""


class Settings(SettingsTable):
    """A run: its own keys, and the tables."""

    output_dir: UserPath
    """Folder in which every run makes a folder of its own, named by date and time."""
    dataset: UserPath
    """Dataset file of the training data."""
    epochs: Count | None = None
    """Passes over the training data; default: as many as `max_steps` takes, and one without it."""
    max_steps: Count | None = None
    """Stop after so many optimizer steps, if that comes before the last epoch's end."""
    micro_batch_size_per_gpu: MicroBatches = 1
    """Samples in one forward pass of one pipeline; or several pairs of a resolution and their number, of which the
    nearest resolution's is used, as in [[512, 4], [1024, 1]]."""
    image_micro_batch_size_per_gpu: MicroBatches | None = None
    """The same for still pictures, where there are clips too; default: as for clips."""
    pipeline_stages: Count = 1
    """Pieces that the model is cut into, each on a GPU of its own; it divides the number of GPUs."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches of one optimizer step."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient of the whole model; 0: no limit."""
    warmup_steps: Natural = 0
    """Steps in which the learning rate rises to its full value."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up: kept, or brought down to 0 at the last step."""
    force_constant_lr: Positive | None = None
    """Use this learning rate at every step, over warm-up, schedule and the checkpoint's value."""
    eval_datasets: list[EvalDataset] = []
    """Data whose loss is measured and not trained on: tables of `name` and `config`."""
    eval_every_n_steps: Count | None = None
    """Evaluate after every n steps."""
    eval_every_n_epochs: Count | None = None
    """Evaluate after every n epochs."""
    eval_every_n_examples: Count | None = None
    """Evaluate after every n training samples."""
    eval_before_first_step: bool = True
    """Evaluate before training too, if there is something to evaluate."""
    eval_micro_batch_size_per_gpu: MicroBatches | None = None
    """Samples in one forward pass of evaluation; default: as in training."""
    save_every_n_steps: Count | None = None
    """Export weights after every n steps."""
    save_every_n_epochs: Count | None = None
    """Export weights after every n epochs."""
    save_every_n_examples: Count | None = None
    """Export weights after every n training samples."""
    save_dtype: DType | None = None
    """Type of exported weights; default: the type in which they are trained."""
    save_format: Literal["diffusers", "comfyui", "both"] | None = None
    """Layout of exported weights: diffusers', or the single file that ComfyUI loads; default: diffusers for an adapter,
    both for a full fine-tune."""
    checkpoint_every_n_steps: Count | None = None
    """Write the state to resume from after every n steps."""
    checkpoint_every_n_epochs: Count | None = None
    """Write the state to resume from after every n epochs."""
    checkpoint_every_n_minutes: Positive | None = None
    """Write the state to resume from after every n minutes; fractions are allowed."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    partition_method: Literal["parameters", "uniform", "manual"] = "parameters"
    """How layers are shared among stages: alike in parameters, alike in number, or by `partition_split`."""
    partition_split: list[Count] | None = None
    """For `manual`: the layer at which each stage but the first begins, counted from 0."""
    caching_batch_size: Count = 1
    """Samples that the VAE and the text encoders take at once when the cache is filled."""
    cache_text_embeddings: bool = True
    """Encode captions once, into the cache; false: encode them as they are needed, with the text encoders kept on the
    device, so that each epoch may have other versions of them."""
    verify: Literal["stat", "content"] = "stat"
    """How a file or cached item is seen to be unchanged: by size and time, or by reading all of it."""
    max_failed_fraction: Part = 0.05
    """Share of the files that may be broken or lack what they need; with more, the run ends before training."""
    steps_per_print: Count = 1
    """Log progress every n steps."""
    seed: Natural = 0
    """Seed of all that is drawn: order, noise, timesteps, dropout, first weights."""
    model: SerializeAsAny[ModelSettings]
    """What is trained."""
    adapter: AdapterSettings | None = None
    """Train an adapter; without it, the model itself."""
    optimizer: AnyOptimizer
    """How weights move."""
    monitoring: MonitoringSettings = MonitoringSettings()
    """Where metrics go."""
    sampling: SamplingSettings = SamplingSettings()
    """Pictures drawn during the run."""
