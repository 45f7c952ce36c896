"""Every key a user may write, with its type, its default and what it does.

The documentation and the JSON schemas are generated from the strings under the keys.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny

from utils.settings.adapter_schema import AdapterSettings
from utils.settings.deepspeed_keys import DeepSpeedConfig
from utils.settings.lr_schedules import LrScheduler
from utils.settings.model_schema import DType, ModelSettings
from utils.settings.run_tables import (
    EVAL_QUANTILES,
    EMASettings,
    EvalDataset,
    MonitoringSettings,
    SamplingSettings,
    named_sets,
    told_apart,
)
from utils.settings.values import (
    AttentionKernels,
    ClipBy,
    Count,
    Duration,
    FileName,
    Inner,
    MicroBatches,
    Natural,
    NotNegative,
    Part,
    Pieces,
    PipelineSchedule,
    Positive,
    Recomputed,
    SettingsTable,
    Share,
    Steps,
    SwappedBlocks,
    UserPath,
    ZeroStage,
)

PLANNED = ("time", "memory")
"""Values of `partition_method` for which the data's sizes have to be known."""


class ParameterRule(SettingsTable):
    """`[[optimizer.rules]]`: how some of the trained parameters differ from the others. For each parameter the first
    rule counts that matches it."""

    pattern: Annotated[str, Field(min_length=1)]
    """Glob pattern that may match anywhere in a parameter's name."""
    lr: NotNegative | None = None
    """Their learning rate, after warm-up; default: that of their part, or of all. 0 freezes what a full fine-tune would
    train: after others, a rule with pattern "*" and lr 0 leaves only what they match."""
    weight_decay: NotNegative | None = None
    """Their weight decay; default: that of all."""


class OptimizerSettings(SettingsTable):
    """`[optimizer]`: the keys that all optimizers share.

    An optimizer is a subclass, with the keys that only it has, in one of the files of `optimizers/`.
    """

    type: str
    """Algorithm; upper and lower case are alike."""
    lr: Positive
    """Learning rate, after warm-up."""
    weight_decay: NotNegative = 0.01
    """Decay of the weights per step, times the learning rate. Not for biases, norms, embeddings, tables of positions or
    modulation, and other vectors."""
    rules: list[ParameterRule] = []
    """Parameters with a learning rate or a decay of their own."""
    self_attn_lr: NotNegative | None = None
    """Learning rate of the blocks' self-attention, also of image and text together; as `lr` in a rule after all
    `rules`."""
    cross_attn_lr: NotNegative | None = None
    """The same for their attention to the text, where that is a part of its own."""
    mlp_lr: NotNegative | None = None
    """The same for their feed-forward parts."""
    mod_lr: NotNegative | None = None
    """The same for their modulation by the timestep."""
    gradient_release: bool = False
    """Step each layer within the backward pass, as soon as its gradients are there, and let them go: saves the memory
    of all other gradients. For one micro-batch in a step, without a limit of the whole gradient's norm
    (`gradient_clipping`), and for optimizers that step each parameter by itself. Of a gradient that is not a finite
    number, the step of that layer alone is left out."""

    def arguments(self) -> dict[str, Any]:
        """The keys of the algorithm itself."""
        return self.model_dump(exclude={"type", *GROUP_KEYS})


PART_RATES = ("self_attn_lr", "cross_attn_lr", "mlp_lr", "mod_lr")
"""The keys of `[optimizer]` for the rates of parts of blocks."""
GROUP_KEYS = frozenset(OptimizerSettings.model_fields) - {"type", "lr", "weight_decay"}
"""The keys of `[optimizer]` that are none of the algorithm's."""


class Settings(SettingsTable):
    """A run: its own keys, and the tables."""

    binds_checkpoint: ClassVar[tuple[str, ...]] = ("seed",)
    tells_apart: ClassVar[tuple[str, ...]] = ("dataset",)

    output_dir: UserPath
    """Folder in which every run makes its own folder, named by date and time, and by `run_name`."""
    run_name: FileName | None = None
    """Name of the run: `run_name = "fox"` gives a folder `20260101_12-00-00_fox`, and in it files of weights such as
    `step500/fox-step000500.safetensors` and `step500/fox-step000500_comfyui.safetensors`; default: the folder has date
    and time alone, and the files are called `adapter_model.safetensors` and `adapter_model_comfyui.safetensors`."""
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
    """Stages that the model is cut into, each on a GPU of its own; it divides the number of GPUs."""
    schedule: PipelineSchedule = "1f1b"
    """In which order the stages run micro-batches. "interleaved" gives each of them several pieces of the model, with
    those of the others between: they wait less for one another, most where `gradient_accumulation_steps` is small, send
    as many times as much, and keep somewhat more. What is trained is the same."""
    pieces_per_stage: Pieces = 2
    """How many pieces "interleaved" gives each stage."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches of one optimizer step."""
    gradient_clipping: NotNegative = 1.0
    """How large the gradient of a step may be, as `gradient_clipping_by` says; 0 for no limit."""
    gradient_clipping_by: ClipBy = "norm"
    """What is limited, by scaling it down: the norm of the gradient of the whole model; "layer": that of each of its
    layers, most of which are a block; "value": each number by itself, which changes the gradient's direction."""
    max_nonfinite_steps: Count = 10
    """A step is left out whose loss or gradient is not a finite number, and the files of its samples are told; after so
    many in a row the run ends."""
    warmup_steps: Steps = 0
    """Steps in which the learning rate rises to its full value; below 1 the fraction of all steps, as in 0.05."""
    lr_scheduler: LrScheduler = "constant"
    """Learning rate after warm-up: constant, or falling until the last step of the run; in steps of the optimizer,
    however many GPUs there are. "wsd" is constant and falls at the end alone. Also the dotted path of a schedule of
    torch, or of one with its interface, which begins after warm-up."""
    lr_min_ratio: Share = 0.0
    """Fraction of the learning rate to which a schedule falls at most."""
    lr_num_cycles: Count = 1
    """Times that "cosine_with_restarts" falls."""
    lr_power: Positive = 1.0
    """The power of "polynomial": 1 is "linear"."""
    lr_decay_steps: Steps | None = None
    """Steps at the end in which "wsd" falls; below 1 the fraction of the steps after warm-up."""
    lr_step_size: Count | None = None
    """Steps after which "step" multiplies the learning rate by `lr_gamma`, each time."""
    lr_gamma: Positive | None = None
    """Factor of "step", and of "exponential" at every step, as in 0.999."""
    lr_scheduler_args: dict[str, Any] = {}
    """Arguments of a schedule that is given by its path. The number of steps (`T_max`, `total_steps` or
    `num_training_steps`) is filled in where it is not given."""
    force_constant_lr: Positive | None = None
    """Use this learning rate at every step, instead of warm-up, schedule and the checkpoint's value."""
    eval_datasets: Annotated[
        list[EvalDataset], BeforeValidator(named_sets, json_schema_input_type=list[EvalDataset | str])
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
    eval_patience: Count | None = None
    """End the run, with its exports, after so many evaluations in a row without a new lowest loss of the first entry of
    `eval_datasets`; default: never."""
    eval_quantiles: Annotated[list[Inner], Field(min_length=1), AfterValidator(told_apart)] = EVAL_QUANTILES
    """Where among the noise levels that are trained each sample is evaluated, between 0 and 1; each is a number of its
    own in the metrics, as `name/loss_quantile_0.10`, and costs as much as the others."""
    eval_micro_batch_size_per_gpu: MicroBatches | None = None
    """Samples in one forward pass of evaluation; default: as in training. With the same number, runs of different
    batches are compared to the last digit."""
    eval_image_micro_batch_size_per_gpu: MicroBatches | None = None
    """The same for still pictures, where there are clips too; default: as for clips."""
    save_every_n_steps: Count | None = None
    """Export weights after every n steps."""
    save_every_n_epochs: Count | None = None
    """Export weights after every n epochs."""
    save_every_n_examples: Count | None = None
    """Export weights after every n training samples."""
    save_n_epoch_ratio: Count | None = None
    """Export weights so many times, evenly over the `epochs`: in place of `save_every_n_epochs`, which it sets to
    epochs / n, rounded down."""
    keep_exports: Count | None = None
    """Number of newest exports to keep; older ones of the run are removed after each new one, and told. One with a name
    that was given by hand stays, as do all of other runs. Default: keep all."""
    file_name: FileName | None = None
    """Name of an adapter's file, without its ending: `{name}` stands for `run_name`, `{at}` for the step or epoch of
    the export; default: "{name}-{at}" with `run_name`, else "adapter_model". The parts of a full fine-tune's diffusers
    folder are called as diffusers finds them."""
    file_name_comfyui: FileName | None = None
    """The same of the file for ComfyUI, of a full fine-tune too; default: "{name}-{at}_comfyui" with `run_name`, else
    "adapter_model_comfyui", or "model_comfyui" of a full fine-tune."""
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
    activation_checkpointing: Recomputed = False
    """Recompute blocks in the backward pass, which takes less memory and about a third more time. With "offload" (also
    called "unsloth") the blocks' inputs, all that is kept of them, wait in the machine's memory, which costs little
    more time where a block computes longer than they travel. With "auto", what the card's memory asks for."""
    activation_checkpointing_every_n_blocks: Count = 1
    """Recompute the first of every n blocks of a stage, and keep the activations of the others: less time and more
    memory the larger n is."""
    compile: bool = False
    """Compile the repeated blocks when they first run (torch.compile), which takes a minute or more and is to make each
    step shorter; needs a C compiler, and on a processor one of C++."""
    attention: AttentionKernels = "auto"
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
    several micro-batches are then added up in another order; 3: also the weights of the repeated blocks, the frozen
    ones of an adapter's base or those that a full fine-tune trains, of which all ranks gather a block ahead of its
    use. It changes nothing else, and works with checkpoints of any other value. 1 and 2 work with any number of stages,
    but 2 not beside swapped blocks of a full fine-tune. 3 is for `pipeline_stages = 1`; its parts of swapped blocks are
    in the machine's memory."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the machine's memory, and let the processor take the steps: less memory of the GPU,
    and slower steps. Not for optimizers that need a GPU ("adamw8bit"). Swapped blocks of a full fine-tune do so by
    themselves; beside them it is for what is not swapped."""
    deepspeed_config: DeepSpeedConfig | None = None
    """JSON file with keys of a DeepSpeed configuration, or a table of them (below), beside what follows from the other
    keys. Those that have a key here are refused, and name it."""
    memory_budget_gb: Positive | None = None
    """What "auto" takes as the memory of each GPU, in GiB, and by which the plan warns of caching, training, evaluation
    or samples that are larger; default: the smallest of the GPUs that are there."""
    partition_method: Literal["parameters", "time", "memory", "uniform", "manual"] = "parameters"
    """How layers are divided among stages, or among their pieces: equal numbers of parameters, of counted operations of
    a step ("time"), of the planned peaks of memory ("memory") or of layers, or by `partition_split`. What is counted is
    that of the size on which the run spends most time, and of the largest size; blocks that are recomputed or swapped
    count as such."""
    stage_weights: list[Positive] | None = None
    """What each stage takes, relative to the others, where their GPUs differ: [2, 1] for one of 24 GB before one of
    12. Default: all alike. Not for `manual`."""
    partition_split: list[Count] | None = None
    """For `manual`: the first layer of each stage, or of each piece, except the first, counted from 0."""
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
    def pieces(self) -> int:
        """Of the model, that each stage has."""
        return self.pieces_per_stage if self.schedule == "interleaved" else 1

    @property
    def cut_is_planned(self) -> bool:
        """Whether the cut waits for the data, and is found with the plan of the run."""
        return self.pipeline_stages > 1 and self.partition_method in PLANNED

    @property
    def export_epochs(self) -> int | None:
        """After how many epochs weights are exported; None for never."""
        if self.save_n_epoch_ratio and self.epochs:
            return max(1, self.epochs // self.save_n_epoch_ratio)
        return self.save_every_n_epochs

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
    def divides_weights(self) -> bool:
        """Whether data ranks, if there are several, divide the weights of blocks."""
        return self.zero_stage == 3

    @property
    def swaps_trained(self) -> bool:
        """Whether swapped blocks are trained, or may be."""
        return self.swaps and self.adapter is None

    @property
    def swaps(self) -> bool:
        """Whether blocks are swapped, or may be."""
        return any(self.blocks_to_swap) if isinstance(self.blocks_to_swap, list) else bool(self.blocks_to_swap)
