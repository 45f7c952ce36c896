"""The tables of a run that every model has alike: moving averages, monitoring, sampling, evaluation."""

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from utils.settings.values import Count, Natural, NotNegative, Positive, SettingsTable, Share, UserPath

if TYPE_CHECKING:
    from utils.settings.prompt_files import PromptFile


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


SECRETS = ("wandb_api_key", "webhook")
"""Keys of `[monitoring]` that nobody else may read."""


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
    block_norms: bool = False
    """Write the norms of the gradient and of what is trained by block, of the steps of which all numbers are written:
    `block_grad_norm/transformer_blocks.3` and `block_weight_norm/...`."""
    webhook: Annotated[NotEmpty, Field(repr=False)] = None
    """Address, http or https, to which JSON is posted at each evaluation, at the end, and at a failure that ends the
    run: `event`, `run`, `folder`, `time`, and what there is to tell. What the server does not take does not end
    training. Never written to a run folder."""

    @field_validator("webhook")
    @classmethod
    def _is_address(cls, webhook: str | None) -> str | None:
        parts = urlsplit(webhook or "https://none")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError('is no address like "https://example.org/hook"')
        return webhook


class SampleSettings(SettingsTable):
    """A sample with values of its own; what is not given is as `[sampling]` says for all."""

    prompt: str
    """Prompt to draw."""
    negative_prompt: str | None = None
    """Prompt from which guidance leads away."""
    control_images: ControlImages | None = None
    """The control image of this prompt, or a list of several."""
    mask_image: UserPath | None = None
    """The mask of this prompt's first control image."""
    steps: Count | None = None
    """Denoising steps."""
    width: Count | None = None
    """Width, in pixels."""
    height: Count | None = None
    """Height, in pixels."""
    frames: Count | None = None
    """Number of frames."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of this sample's own noise, which is that of the model's stock pipeline for a generator of this seed on the
    processor. Without one, the noise follows from `seed` of `[sampling]` and the sample's place among all."""
    guidance: NotNegative | None = None
    """Strength of guidance by the prompt."""
    adapter_scale: float | None = None
    """Strength of the trained adapter in this sample: 0 draws without it."""


class SamplingSettings(SettingsTable):
    """`[sampling]`: pictures drawn during the run, from fixed prompts and seeds."""

    prompts: list[str] = []
    """Prompts to draw; empty: none, unless `samples` or `prompt_file` has some."""
    samples: list[SampleSettings] = []
    """Further samples, each a `[[sampling.samples]]` with values of its own."""
    prompt_file: UserPath | None = None
    """File with further samples, read again before each time that samples are drawn: a text with a prompt a line, and
    behind it what is its own as in `a red fox --w 512 --h 768 --d 42 --s 28 --g 3.5 --n blurred` (`--f` frames, `--ci`
    control image, `--l` guidance by a second prediction, `--am` strength of the adapter); or `.json` or `.toml`, a list
    of `samples`."""
    negative_prompt: str = ""
    """Prompt from which guidance leads away, in models that are guided by a second prediction."""
    control_images: list[ControlImages] = []
    """The control image for each prompt, or a list of several for each; a single entry serves all prompts. For models
    that edit pictures (Kontext, Edit), and as the first frame for models that make a clip from it, or as its first and
    its last. Models that follow a clip (VACE) take one, and MiniMax-H3 takes several as references. It is cropped to
    the shape of the sample."""
    mask_images: list[UserPath] = []
    """The mask of the first control image for each prompt, a picture or a clip in the shape of that image: white is
    made anew, black is kept; a single entry serves all prompts. For VACE with `mask_means = "made_anew"`; what is made
    anew without something to follow is grey in the control image, as in inference."""
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
    adapter_scale: float = 1.0
    """Strength of the trained adapter in samples: 0 draws without it."""
    clip_path: UserPath | None = None
    """Folder of a CLIP of transformers, with its tokenizer, for `samples/clip_score`: the mean over the samples of 100
    times the cosine between picture and prompt, of which CLIP reads the first 77 tokens."""

    @property
    def asks(self) -> bool:
        """Whether there is something to draw."""
        return bool(self.prompts or self.samples or self.prompt_file)

    @cached_property
    def from_file(self) -> "PromptFile | None":
        """What `prompt_file` says when it is first asked for, so that a run begins with the prompts that were checked.

        Raises:
            UserError: it cannot be read, or something in it is wrong.
        """
        # Files of prompts are read by this table's own classes.
        from utils.settings.prompt_files import read_prompts

        return read_prompts(self.prompt_file) if self.prompt_file else None


EVAL_QUANTILES = [round(0.1 * n, 1) for n in range(1, 10)]


def told_apart(quantiles: list[float]) -> list[float]:
    """Quantiles that have names of their own in the metrics, in order."""
    names = [f"{quantile:.2f}" for quantile in quantiles]
    if len(set(names)) < len(names):
        raise ValueError("has two that are the same in two decimals, by which they are named; keep one of them")
    return sorted(quantiles)


def named_sets(entries: Any) -> Any:
    """Paths of evaluation sets with names of their own."""
    if not isinstance(entries, list):
        return entries
    return [
        {"name": f"eval{number}", "config": entry} if isinstance(entry, str) else entry
        for number, entry in enumerate(entries)
    ]


class EvalDataset(SettingsTable):
    """Data whose loss is measured: that of a file of its own, or a part of the training data."""

    name: Annotated[str, Field(min_length=1)]
    """Name in the metrics: `name/loss`."""
    config: UserPath | None = None
    """Dataset file, written as for training."""
    fraction: Annotated[float | None, Field(gt=0, lt=1)] = None
    """In place of `config`: this fraction of the training set's pictures is held out, and not trained. Which ones
    follows from the content of each file alone, so that it is the same in every run, and stays so when others are
    added. Each is evaluated in one version, and none of its versions is trained."""
