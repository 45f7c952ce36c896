"""diffusion-pipe's keys, types and flags: what each means here. Our users come from it with their configs.

A key of its that is in none of these tables has the same name here; `SAME` lists those, for the page that is made from
all of them, and `OTHERWISE` says where the same name does not mean the same.
"""

from collections.abc import Mapping
from typing import Any

from utils.settings.foreign import Foreign, ForeignType, Keys, leave_out, read_as, write

_LLM_ADAPTER = "one of the `rules` of `[optimizer]`, as in `rules = [{ pattern = 'text_conditioner', lr = 1e-5 }]`"


def _text_encoder(name: str, others: str = "") -> Foreign:
    example = f"text_encoders = [{{ type = '{name}', path = '...' }}]"
    return write(f"an entry of `text_encoders`, as in `{example}`{others}")


def _kept_text_encoders(form: str) -> Foreign:
    return Foreign(
        f"write instead: `text_encoder_dtype = '{form}'`",
        lambda value: {"text_encoder_dtype": form},
        harmless=lambda value: value is False,
        why_harmless="text encoders have the type `dtype` anyway",
    )


def _presets(paths: Any) -> Any:
    """Paths as entries of `preset_adapters`; entries as they are."""
    if not isinstance(paths, list):
        return paths
    return [{"path": entry} if isinstance(entry, str) else entry for entry in paths]


def _v_prediction(wanted: Any) -> Keys:
    # There, v-prediction always comes with noise that ends without a rest of the picture.
    return {"prediction_type": "v_prediction", "rescale_betas_zero_snr": wanted}


_RUN: Mapping[str, Foreign] = {
    "eval_gradient_accumulation_steps": leave_out("evaluation has a loss for each sample, of every sample, once"),
    "image_eval_micro_batch_size_per_gpu": read_as("eval_image_micro_batch_size_per_gpu"),
    "huber_delta": write(
        "`loss_type = 'huber'`, `huber_c` with this value and `huber_schedule = 'constant'`, in `[model]`"
    ),
    "logging_steps": leave_out("metrics have every step; `steps_per_print` is for the log"),
    "map_num_proc": leave_out("files are read by several threads, and encoded by each GPU"),
    "max_checkpoints": write(
        "`keep_checkpoints`, of the state to resume from; exports are all kept", unless=(0,), since="all are kept"
    ),
    "pseudo_huber_c": write(
        "`loss_type = 'pseudo_huber'`, `huber_c` with this value and `huber_schedule = 'constant'`, in `[model]`"
    ),
    "reentrant_activation_checkpointing": leave_out("recomputing works with any number of stages without it"),
    "regenerate_cache": write("--regenerate_cache on the command line", unless=(False,)),
    "resume_from_checkpoint": write("--resume_from_checkpoint on the command line", unless=(False,)),
    "smooth_l1_beta": write(
        "`loss_type = 'smooth_l1'`, `huber_c` with this value and `huber_schedule = 'constant'`, in `[model]`"
    ),
    "uncond_fraction": write("`uncond_fraction` in the dataset file", unless=(0, 0.0)),
    "video_clip_mode": write(
        "`video_clip_mode` in the dataset file", unless=("single_beginning",), since="it is the dataset file's default"
    ),
    "x_axis_examples": leave_out("metrics are filed by step", only=(False,)),
}
_MODEL: Mapping[str, Foreign] = {
    "audio_vae": leave_out("sound is neither read nor made"),
    "byt5_path": _text_encoder("byt5"),
    "cache_text_embeddings": write("`cache_text_embeddings` above all tables", unless=(True,), since="it is so anyway"),
    "cfg": write("`folded_guidance`", unless=(1, 1.0)),
    "checkpoint_path": read_as("transformer_path"),
    "ckpt_path": write(
        "`diffusers_path`, the folder in diffusers' layout (its name on the hub ends with -Diffusers where there are "
        "both), and `transformer_path` for a single file with the publisher's weights"
    ),
    "clip_path": _text_encoder("clip"),
    "cross_attn_lr": write("`cross_attn_lr`, in `[optimizer]`"),
    "first_frame_conditioning_p": Foreign(
        "write instead: `first_frame_share`, of LTX-Video and LTX-2, or `from_first_frame`, of Wan's TI2V-5B",
        lambda value: {"first_frame_share": value},
        harmless=lambda value: value == 0,
        why_harmless="it changes nothing with this value",
    ),
    "freeze_llm_adapter": write(
        f"{_LLM_ADAPTER}, whose `lr = 0` freezes it; with an adapter an entry of `exclude`", unless=(False,)
    ),
    "image_shift": write("`shift`, which is that of pictures and clips alike"),
    "llm_adapter_lr": write(_LLM_ADAPTER),
    "llm_path": _text_encoder("umt5", " for Wan; gemma2 is Lumina's"),
    "load_to_cuda": leave_out("a process reads the weights of its own stage alone"),
    "lumina_shift": read_as("flux_shift"),
    "max_llama3_sequence_length": write(
        "`max_sequence_length`, the tokens of T5 and of Llama", unless=(128,), since="it is so anyway"
    ),
    "merge_adapters": read_as("preset_adapters", _presets),
    "fuse_adapters": read_as("preset_adapters", _presets),
    "mlp_lr": write("`mlp_lr`, in `[optimizer]`"),
    "mod_lr": write("`mod_lr`, in `[optimizer]`"),
    "qwen_path": _text_encoder("qwen3"),
    "self_attn_lr": write("`self_attn_lr`, in `[optimizer]`"),
    "single_file_path": read_as("transformer_path"),
    "t5_path": _text_encoder("t5"),
    "text_encoder_fp8": _kept_text_encoders("float8"),
    "text_encoder_nf4": _kept_text_encoders("nf4"),
    "text_encoder_path": _text_encoder("qwen2_5_vl"),
    "v_pred": Foreign(
        "write instead: `prediction_type = 'v_prediction'` and `rescale_betas_zero_snr`",
        _v_prediction,
        harmless=lambda value: value is False,
        why_harmless="the noise is predicted, unless the folder's scheduler says otherwise",
    ),
}
_ADAPTER: Mapping[str, Foreign] = {
    "decompose_factor": Foreign(
        "write instead: `factor`",
        lambda value: {"factor": value},
        harmless=lambda value: value == -1,
        why_harmless="the sides are as alike as can be without `factor` too",
    ),
    "exclude_modules": write("`exclude`, with glob patterns that may match anywhere in a module's name"),
    "fuse_adapters": write("`preset_adapters`, in `[model]`"),
}
_OPTIMIZER: Mapping[str, Foreign] = {
    "beta2_half_life": write(
        "`betas`, of which the second is 0.5^(samples of a step / half-life); this key is one of "
        'type = "adamw", "adamw8bitkahan" and "genericoptim"'
    ),
    "stabilize": leave_out(
        'type = "stableadamw", "adamw8bitkahan" and "genericoptim" limit an update by its size', only=(False,)
    ),
}
_DATASET: Mapping[str, Foreign] = {
    "online_captions": write("`cache_text_embeddings = false`, in the run's file", unless=(False,)),
    "shuffle_tags": Foreign(
        "write instead: `cache_shuffle_num`, how many orders of the tags are cached",
        lambda value: {"cache_shuffle_num": int(value) if isinstance(value, bool) else value},
        harmless=lambda value: value is False,
        why_harmless="tags stay as they are written",
    ),
    "skip_empty_caption": Foreign(
        "leave it out: files without a caption are left out and told; an empty caption file trains without one",
        harmless=lambda value: value is True,
        why_harmless="files without a caption are left out and told",
    ),
    "subsample_ratio": write(
        "`num_repeats`, the part of the samples that an epoch uses; an evaluation set needs a folder of its own",
        unless=(1, 1.0),
    ),
}

FOREIGN: Mapping[str, Mapping[str, Foreign]] = {
    "run": _RUN,
    "model": _MODEL,
    "adapter": _ADAPTER,
    "optimizer": _OPTIMIZER,
    "dataset": _DATASET,
    "directory": {**_DATASET, "control_paths": read_as("control_path")},
}
"""By table, and by name there."""

TYPES: Mapping[str, Mapping[str, ForeignType]] = {
    "optimizer": {
        "offload": ForeignType("", "take `adamw`, and `offload_optimizer = true` above all tables"),
    },
}
"""By table, and by `type` in small letters."""

FLAGS: Mapping[str, Foreign] = {
    "deepspeed": leave_out("DeepSpeed is always used"),
    "deepspeed_config": Foreign("write instead: `deepspeed_config` in the config"),
    "i_know_what_i_am_doing": leave_out("there is no check that it would skip"),
    "test_sample": Foreign("write instead: `sample_before_first_step = true` and `prompts`, in `[sampling]`"),
}
"""Of its command line; those of the same name, `SAME_FLAGS`, do the same, but for what is said of them there."""

SAME: Mapping[str, tuple[str, ...]] = {
    "run": (
        "output_dir",
        "dataset",
        "eval_datasets",
        "epochs",
        "max_steps",
        "micro_batch_size_per_gpu",
        "image_micro_batch_size_per_gpu",
        "pipeline_stages",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "warmup_steps",
        "force_constant_lr",
        "lr_scheduler",
        "blocks_to_swap",
        "disable_block_swap_for_eval",
        "eval_every_n_epochs",
        "eval_every_n_steps",
        "eval_every_n_examples",
        "eval_before_first_step",
        "eval_micro_batch_size_per_gpu",
        "eval_image_micro_batch_size_per_gpu",
        "save_every_n_epochs",
        "save_every_n_steps",
        "save_every_n_examples",
        "checkpoint_every_n_epochs",
        "checkpoint_every_n_minutes",
        "activation_checkpointing",
        "partition_method",
        "partition_split",
        "save_dtype",
        "caching_batch_size",
        "compile",
        "steps_per_print",
    ),
    "model": (
        "type",
        "diffusers_path",
        "transformer_path",
        "diffusion_model",
        "vae_path",
        "vae",
        "text_encoders",
        "dtype",
        "transformer_dtype",
        "diffusion_model_dtype",
        "timestep_sample_method",
        "sigmoid_scale",
        "shift",
        "flux_shift",
        "min_t",
        "max_t",
        "guidance",
        "bypass_guidance_embedding",
        "max_sequence_length",
        "llama3_path",
        "llama3_4bit",
        "min_snr_gamma",
        "debiased_estimation_loss",
        "unet_lr",
        "text_encoder_1_lr",
        "text_encoder_2_lr",
    ),
    "adapter": ("type", "rank", "alpha", "dropout", "dtype", "init_from_existing"),
    "optimizer": ("type", "lr", "betas", "weight_decay", "eps", "momentum", "gradient_release"),
    "monitoring": ("enable_wandb", "wandb_api_key", "wandb_tracker_name", "wandb_run_name"),
    "dataset": (
        "resolutions",
        "enable_ar_bucket",
        "min_ar",
        "max_ar",
        "num_ar_buckets",
        "ar_buckets",
        "size_buckets",
        "frame_buckets",
        "cache_shuffle_num",
        "cache_shuffle_delimiter",
        "caption_prefix",
        "num_repeats",
        "directory",
    ),
    "directory": ("path", "mask_path", "control_path", "default_mask_file"),
}
"""By table: what has the same name here."""
SAME_FLAGS: Mapping[str, str] = {
    "config": "",
    "local_rank": "",
    "resume_from_checkpoint": "without a name it takes the newest run of the same dataset, model, adapter and seed; "
    "there the newest of the folder",
    "reset_dataloader": "",
    "reset_optimizer": "",
    "reset_optimizer_params": "",
    "regenerate_cache": "",
    "cache_only": "",
    "trust_cache": "",
    "master_port": "",
    "dump_dataset": "",
}
