"""Every key a user may write, with its type, its default and what it does.

The documentation and the JSON schemas are generated from the strings under the keys.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, ValidationInfo, field_validator

from utils.settings.deepspeed_keys import DeepSpeedConfig
from utils.settings.model_schema import DType, ModelSettings
from utils.settings.values import (
    Count,
    Duration,
    MicroBatches,
    Natural,
    NotNegative,
    Part,
    Positive,
    SettingsTable,
    Share,
    SwappedBlocks,
    UserPath,
    ZeroStage,
)

PLANNED = ("time", "memory")
"""Values of `partition_method` for which the data's sizes have to be known."""


class AdapterSettings(SettingsTable):
    """`[adapter]`: train an adapter instead of the model itself. Without this table: full fine-tuning.

    A kind of adapter is a subclass, with the keys that only this kind has: one file of `utils/adapters/`.
    """

    binds_checkpoint: ClassVar[tuple[str, ...]] = ("type", "include", "exclude")

    type: str
    """Kind of adapter."""
    dropout: Share = 0.0
    """Fraction of an adapter's inputs that is dropped in training."""
    dtype: DType = "float32"
    """Type of the adapter's weights."""
    include: list[str] = []
    """Glob patterns that may match anywhere in a module's name: adapt only modules that match one; empty: all Linears
    of the blocks."""
    exclude: list[str] = []
    """Glob patterns that may match anywhere in a module's name: do not adapt modules that match one."""
    convolutions: bool = False
    """Also adapt the convolutions of a UNet, and its Linears outside of attention (sd15, sdxl)."""
    init_from_existing: UserPath | None = None
    """File or folder of an adapter to continue from; default: start with no effect."""


class OptimizerSettings(SettingsTable):
    """`[optimizer]`: the keys that all optimizers share.

    An optimizer is a subclass, with the keys that only it has, in one of the files of `optimizers/`.
    """

    type: str
    """Algorithm; upper and lower case are alike."""
    lr: Positive
    """Learning rate, after warm-up."""
    weight_decay: NotNegative = 0.01
    """Decay of the weights per step, times the learning rate."""


def as_list(value: Any) -> Any:
    """One thing as a list of one."""
    return value if isinstance(value, list) else [value]


ControlImages = Annotated[
    list[UserPath],
    BeforeValidator(as_list, json_schema_input_type=UserPath | Annotated[list[UserPath], Field(min_length=1)]),
    Field(min_length=1),
]


class EMASettings(SettingsTable):
    """`[ema]`: an exponential moving average of what is trained. Without this table: none."""

    decay: Share = 0.9999
    """Fraction of the average that an update keeps; the weights give the rest."""
    warmup: Literal["none", "ratio", "power"] = "power"
    """How the decay rises to this value after n updates: not at all, as (1 + n) / (10 + n), or as 1 - (1 +
    n)^-power."""
    power: Positive = 2 / 3
    """The power for `warmup = "power"`; with 1 the average is the plain mean until `decay` is reached."""
    update_interval: Count = 1
    """Steps from one update to the next."""
    device: Literal["cpu", "gpu"] = "gpu"
    """Where the averages are kept in float32: in the machine's memory, or on the GPU beside the weights."""
    export: Literal["beside", "instead"] = "beside"
    """Export the averages beside the weights, as `epoch5_ema`, or instead of them, as `epoch5`."""
    evaluate: bool = True
    """Also evaluate the averages, as `name/ema_loss`, which takes the same time again."""
    sample: bool = True
    """Draw samples with the averages instead of the weights."""

    @field_validator("power")
    @classmethod
    def _power_is_used(cls, power: float, read: ValidationInfo) -> float:
        if read.data.get("warmup", "power") != "power":
            raise ValueError(f'is of use with warmup = "power" alone, and that is "{read.data["warmup"]}"')
        return power


# An empty text is no text: files that are copied have them where nothing is meant.
NotEmpty = Annotated[str | None, AfterValidator(lambda text: text or None)]


class MonitoringSettings(SettingsTable):
    """`[monitoring]`: where metrics go, besides the run folder's `metrics.jsonl`."""

    enable_tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    enable_wandb: bool = False
    """Send metrics to Weights & Biases."""
    wandb_api_key: Annotated[NotEmpty, Field(repr=False)] = None
    """Key of the account; default: what `wandb login` or WANDB_API_KEY set. Never written to a run folder."""
    wandb_tracker_name: NotEmpty = None
    """Project that the run is filed under; default: penstock."""
    wandb_run_name: NotEmpty = None
    """Name of the run; default: that of its folder."""


class SamplingSettings(SettingsTable):
    """`[sampling]`: pictures drawn during the run, from fixed prompts and seeds."""

    prompts: list[str] = []
    """Prompts to draw; empty: none."""
    negative_prompt: str = ""
    """Prompt from which guidance leads away, in models that are guided by a second prediction."""
    control_images: list[ControlImages] = []
    """The control image for each prompt, or a list of several for each; a single entry serves all prompts. For models
    that edit pictures (Kontext, Edit), and as the first frame for models that make a clip from it, or as its first and
    its last. Models that follow a clip (VACE) take one. It is cropped to the shape of the sample."""
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
    frames: Count = 1
    """Number of frames: 1 for a picture; a clip is written as mp4."""
    seed: Natural = 0
    """Seed of the initial noise, the same every time."""
    guidance: NotNegative = 3.5
    """Strength of guidance by the prompt."""


def _named(entries: Any) -> Any:
    """Paths of evaluation sets with names of their own."""
    if not isinstance(entries, list):
        return entries
    return [
        {"name": f"eval{number}", "config": entry} if isinstance(entry, str) else entry
        for number, entry in enumerate(entries)
    ]


class EvalDataset(SettingsTable):
    """Data whose loss is measured."""

    name: Annotated[str, Field(min_length=1)]
    """Name in the metrics: `name/loss`."""
    config: UserPath
    """Dataset file, written as for training."""


class Settings(SettingsTable):
    """A run: its own keys, and the tables."""

    binds_checkpoint: ClassVar[tuple[str, ...]] = ("seed",)
    tells_apart: ClassVar[tuple[str, ...]] = ("dataset",)

    output_dir: UserPath
    """Folder in which every run makes its own folder, named by date and time."""
    dataset: UserPath
    """Dataset file of the training data."""
    epochs: Count | None = None
    """Passes over the training data; default: as many as `max_steps` takes, and one without it."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps, if that comes before the end of the last epoch."""
    time_limit: Duration | None = None
    """How long the run may take from its start, as in "3h50m" or in minutes: it stops by itself, with a checkpoint,
    early enough for what is done at the end, and before a step whose evaluation or samples would take too long. Exit
    code 0; `--resume_from_checkpoint` goes on, first with what was due and not done, and has as much time again."""
    hang_timeout: Duration = 20.0
    """How long a step of several processes may come no further, as in "1h" or in minutes; then the run ends with exit
    code 1, and says which process stands where. One that fails or dies ends the others within seconds."""
    micro_batch_size_per_gpu: MicroBatches = 1
    """Samples in one forward pass of one pipeline; or pairs of a resolution and a number, as in [[512, 4], [1024, 1]],
    of which the pair with the nearest resolution is used."""
    image_micro_batch_size_per_gpu: MicroBatches | None = None
    """The same for still pictures, where there are clips too; default: as for clips."""
    pipeline_stages: Count = 1
    """Pieces that the model is cut into, each on a GPU of its own; it divides the number of GPUs."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches of one optimizer step."""
    gradient_clipping: NotNegative = 1.0
    """Largest norm of the gradient of the whole model; 0 for no limit."""
    warmup_steps: Natural = 0
    """Steps in which the learning rate rises to its full value."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or falling to 0 at the last step."""
    force_constant_lr: Positive | None = None
    """Use this learning rate at every step, instead of warm-up, schedule and the checkpoint's value."""
    eval_datasets: Annotated[
        list[EvalDataset], BeforeValidator(_named, json_schema_input_type=list[EvalDataset | str])
    ] = []
    """Data that is evaluated and not trained on: tables of `name` and `config`, or dataset files alone, which are then
    called eval0, eval1 and so on."""
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
    eval_image_micro_batch_size_per_gpu: MicroBatches | None = None
    """The same for still pictures, where there are clips too; default: as for clips."""
    save_every_n_steps: Count | None = None
    """Export weights after every n steps."""
    save_every_n_epochs: Count | None = None
    """Export weights after every n epochs."""
    save_every_n_examples: Count | None = None
    """Export weights after every n training samples."""
    save_dtype: DType | None = None
    """Type of exported weights; default: the type in which they are trained."""
    save_format: Literal["diffusers", "comfyui", "both"] | None = None
    """Layout of exported weights: diffusers', or the single file that ComfyUI loads; default: both, and diffusers' for
    a model whose names in ComfyUI are not known."""
    checkpoint_every_n_steps: Count | None = None
    """Write the state to resume from after every n steps."""
    checkpoint_every_n_epochs: Count | None = None
    """Write the state to resume from after every n epochs."""
    checkpoint_every_n_minutes: Positive | None = None
    """Write the state to resume from after every n minutes; fractions are allowed."""
    keep_checkpoints: Count | None = None
    """Number of newest checkpoints to keep; older ones are removed, except for the one from which the run went on;
    default: keep all."""
    activation_checkpointing: bool | Literal["offload", "unsloth", "auto"] = False
    """Recompute blocks in the backward pass, which takes less memory and about a third more time. With "offload" (also
    called "unsloth") the blocks' inputs, all that is kept of them, wait in the machine's memory, which costs little
    more time where a block computes longer than they travel. With "auto", what the card's memory asks for."""
    activation_checkpointing_every_n_blocks: Count = 1
    """Recompute the first of every n blocks of a stage, and keep the activations of the others: less time and more
    memory the larger n is."""
    compile: bool = False
    """Compile the repeated blocks when they first run (torch.compile), which takes a minute or more and is to make each
    step shorter; needs a C++ compiler."""
    attention: Literal["auto", "sdpa", "flash", "flash3", "xformers"] = "auto"
    """Kernels of the denoiser's attention on a GPU: torch's ("auto" or "sdpa"; cuDNN's where they are right, since they
    are the fastest on an H200), or those of flash-attn, flash-attn 3 or xFormers, except where there is a mask. Only
    models whose attention goes through diffusers' dispatcher can have the latter: Flux, Qwen-Image, Wan, Z-Image."""
    blocks_to_swap: SwappedBlocks = 0
    """Number of blocks of every stage, or a list with a number for each stage, whose weights are kept in the machine's
    memory and copied to the GPU just before use; two blocks' room on the GPU is shared by all of them, so that it saves
    memory from 3 on. Beside an adapter these are the frozen weights. In a full fine-tune they are trained: their
    gradients and the optimizer's state are in the machine's memory too, and the processor does their step. With
    "auto", as many as the card's memory asks for."""
    disable_block_swap_for_eval: bool = False
    """All swapped blocks are on the GPU at once in evaluation and sampling, if there is room, which is faster."""
    zero_stage: ZeroStage = 0
    """What the data ranks of a stage (GPUs / `pipeline_stages`) divide among themselves, where otherwise each keeps all
    of it: 1: the optimizer's state, with float32 masters and moving averages; 2: also the gradients, of which those of
    several micro-batches are then added up in another order. It changes nothing else, and works with any number of
    stages and checkpoints of any other value, but not beside swapped blocks of a full fine-tune."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the machine's memory, and let the processor take the steps: less memory of the GPU,
    and slower steps. Not for optimizers that need a GPU ("adamw8bit"), nor beside swapped blocks of a full fine-tune,
    which do so by themselves."""
    deepspeed_config: DeepSpeedConfig | None = None
    """JSON file with keys of a DeepSpeed configuration, or a table of them (below), beside what follows from the other
    keys. Those that have a key here are refused, and name it."""
    memory_budget_gb: Positive | None = None
    """What "auto" takes as the memory of each GPU, in GiB; default: the smallest of the GPUs that are there."""
    partition_method: Literal["parameters", "time", "memory", "uniform", "manual"] = "parameters"
    """How layers are divided among stages: equal numbers of parameters, of counted operations of a step ("time"), of
    the planned peaks of memory ("memory") or of layers, or by `partition_split`. What is counted is that of the size on
    which the run spends most time, and of the largest size; blocks that are recomputed or swapped count as such."""
    stage_weights: list[Positive] | None = None
    """What each stage takes, relative to the others, where their GPUs differ: [2, 1] for one of 24 GB before one of
    12. Default: all alike. Not for `manual`."""
    partition_split: list[Count] | None = None
    """For `manual`: the first layer of each stage except the first stage, counted from 0."""
    caching_batch_size: Count = 1
    """Number of samples that the VAE and the text encoders take at once when the cache is filled."""
    cache_text_embeddings: bool = True
    """Encode captions once, into the cache; false: encode them when they are needed, with the text encoders on the
    device, so that each epoch may use other versions of them."""
    verify: Literal["stat", "content"] = "stat"
    """How to recognise that a file or cached item is unchanged: by size and time, or by reading all of it.
    With `content`, `--check` also decodes every file, and not only its header."""
    max_failed_fraction: Part = 0.05
    """Fraction of the files that may be broken or incomplete; with more, the run ends before training."""
    steps_per_print: Count = 1
    """Log progress every n steps."""
    regularisation_target: Literal["data", "parent"] = "data"
    """Target for samples of `is_regularisation_data`: the samples themselves, or the predictions of the model without
    the adapter, which takes one more forward pass per step."""
    seed: Natural = 0
    """Seed of everything random: order, noise, timesteps, dropout, initial weights."""
    model: SerializeAsAny[ModelSettings]
    """What is trained."""
    adapter: SerializeAsAny[AdapterSettings] | None = None
    """Train an adapter; without it, the model itself."""
    optimizer: SerializeAsAny[OptimizerSettings]
    """How the weights are updated."""
    ema: EMASettings | None = None
    """Moving average of what is trained."""
    monitoring: MonitoringSettings = MonitoringSettings()
    """Where metrics go."""
    sampling: SamplingSettings = SamplingSettings()
    """Samples drawn during the run."""

    @property
    def cut_is_planned(self) -> bool:
        """Whether the cut waits for the data, and is found with the plan of the run."""
        return self.pipeline_stages > 1 and self.partition_method in PLANNED

    @property
    def recomputed_every(self) -> int:
        """Of every so many blocks of a stage the first is recomputed; 0: none."""
        chosen = self.activation_checkpointing not in (False, "auto")
        return self.activation_checkpointing_every_n_blocks if chosen else 0

    @property
    def offloads(self) -> bool:
        """Whether the inputs of recomputed blocks wait in the host's memory."""
        return self.activation_checkpointing in ("offload", "unsloth")

    @property
    def swaps_trained(self) -> bool:
        """Whether swapped blocks are trained, or may be."""
        return self.swaps and self.adapter is None

    @property
    def swaps(self) -> bool:
        """Whether blocks are swapped, or may be."""
        return any(self.blocks_to_swap) if isinstance(self.blocks_to_swap, list) else bool(self.blocks_to_swap)
