"""Keys of kohya's scripts, musubi-tuner, SimpleTuner, OneTrainer and DiffSynth-Studio, and what to write here instead.

They stand in tables that these trainers do not divide as we do, so a key is known wherever it is written.
"""

from collections.abc import Mapping

from utils.settings.foreign import Foreign, leave_out, write

_TRAINED = "`dtype`, the type of the weights that are trained, in `[adapter]`, or in `[model]` without one"
_TEXT_ENCODER = "an entry of `text_encoders`, in `[model]`, as in `text_encoders = [{{ type = '{}', path = '...' }}]`"
_FP8_TEXT = "`text_encoder_dtype`, in `[model]`, as in `text_encoder_dtype = 'float8'`, for all text encoders"
_NO_FLAG = "the default is the fastest that is right on this machine; `attention` names others"
_LOADER = "data is read ahead by a thread, from the cache"

# Name elsewhere -> what to write in its place, in a dataset file.
_OF_DATASETS: Mapping[str, str] = {
    "general": "its keys at the top of the dataset file",
    "subsets": "a `[[directory]]` for each",
    "instance_data_dir": "`path`, in a `[[directory]]`",
    "folder_path": "`path`, in a `[[directory]]`",
    "image_directory": "`path`, in a `[[directory]]`",
    "video_directory": "`path`, in a `[[directory]]`",
    "dataset_base_path": "`path`, in a `[[directory]]`",
    "metadata_file": "`path`, which may be a table, in a `[[directory]]`",
    "image_jsonl_file": "`path`, which may be a table, in a `[[directory]]`",
    "video_jsonl_file": "`path`, which may be a table, in a `[[directory]]`",
    "dataset_metadata_path": "`path`, which may be a table, in a `[[directory]]`",
    "control_directory": "`control_path`, in a `[[directory]]`",
    "cache_directory": "`cache_dir`, at the top of the dataset file",
    "cache_dir_vae": "`cache_dir`, at the top of the dataset file",
    "dataset_repeat": "`num_repeats`",
    "prior_loss_weight": "`loss_weight`, in the `[[directory]]` of the regularisation data",
    "resolution": "`resolutions`, as in `resolutions = [512]`",
    "max_pixels": "`resolutions`, whose sides stand for the area of a square",
    "minimum_image_size": "`min_resolution`",
    "maximum_image_size": "`max_resolution`",
    "enable_bucket": "`enable_ar_bucket`",
    "min_bucket_reso": "`min_ar`, the narrowest shape as width / height",
    "max_bucket_reso": "`max_ar`, the widest shape as width / height",
    "bucket_no_upscale": "`no_upscale`",
    "random_crop": '`crop = "random"`',
    "center_crop": '`crop = "center"`',
    "crop_style": "`crop`",
    "flip_aug": "`flip`, with `augment_variants`",
    "color_aug": "`color_jitter`, with `augment_variants`",
    "target_frames": "`frame_buckets`",
    "num_frames": "`frame_buckets`",
    "frame_extraction": "`video_clip_mode`",
    "fps": "`framerate`",
    "class_tokens": "`instance_prompt`",
    "default_caption": "`instance_prompt`",
    "caption_strategy": "`caption_source`",
    "caption_ext": "`caption_extension`",
    "shuffle_caption": "`cache_shuffle_num`, how many versions are cached, as in `cache_shuffle_num = 8`",
    "shuffle_tokens": "`cache_shuffle_num`, how many versions are cached, as in `cache_shuffle_num = 8`",
    "caption_separator": "`cache_shuffle_delimiter`",
    "caption_tag_dropout_rate": "`tag_dropout`",
    "caption_dropout_probability": "`uncond_fraction`",
    "caption_dropout_every_n_epochs": "`uncond_every_n_epochs`",
    "weighted_captions": "`weighted_tags`",
    "masked_loss": "`mask_path` or `alpha_mask`",
    "mask_min_value": "`unmasked_weight`",
    "validation_split": "`eval_datasets`, in the run's file",
}
# Name elsewhere -> what to write in its place, in a run's file unless it says something else.
_OF_RUNS: Mapping[str, str] = {
    "dataset_config": "`dataset`",
    "data_backend_config": "`dataset`",
    "train_data_dir": "`path`, in a `[[directory]]` of the dataset file that `dataset` names",
    "reg_data_dir": "a `[[directory]]` with `is_regularisation_data`, in the dataset file",
    "output_path": "`output_dir`",
    "output_name": "`output_dir`: each run has a folder of its own there",
    "train_batch_size": "`micro_batch_size_per_gpu`",
    "batch_size": "`micro_batch_size_per_gpu`, in the run's file",
    "vae_batch_size": "`caching_batch_size`",
    "max_train_steps": "`max_steps`",
    "max_train_epochs": "`epochs`",
    "num_train_epochs": "`epochs`",
    "num_epochs": "`epochs`",
    "gradient_checkpointing": "`activation_checkpointing`",
    "use_gradient_checkpointing": "`activation_checkpointing`",
    "max_grad_norm": "`gradient_clipping`",
    "lr_warmup_steps": "`warmup_steps`",
    "max_token_length": "max_sequence_length, in `[model]`",
    "tokenizer_max_length": "max_sequence_length, in `[model]`",
    "learning_rate": "`lr`, in `[optimizer]`",
    "unet_lr": "`lr`, in `[optimizer]`",
    "optimizer_type": "`type`, in `[optimizer]`",
    "optimizer_args": "its keys in `[optimizer]`",
    "pretrained_model_name_or_path": "`diffusers_path`, or `transformer_path` for a single file, in `[model]`",
    "model_type": "`type`, in `[model]`",
    "model_family": "`type`, in `[model]`",
    "mixed_precision": "`dtype`, in `[model]`",
    "timestep_sampling": "`timestep_sample_method`, in `[model]`",
    "logit_std": "`sigmoid_scale`, in `[model]`",
    "min_timestep": "`min_t`, from 0 to 1, in `[model]`",
    "max_timestep": "`max_t`, from 0 to 1, in `[model]`",
    "num_timestep_buckets": '`stratified_timesteps = "epoch"`, in `[model]`',
    "snr_gamma": "`min_snr_gamma`, in `[model]`",
    "zero_terminal_snr": "`rescale_betas_zero_snr`, in `[model]`",
    "input_perturbation": "`ip_noise_gamma`, in `[model]`",
    "discrete_flow_shift": "`shift`, in `[model]`",
    "flow_schedule_shift": "`shift`, in `[model]`",
    "flow_schedule_auto_shift": "`flux_shift`, in `[model]`",
    "network_module": "`type`, in `[adapter]`",
    "network_dim": "`rank`, in `[adapter]`",
    "lora_rank": "`rank`, in `[adapter]`",
    "network_alpha": "`alpha`, in `[adapter]`",
    "lora_alpha": "`alpha`, in `[adapter]`",
    "network_dropout": "`dropout`, in `[adapter]`",
    "network_weights": "`init_from_existing`, in `[adapter]`",
    "lora_checkpoint": "`init_from_existing`, in `[adapter]`",
    "lora_target_modules": "`include`, in `[adapter]`",
    "save_precision": "`save_dtype`",
    "save_steps": "`save_every_n_steps`",
    "save_state": "`checkpoint_every_n_epochs`",
    "checkpointing_steps": "`checkpoint_every_n_steps`",
    "checkpoint_step_interval": "`checkpoint_every_n_steps`",
    "resume": "--resume_from_checkpoint on the command line",
    "resume_from_checkpoint": "--resume_from_checkpoint on the command line",
    "cache_text_encoder_outputs": "`cache_text_embeddings`",
    "log_with": "`enable_tensorboard` or `enable_wandb`, in `[monitoring]`",
    "report_to": "`enable_tensorboard` or `enable_wandb`, in `[monitoring]`",
    "log_tracker_name": "`wandb_tracker_name`, in `[monitoring]`",
    "sample_prompts": "`prompts`, in `[sampling]`",
    "validation_prompt": "`prompts`, in `[sampling]`",
    "validation_step_interval": "`sample_every_n_steps`, in `[sampling]`",
    "validation_num_inference_steps": "`steps`, in `[sampling]`",
    "validation_guidance": "`guidance`, in `[sampling]`",
    "validation_seed": "`seed`, in `[sampling]`",
    # Of kohya's scripts and musubi-tuner.
    "ae": "`vae_path`, in `[model]`",
    "base_weights": "`preset_adapters`, in `[model]`",
    "base_weights_multiplier": "the weight of each of the `preset_adapters`, in `[model]`",
    "clip_g": _TEXT_ENCODER.format("clip_g"),
    "clip_l": _TEXT_ENCODER.format("clip_l"),
    "algo": "`type`, in `[adapter]`; BOFT is `type = 'oft'` with `butterfly = true`",
    "dora_wd": "`dora = true`, in `[adapter]`, for `type = 'lora'`",
    "weight_decompose": "`dora = true`, in `[adapter]`, for `type = 'lora'`",
    "use_dora": "`dora = true`, in `[adapter]`, for `type = 'lora'`",
    "use_rslora": "`rslora = true`, in `[adapter]`, for `type = 'lora'`",
    "rs_lora": "`rslora = true`, in `[adapter]`, for `type = 'lora'`",
    "init_lora_weights": "`init`, in `[adapter]`, as in `init = 'pissa'`",
    "use_tucker": "`tucker = true`, in `[adapter]`, for `type = 'loha'` and `'lokr'`",
    "linear_dim": "`rank`, in `[adapter]`",
    "linear_alpha": "`alpha`, in `[adapter]`",
    "unit": "`dylora_unit`, in `[adapter]`, for `type = 'lora'`",
    "dit": "`transformer_path`, in `[model]`",
    "dit_dtype": "`transformer_dtype`, in `[model]`",
    "debug_dataset": "--dump_dataset FOLDER on the command line",
    "dynamo_backend": "`compile`",
    "fp8_base": "`transformer_dtype`, in `[model]`, as in `transformer_dtype = 'float8'`",
    "fp8_scaled": "`transformer_dtype`, in `[model]`, as in `transformer_dtype = 'float8'`",
    "fp8_llm": _FP8_TEXT,
    "fp8_t5": _FP8_TEXT,
    "fp8_vl": _FP8_TEXT,
    "full_bf16": _TRAINED,
    "full_fp16": _TRAINED,
    "guidance_scale": "`guidance`, in `[model]`, or of samples in `[sampling]`",
    "lr_scheduler_type": "`lr_scheduler`",
    "sample_steps": "`steps`, in `[sampling]`",
    "save_every": "`save_every_n_steps`",
    "network_args": "their keys in `[adapter]`",
    "network_train_unet_only": "nothing: text encoders are trained only where they have a rate, as `text_encoder_1_lr`",
    "sample_at_first": "`sample_before_first_step`, in `[sampling]`",
    "save_last_n_epochs": "`keep_checkpoints`, of the state to resume from; exports are all kept",
    "save_last_n_steps": "`keep_checkpoints`, of the state to resume from; exports are all kept",
    "save_model_as": "`save_format`, which program the weights are for",
    "torch_compile": "`compile`",
    "use_8bit_adam": '`type = "adamw8bit"`, in `[optimizer]`',
    "t5xxl": _TEXT_ENCODER.format("t5"),
    "text_encoder_lr": "`text_encoder_1_lr`, in `[model]`, and `text_encoder_2_lr` of SDXL",
    "v_parameterization": '`prediction_type = "v_prediction"`, in `[model]`',
}
# Name elsewhere -> why there is nothing to write.
_NEEDLESS: Mapping[str, str] = {
    "support_video": "clips are found by their endings, and used where frame_buckets has more than one frame",
    "source_fps": "the rate of a clip is read from its file",
    "bucket_reso_steps": "sizes are rounded to what the model takes",
    "cache_latents_to_disk": "latents always are",
    "cache_text_encoder_outputs_to_disk": "they are, unless cache_text_embeddings = false",
    "logging_dir": "logs go into the run's folder",
    "max_data_loader_n_workers": _LOADER,
    "persistent_data_loader_workers": _LOADER,
    "lowram": "a process reads the weights of its own stage alone",
    "highvram": "what is in memory follows from the settings that --check shows",
    "mem_eff_attn": _NO_FLAG,
    "sdpa": _NO_FLAG,
    "xformers": _NO_FLAG,
    "flash_attn": _NO_FLAG,
    "attn_mode": _NO_FLAG,
    "split_attn": _NO_FLAG,
    "no_half_vae": "the VAE encodes in `dtype`, and in float32 where float16 would overflow",
    "training_comment": "exports hold the settings of their run",
}

ANYWHERE: Mapping[str, Foreign] = {
    # Of SimpleTuner.
    "base_model_precision": write(
        "`transformer_dtype`, in `[model]`, as in `transformer_dtype = 'int8'`", unless=("no_change",)
    ),
    **{
        f"text_encoder_{number}_precision": write(
            "`text_encoder_dtype`, in `[model]`, as in `text_encoder_dtype = 'int8'`, for all text encoders",
            unless=("no_change",),
        )
        for number in range(1, 5)
    },
    # Of DiffSynth-Studio.
    "fp8_models": write("`transformer_dtype` and `text_encoder_dtype`, in `[model]`"),
    **{key: write(what) for key, what in {**_OF_DATASETS, **_OF_RUNS}.items()},
    **{key: leave_out(why) for key, why in _NEEDLESS.items()},
    "cache_latents": leave_out("latents always are cached", only=(True,)),
    "fused_backward_pass": leave_out("this version keeps gradients until the step", only=(False,)),
    "scale_weight_norms": leave_out("this version does not bound the norm of an adapter", only=(0, 0.0)),
    "noise_offset_random_strength": leave_out("this version adds the whole of noise_offset", only=(False,)),
    "lr_scheduler_num_cycles": leave_out("this version has no schedule with restarts", only=(1,)),
    "lr_scheduler_power": leave_out("this version has no polynomial schedule", only=(1, 1.0)),
    "deepspeed": leave_out("DeepSpeed is always used", only=(True,)),
    "offload_optimizer_device": write("`offload_optimizer = true`", unless=("none",)),
    "offload_optimizer_nvme_path": leave_out("the optimizer's state waits in the machine's memory, and not on a disk"),
    "offload_param_device": write("`blocks_to_swap`, of frozen weights", unless=("none",)),
}


def advice_in(place: str, key: str) -> str:
    """What to do about a key that stands in the table `place`: also in which file what replaces it belongs."""
    is_data = place in ("dataset", "directory")
    if key in _OF_DATASETS and not is_data and "file" not in _OF_DATASETS[key]:
        return f"{ANYWHERE[key].advice}; it belongs into the dataset file, which `dataset` names"
    if key in _OF_RUNS and is_data and "file" not in _OF_RUNS[key]:
        return f"{ANYWHERE[key].advice}; it belongs into the run's file"
    return ANYWHERE[key].advice
