"""The keys of `[model]` that all models share; a model's own are a subclass beside it.

The documentation and the JSON schemas are generated from the strings under the keys.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from utils.settings.values import (
    LossType,
    Natural,
    NotNegative,
    Part,
    Positive,
    SettingsTable,
    TimestepMethod,
    UserPath,
    WeightingScheme,
)

DType = Literal["float32", "float16", "bfloat16"]
QuantisedType = Literal["float8", "float8_e4m3fn", "float8_e5m2", "int8", "nf4", "int4"]
KeptType = Literal[DType, QuantisedType]


def torch_dtype(name: DType) -> Any:
    """The `torch.dtype` called `name`."""
    # torch takes seconds to import, and a typo in a file should be told at once.
    import torch

    return getattr(torch, name)


class TextEncoderFile(SettingsTable):
    """One text encoder to read from a file or folder of its own."""

    type: str
    """Which of the model's text encoders this is, by the name that the model gives it."""
    path: UserPath
    """File or folder of the weights; for T5 and UMT5 it may be a .gguf file."""


class PresetAdapter(SettingsTable):
    """`[[model.preset_adapters]]`: an adapter that the model has before training begins."""

    path: UserPath
    """File or folder of the adapter, of any kind and in any layout that `init_from_existing` reads."""
    weight: float = 1.0
    """Strength of the adapter."""
    fused: bool = True
    """Add it to the base weights when they are read; false: apply it beside them, which leaves the weights unchanged
    and takes a little time."""


class ModelSettings(SettingsTable):
    """`[model]`: the keys that all models share.

    The options of a model are a subclass, with the keys that only this model has.
    """

    binds_checkpoint: ClassVar[tuple[str, ...]] = ("type", "preset_adapters", "rescale_betas_zero_snr", "train")
    tells_apart: ClassVar[tuple[str, ...]] = ("diffusers_path", "architecture", "transformer_path", "from_scratch")

    type: str
    """Name of the model: a file name under `models/`, without `.py`."""
    dtype: DType = "bfloat16"
    """Type of the weights and of the computation, unless another key says otherwise."""
    diffusers_path: UserPath | None = None
    """Folder in diffusers' layout, from which all parts without a path of their own are read. Without it
    `transformer_path`, `vae_path` and `text_encoders` name single files, for types that are in `configs/`."""
    architecture: str | None = None
    """Which of the models of this type single files are without a folder, by the name of its file in `configs/<type>/`;
    default: the one whose tensors the files have, if it is one alone."""
    tokenizer_path: UserPath | None = None
    """Folder with the tokenizers for single files, each in a folder that is called as in diffusers' layout, or as its
    text encoder in `text_encoders`; the only one may lie there itself. Default: what lies beside the text encoders'
    files, or in them."""
    transformer_path: UserPath | None = None
    """File or folder of the denoiser's weights (transformer or UNet); default: from `diffusers_path`. A .gguf file is
    decoded as it is read, and kept as `transformer_dtype` says."""
    transformer_dtype: KeptType | None = None
    """Type in which the denoiser's weights are kept; default: `dtype`. The last six are for adapters, and for the
    Linears of the repeated blocks alone, all else stays in `dtype`: 8 bits with a scale for each row, where "float8"
    means float8_e4m3fn and int8 is closest to the weights; or 4 bits, with a scale for 64 numbers: nf4 of bitsandbytes,
    or int4, which needs no library, is 3% smaller, and is closer to most weights and farther from those with a few
    large ones among many small."""
    vae_path: UserPath | None = None
    """File or folder of the VAE's weights; default: from `diffusers_path`."""
    latents: Literal["sample", "mode", "distribution"] = "sample"
    """What is cached of the VAE's distribution: a sample, its mode, or the whole distribution, from which each epoch
    draws another sample."""
    text_encoder_dtype: KeptType | None = None
    """Type in which text encoders are kept while captions are encoded; default: `dtype`. The first three are also the
    type of the computation and of the cached features. The last six are those of `transformer_dtype`, for the Linears
    of the encoders' repeated blocks, which are quantised one by one as they are read; all else stays in `dtype`. So
    T5-XXL and encoders of 8 billion parameters fit a GPU of 12 GB. Each type has features of its own in the cache. Not
    for text encoders that are trained."""
    text_encoders: list[TextEncoderFile] = []
    """Text encoders read from elsewhere; those not listed come from `diffusers_path`."""
    preset_adapters: list[PresetAdapter] = []
    """Adapters that are a part of what is trained on: an adapter that is trained learns the difference to them, and
    works on top of them. They are no part of its export; fused ones are part of that of a full fine-tune."""
    train: list[Annotated[str, Field(min_length=1)]] = []
    """What is trained in full: names of parts ("denoiser", or a part as a diffusers folder calls it, where several are
    loaded to be trained), and glob patterns that may match anywhere in a parameter's name. Without an adapter all else
    stays as it is. Beside an adapter these have no factors of it, and its exports have them too. Default: all that is
    loaded to be trained; beside an adapter nothing."""
    verify_files: Literal["never", "once", "always"] = "never"
    """Read the data of the files that a run begins with, and refuse damaged ones: with another SHA-256 than a download
    from Hugging Face has noted, with other data than when they were read last, or with values that are no numbers.
    "once": files whose size and time of change are known are not read again. A gigabyte
    takes one or two seconds; four with a noted SHA-256, on processors without instructions for it."""
    from_scratch: bool = False
    """Start the denoiser from random weights: only its configuration is read."""
    timestep_sample_method: TimestepMethod = "logit_normal"
    """Distribution of training timesteps t, where 0 is the clean picture and 1 is noise. "sigmoid" means logit_normal,
    "sigma" uniform, "logsnr" log_snr."""
    sigmoid_scale: Positive = 1.0
    """Standard deviation of the normal number of `logit_normal` and `log_snr`."""
    logit_mean: float = 0.0
    """Mean of the normal number of `logit_normal` and `log_snr`."""
    mode_scale: Annotated[float, Field(ge=-1, le=1.7519)] = 1.29
    """Scale of `mode`: above 0 the middle timesteps are drawn more often, below 0 the ends."""
    beta_alpha: Positive = 2.0
    """First parameter of `beta`; values above 1 avoid clean pictures."""
    beta_beta: Positive = 2.0
    """Second parameter of `beta`; values above 1 avoid noise."""
    shift: Positive | None = None
    """Moves timesteps towards noise: t becomes s*t / (1 + (s-1)*t); default: no shift."""
    flux_shift: bool = False
    """Shift by the size of the picture, as Flux does; a clip is as large as one frame of it. Excludes `shift`."""
    min_t: Part = 0.0
    """Lowest timestep that is trained, after the shift."""
    max_t: Part = 1.0
    """Highest timestep that is trained, after the shift."""
    stratified_timesteps: Literal["none", "batch", "epoch"] = "none"
    """Draw each timestep from its own part of the distribution, among the samples of a step or of an epoch, so that a
    few draws cover all noise levels."""
    weighting_scheme: WeightingScheme = "none"
    """Weight of the loss by timestep for flow matching: sigma_sqrt is 1/t^2, cosmap 2 / (pi * (1 - 2*t + 2*t^2))."""
    min_snr_gamma: Positive | None = None
    """Weigh by min(SNR, gamma) / SNR, for v-prediction / (SNR + 1); models with DDPM's steps only. The paper has 5."""
    soft_min_snr_gamma: Positive | None = None
    """The same with SNR*gamma / (SNR + gamma) for the minimum; excludes `min_snr_gamma`."""
    debiased_estimation_loss: bool = False
    """Weigh by 1 / sqrt(SNR), for v-prediction 1 / (SNR + 1); models with DDPM's steps only."""
    scale_v_pred_loss_like_noise_pred: bool = False
    """Weigh the loss of v-prediction by SNR / (SNR + 1), which makes it that of noise prediction."""
    v_pred_like_loss: NotNegative = 0.0
    """Add this many times a loss like that of v-prediction to the loss of noise prediction."""
    rescale_betas_zero_snr: bool = False
    """Leave nothing of the picture at the last step; v-prediction only."""
    noise_offset: NotNegative = 0.0
    """Standard deviation of a random number that is added to the noise of a whole channel, for very dark and very
    bright pictures; excludes `multires_noise_iterations`."""
    adaptive_noise_scale: float = 0.0
    """Adds this many times the mean of the sample's channel to `noise_offset`."""
    multires_noise_iterations: Natural = 0
    """Levels of coarser noise that are added to the noise; 0 for plain noise, 6 to 10 are usual."""
    multires_noise_discount: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Factor from each of these levels to the next."""
    ip_noise_gamma: NotNegative = 0.0
    """Strength of additional noise that the model sees but does not have to predict; 0.1 in the paper."""
    loss_type: LossType = "mse"
    """Distance of prediction and target. What other trainers call "huber" is `pseudo_huber`, which has the scale of
    mse; "l2" means mse, "l1" mae."""
    huber_c: Positive = 0.1
    """Width within which huber, smooth_l1 and pseudo_huber are quadratic, at noise."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How that width follows the timestep: `huber_c` everywhere, or from 1 at clean pictures to `huber_c` at noise, as
    c^t or by the signal-to-noise ratio."""
    huber_scale: Positive = 1.0
    """Factor on that width."""
    folded_guidance: Annotated[float, Field(gt=1)] | None = None
    """Train the model to predict directly what guidance of this strength makes of two predictions: the target moves
    this many times as far away from the model's own prediction for the empty caption. For models that are distilled to
    need no second prediction, which plain training undoes; takes one more forward pass per step. Evaluation compares
    with the data."""

    def binding(self) -> dict[str, Any]:
        # Not where an adapter lies, nor whether it is fused: that changes nothing of what the weights mean.
        presets = [[preset.path.name, preset.weight] for preset in self.preset_adapters]
        return {**super().binding(), "preset_adapters": presets}

    def as_given(self) -> Self:
        """Without the folder that was made for single files, so that they can be given again."""
        return self.model_copy(update={"diffusers_path": None}) if self.architecture else self
