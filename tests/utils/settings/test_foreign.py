"""Files that were written for diffusion-pipe: they are read, or each line that cannot be is told with what to write."""

import logging
from pathlib import Path

import pytest

import models
from tests.utils.settings.conftest import CHOICES, DATASET, Folder
from utils.errors import UserError
from utils.settings.dataset_schema import DatasetSettings
from utils.settings.diffusion_pipe import FLAGS, FOREIGN, SAME, SAME_FLAGS, TYPES
from utils.settings.foreign_page import foreign_page
from utils.settings.reader import read_all
from utils.settings.schema import Settings

# Every key that a file of its for training a LoRA usually has, with the values of its authors.
USUAL = """
output_dir = 'runs'
dataset = 'dataset.toml'
epochs = 1000
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 1
warmup_steps = 100
eval_every_n_epochs = 1
eval_before_first_step = true
eval_micro_batch_size_per_gpu = 1
eval_gradient_accumulation_steps = 1
disable_block_swap_for_eval = true
save_every_n_epochs = 2
checkpoint_every_n_minutes = 120
activation_checkpointing = true
reentrant_activation_checkpointing = true
partition_method = 'parameters'
save_dtype = 'bfloat16'
caching_batch_size = 1
map_num_proc = 32
steps_per_print = 1
video_clip_mode = 'single_beginning'
x_axis_examples = false

[model]
type = 'flux'
diffusers_path = 'weights'
dtype = 'bfloat16'
transformer_dtype = 'float8'
timestep_sample_method = 'logit_normal'
flux_shift = true

[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'

[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
eps = 1e-8

[monitoring]
enable_wandb = false
wandb_api_key = ''
wandb_tracker_name = ''
wandb_run_name = ''
"""
USUAL_DATA = """
resolutions = [512]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 7
frame_buckets = [1, 33]
skip_empty_caption = true
shuffle_tags = false

[[directory]]
path = 'pictures'
num_repeats = 1
"""


def read(path: Path, caplog: pytest.LogCaptureFixture) -> tuple[Settings, DatasetSettings, list[str]]:
    """The settings, the training set, and what was warned of, as "place: message"."""
    with caplog.at_level(logging.WARNING):
        settings, dataset, _ = read_all(path, models.choices(), 1)
    return settings, dataset, [record.getMessage().split(": ", 1)[1] for record in caplog.records]


def problems_of(path: Path) -> dict[str, str]:
    with pytest.raises(UserError) as caught:
        read_all(path, models.choices(), 1)
    return {problem.where: problem.message for problem in caught.value.problems}


def test_a_usual_file_runs_as_it_is(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.write("dataset.toml", USUAL_DATA)
    settings, dataset, warnings = read(folder.write("run.toml", USUAL), caplog)
    assert settings.optimizer.type == "adamw_optimi"
    assert settings.optimizer.betas == (0.9, 0.99)
    assert settings.monitoring.wandb_run_name is None
    assert dataset.num_ar_buckets == 7
    assert [warning.split(":")[0] for warning in warnings] == [
        "key `eval_gradient_accumulation_steps`",
        "key `reentrant_activation_checkpointing`",
        "key `map_num_proc`",
        "key `video_clip_mode`",
        "key `x_axis_examples`",
        "key `skip_empty_caption`",
        "key `shuffle_tags`",
        "key `eval_every_n_epochs`",
        "key `eval_micro_batch_size_per_gpu`",
        "key `disable_block_swap_for_eval`",
    ]


def test_sound_files_of_ours_warn_of_nothing(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_all(folder.run(), CHOICES, 1)
    assert caplog.records == []


SDXL = """
[model]
type = 'sdxl'
diffusers_path = 'weights'
checkpoint_path = 'weights'
dtype = 'bfloat16'
v_pred = true
min_snr_gamma = 5
unet_lr = 4e-5
text_encoder_1_lr = 0
text_encoder_2_lr = 2e-5
merge_adapters = ['weights']
"""


def test_keys_that_say_the_same_are_read(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    usual = USUAL[: USUAL.index("[model]")] + SDXL + USUAL[USUAL.index("[adapter]") :]
    text = usual.replace("type = 'lora'\nrank = 32", "type = 'lokr'\nrank = 1e6\ndecompose_factor = 4")
    top = "eval_datasets = ['dataset.toml', {name = 'b', config = 'dataset.toml'}]\n"
    top += "image_eval_micro_batch_size_per_gpu = 3"
    folder.write("dataset.toml", f"shuffle_tags = true\n{DATASET}control_paths = ['pictures', 'weights']")
    settings, dataset, warnings = read(folder.write("run.toml", f"{top}\n{text}"), caplog)
    model = settings.model
    assert model.transformer_path == Path("weights")
    assert (model.prediction_type, model.rescale_betas_zero_snr) == ("v_prediction", True)
    assert (model.unet_lr, model.text_encoder_1_lr, model.text_encoder_2_lr) == (4e-5, None, 2e-5)
    assert [(preset.path, preset.weight, preset.fused) for preset in model.preset_adapters] == [
        (Path("weights"), 1, True)
    ]
    assert (settings.adapter.rank, settings.adapter.factor, settings.adapter.dropout) == (1_000_000, 4, 0)
    assert [entry.name for entry in settings.eval_datasets] == ["eval0", "b"]
    assert settings.eval_image_micro_batch_size_per_gpu == 3
    assert dataset.cache_shuffle_num == 1
    assert dataset.directory[0].control_paths == [Path("pictures"), Path("weights")]
    said = dict(warning.split(": ", 1) for warning in warnings)
    assert said["[model] v_pred"] == "is read as `prediction_type = 'v_prediction'`, `rescale_betas_zero_snr = true`"
    assert said["[model] merge_adapters"] == "is read as `preset_adapters = [{ path = 'weights' }]`"
    assert said["[adapter] decompose_factor"] == "is read as `factor = 4`"


@pytest.mark.parametrize(("key", "form"), [("text_encoder_fp8", "float8"), ("text_encoder_nf4", "nf4")])
def test_quantised_text_encoders_are_read(
    folder: Folder, caplog: pytest.LogCaptureFixture, key: str, form: str
) -> None:
    with caplog.at_level(logging.WARNING):
        settings = read_all(folder.run(model=f"{key} = true"), CHOICES, 1)[0]
    assert settings.model.text_encoder_dtype == form
    (record,) = caplog.records
    assert f"{key}: is read as `text_encoder_dtype = '{form}'`" in record.getMessage()


def test_a_folder_under_its_other_name_is_told_once(folder: Folder) -> None:
    path = folder.run(weights="", model="ckpt_path = 'weights'")
    with pytest.raises(UserError) as caught:
        read_all(path, CHOICES, 1)
    assert [problem.where for problem in caught.value.problems] == ["[model] ckpt_path"]


def test_no_shuffled_capitals_may_be_false(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.write("dataset.toml", f"shuffle_capitalization = false\n{DATASET}")
    _, dataset, _ = read(folder.write("run.toml", USUAL), caplog)
    assert dataset.shuffle_capitalization == 0.0
    folder.write("dataset.toml", f"shuffle_capitalization = true\n{DATASET}")
    assert "must be a number" in problems_of(folder.write("run.toml", USUAL))["key `shuffle_capitalization`"]


@pytest.mark.parametrize("model_type", ["lumina_2", "lumina2", "Lumina-2"])
def test_a_model_is_known_by_its_letters(folder: Folder, caplog: pytest.LogCaptureFixture, model_type: str) -> None:
    model = f"[model]\ntype = '{model_type}'\ndiffusers_path = 'weights'\nlumina_shift = true\n"
    text = USUAL[: USUAL.index("[model]")] + model + USUAL[USUAL.index("[adapter]") :]
    settings, _, _ = read(folder.write("run.toml", text), caplog)
    assert settings.model.type == "lumina2"
    assert settings.model.flux_shift is True


def test_a_key_that_one_model_has_is_read_there(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    model = "[model]\ntype = 'ltx-video'\ndiffusers_path = 'weights'\nfirst_frame_conditioning_p = 0.5\n"
    text = USUAL[: USUAL.index("[model]")] + model + USUAL[USUAL.index("[adapter]") :]
    settings, _, _ = read(folder.write("run.toml", text), caplog)
    assert settings.model.type == "ltx_video"
    assert settings.model.first_frame_share == 0.5


REFUSED = [
    ("top", "pseudo_huber_c = 0.5", "key `pseudo_huber_c`", "`loss_type = 'pseudo_huber'`"),
    ("top", "huber_delta = 0.5", "key `huber_delta`", "`loss_type = 'huber'`"),
    ("top", "smooth_l1_beta = 0.5", "key `smooth_l1_beta`", "`loss_type = 'smooth_l1'`"),
    ("top", "x_axis_examples = true", "key `x_axis_examples`", "filed by step"),
    ("top", "regenerate_cache = true", "key `regenerate_cache`", "--regenerate_cache"),
    ("top", "resume_from_checkpoint = true", "key `resume_from_checkpoint`", "--resume_from_checkpoint"),
    ("top", "uncond_fraction = 0.1", "key `uncond_fraction`", "in the dataset file"),
    ("top", "video_clip_mode = 'single_middle'", "key `video_clip_mode`", "in the dataset file"),
    ("top", "max_checkpoints = 3", "key `max_checkpoints`", "`keep_checkpoints`"),
    ("model", "ckpt_path = 'weights'", "[model] ckpt_path", "`diffusers_path`"),
    ("model", "llm_path = 'weights'", "[model] llm_path", "type = 'umt5'"),
    ("model", "t5_path = 'weights'", "[model] t5_path", "type = 't5'"),
    ("model", "clip_path = 'weights'", "[model] clip_path", "type = 'clip'"),
    ("model", "byt5_path = 'weights'", "[model] byt5_path", "`text_encoders`"),
    ("model", "text_encoder_path = 'weights'", "[model] text_encoder_path", "type = 'qwen2_5_vl'"),
    ("model", "image_shift = 1", "[model] image_shift", "`shift`"),
    ("model", "cfg = 4", "[model] cfg", "`folded_guidance`"),
    ("model", "first_frame_conditioning_p = 0.5", "[model] first_frame_conditioning_p", "`from_first_frame`"),
    ("model", "self_attn_lr = 1e-5", "[model] self_attn_lr", "`self_attn_lr`, in `[optimizer]`"),
    ("model", "pseudo_huber_c = 0.5", "[model] pseudo_huber_c", "`loss_type = 'pseudo_huber'`"),
    ("model", "cache_text_embeddings = false", "[model] cache_text_embeddings", "above all tables"),
    ("model", "text_encoder_3_precision = 'int8-quanto'", "[model] text_encoder_3_precision", "`text_encoder_dtype`"),
    ("model", "fp8_t5 = true", "[model] fp8_t5", "`text_encoder_dtype`"),
    ("optimizer", "stabilize = true", "[optimizer] stabilize", "limit an update by its size"),
    ("tables", "[adapter]\ntype = 'lora'\nrank = 1\ndora_wd = true", "[adapter] dora_wd", "`dora = true`"),
    (
        "tables",
        "[adapter]\ntype = 'lora'\nrank = 1\nfuse_adapters = []",
        "[adapter] fuse_adapters",
        "`preset_adapters`",
    ),
    ("tables", "[adapter]\ntype = 'lora'\nrank = 1e6", "[adapter] rank", "whole number"),
]


@pytest.mark.parametrize(("part", "line", "where", "words"), REFUSED)
def test_a_line_that_cannot_be_read_is_told_with_what_replaces_it(
    folder: Folder, part: str, line: str, where: str, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_all(folder.run(**{part: line}), CHOICES, 1)
    ((place, message),) = [(problem.where, problem.message) for problem in caught.value.problems]
    assert place == where
    assert words in message


HARMLESS = [
    ("top", "regenerate_cache = false"),
    ("top", "uncond_fraction = 0.0"),
    ("top", "logging_steps = 10"),
    ("top", "max_checkpoints = 0"),
    ("model", "v_pred = false"),
    ("model", "text_encoder_fp8 = false"),
    ("model", "text_encoder_1_precision = 'no_change'"),
    ("model", "cfg = 1"),
    ("model", "cache_text_embeddings = true"),
    ("optimizer", "stabilize = false"),
    ("top", "sdpa = true"),
]


@pytest.mark.parametrize(("part", "line"), HARMLESS)
def test_a_line_that_changes_nothing_is_a_warning(
    folder: Folder, caplog: pytest.LogCaptureFixture, part: str, line: str
) -> None:
    with caplog.at_level(logging.WARNING):
        read_all(folder.run(**{part: line}), CHOICES, 1)
    (record,) = caplog.records
    assert f"{line.split()[0]}" in record.getMessage() and "not used" in record.getMessage()


@pytest.mark.parametrize(("key", "line"), [("subsample_ratio", "0.5"), ("online_captions", "true")])
def test_a_line_of_a_dataset_that_cannot_be_read_is_told(folder: Folder, key: str, line: str) -> None:
    folder.write("dataset.toml", f"{key} = {line}\n{DATASET}")
    assert "write instead: `" in problems_of(folder.write("run.toml", USUAL))[f"key `{key}`"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("offload", "take `adamw`, and `offload_optimizer = true`"),
        ("adamx", "known: adafactor, came, adamw"),
    ],
)
def test_an_optimizer_that_is_not_here_is_told_with_what_to_take(folder: Folder, name: str, words: str) -> None:
    text = USUAL.replace("adamw_optimi", name).replace("eps = 1e-8", "eps = 1e-8\nstabilize = false")
    problems = problems_of(folder.write("run.toml", text))
    assert list(problems) == ["[optimizer] type"]
    assert words in problems["[optimizer] type"]


@pytest.mark.parametrize("name", ["AdamW8bitKahan", "automagic", "genericoptim", "StableAdamW", "Prodigy"])
def test_an_optimizer_of_the_same_name_is_read(folder: Folder, name: str, caplog: pytest.LogCaptureFixture) -> None:
    text = USUAL.replace("adamw_optimi", name)
    text = text.replace("betas = [0.9, 0.99]\n", "") if name == "automagic" else text
    stabilizes = name in ("AdamW8bitKahan", "genericoptim")
    text = text.replace("eps = 1e-8", "eps = 1e-8\nstabilize = false") if stabilizes else text
    settings, _, _ = read(folder.write("run.toml", text), caplog)
    assert settings.optimizer.type == name.lower()
    assert getattr(settings.optimizer, "stabilize", False) is False


def test_a_key_of_the_other_file_is_not_led_to_a_key_that_is_refused_next(folder: Folder) -> None:
    folder.write("dataset.toml", f"learning_rate = 1\nmax_train_steps = 3\n{DATASET}")
    problems = problems_of(folder.write("run.toml", f"resolution = 512\nflip_aug = true\n{USUAL}"))
    in_data = "; it belongs into the dataset file, which `dataset` names"
    assert problems["key `resolution`"].endswith(in_data) and "`resolutions`" in problems["key `resolution`"]
    assert problems["key `flip_aug`"].endswith(in_data)
    assert problems["key `learning_rate`"].endswith("`lr`, in `[optimizer]`; it belongs into the run's file")
    assert problems["key `max_train_steps`"].endswith("`max_steps`; it belongs into the run's file")


def test_a_key_and_its_foreign_name_are_given_twice(folder: Folder) -> None:
    path = folder.run(model="lumina_shift = true\nflux_shift = true")
    with pytest.raises(UserError, match="flux_shift is the same key"):
        read_all(path, CHOICES, 1)


DIFFERENT = [
    ("max_steps = 5\nlr_scheduler = 'linear'", "dtype = 'bfloat16'", DATASET, "key `lr_scheduler`"),
    ("", "", DATASET, "[adapter] `dtype`"),
    ("", "dtype = 'bfloat16'", f"cache_shuffle_num = 10\n{DATASET}", "`cache_shuffle_num`"),
    ("", "dtype = 'bfloat16'", f"{DATASET}mask_path = 'pictures'", "`mask_path`"),
    ("", "dtype = 'bfloat16'", DATASET.replace("pictures", "described"), "`captions.json`"),
]


@pytest.mark.parametrize(("top", "adapter", "data", "where"), DIFFERENT)
def test_what_means_something_else_is_told_where_a_file_is_diffusion_pipes(
    folder: Folder, caplog: pytest.LogCaptureFixture, top: str, adapter: str, data: str, where: str
) -> None:
    (folder.root / "described").mkdir()
    folder.write("described/captions.json", "{}")
    folder.write("dataset.toml", data)
    tables = f"[adapter]\ntype = 'lora'\nrank = 1\n{adapter}"
    with caplog.at_level(logging.WARNING):
        read_all(folder.run(top=top, tables=tables), CHOICES, 1)
        assert caplog.records == []
        read_all(folder.run(top=f"{top}\nlogging_steps = 1", tables=tables), CHOICES, 1)
        read_all(folder.run(top=top, tables=tables), CHOICES, 1, from_diffusion_pipe=True)
    told = [record.getMessage() for record in caplog.records if "other than in diffusion-pipe" in record.getMessage()]
    assert len(told) == 2 and told[0] == told[1]
    assert f": {where}: " in told[0]


def test_every_foreign_key_says_what_happens() -> None:
    for place, table in FOREIGN.items():
        for key, foreign in table.items():
            assert foreign.advice.startswith(("write ", "leave it out: ")), (place, key)


def test_the_page_says_of_every_key_what_happens() -> None:
    page = foreign_page()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    names = [row[0].removeprefix("| ").strip("`") for row in rows]
    keys = [key for table in (SAME, FOREIGN) for place in table for key in table[place] if place != "directory"]
    keys += [*SAME["directory"], *(FOREIGN["directory"].keys() - FOREIGN["dataset"].keys())]
    keys += [name for types in TYPES.values() for name in types]
    keys += [f"--{name}" for name in (*SAME_FLAGS, *FLAGS)]
    # A file of captions has no key.
    assert sorted(names) == sorted([*keys, "captions.json"])
    said = {name: row[1] for name, row in zip(names, rows, strict=True)}
    assert said["lumina_shift"] == "read: `flux_shift` |"
    assert said["map_num_proc"].startswith("not needed: ")
    assert said["image_shift"].startswith("refused; write instead: `shift`")
    assert said["stabilize"].startswith("refused, unless it changes nothing; ")
    assert said["cache_shuffle_num"].startswith("the same word: an epoch uses one of the orders")
    assert said["offload"].startswith("refused; take `adamw`, and `offload_optimizer = true`")
    assert said["--deepspeed_config"].startswith("refused; write instead: `deepspeed_config`")
