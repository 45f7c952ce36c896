"""Keys that must agree: each rule fires on its fault, names its place, and is silent on a sound run."""

import os

import pytest

from tests.utils.settings.conftest import CHOICES, Folder
from utils.errors import UserError
from utils.settings.reader import read_all, read_settings
from utils.settings.rules import WANDB_KEYS, check_rules, remarks_on_run

EVAL = 'eval_datasets = [{name = "a", config = "dataset.toml"}, {name = "a", config = "dataset.toml"}]'
LORA = "[adapter]\ntype = 'lora'\nrank = 1"


@pytest.mark.parametrize(
    ("parts", "where", "words"),
    [
        ({"top": "partition_split = [1]"}, "key `partition_split`", "manual"),
        ({"top": "partition_method = 'manual'\npipeline_stages = 2"}, "key `partition_split`", "required"),
        (
            {"top": "partition_method = 'manual'\npartition_split = [1, 2]\npipeline_stages = 2"},
            "key `partition_split`",
            "needs 1",
        ),
        (
            {"top": "partition_method = 'manual'\npartition_split = [2, 2, 3]\npipeline_stages = 4"},
            "key `partition_split`",
            "rise",
        ),
        ({"top": "pipeline_stages = 3"}, "key `pipeline_stages`", "multiple of 3"),
        ({"top": "schedule = 'interleaved'"}, "key `schedule`", "pipeline_stages = 1"),
        (
            {"top": "pieces_per_stage = 3\npipeline_stages = 2"},
            "key `pieces_per_stage`",
            'schedule = "interleaved" only',
        ),
        (
            {"top": "schedule = 'interleaved'\npipeline_stages = 2\npartition_method = 'memory'"},
            "key `partition_method`",
            'set "time"',
        ),
        (
            {
                "top": "schedule = 'interleaved'\npipeline_stages = 2\npartition_method = 'manual'\n"
                "partition_split = [3]"
            },
            "key `partition_split`",
            "needs 3 layer numbers for pipeline_stages = 2 with 2 pieces each",
        ),
        ({"dataset": "dataset = 'gone.toml'"}, "key `dataset`", "no gone.toml"),
        (
            {"top": "micro_batch_size_per_gpu = [[512, 4], [1024, 1], [512, 2]]"},
            "key `micro_batch_size_per_gpu`",
            "512 twice",
        ),
        ({"top": EVAL}, "key `eval_datasets[1].name`", '"a"'),
        ({"top": EVAL.replace('"a"', '"train"', 1)}, "key `eval_datasets[0].name`", "training set"),
        (
            {"top": EVAL.replace('"a", config = "dataset.toml"}]', '"b", config = "gone"}]')},
            "key `eval_datasets[1].config`",
            "no gone",
        ),
        ({"top": 'eval_datasets = [{name = "a"}]'}, "key `eval_datasets[0]`", "needs `config` or `fraction`"),
        (
            {"top": 'eval_datasets = [{name = "a", fraction = 0.1, config = "dataset.toml"}]'},
            "key `eval_datasets[0]`",
            "one of them",
        ),
        (
            {"top": 'eval_datasets = [{name = "a", fraction = 0.5}, {name = "b", fraction = 0.5}]'},
            "key `eval_datasets`",
            "nothing is left to train",
        ),
        (
            {"top": 'eval_patience = 3\neval_datasets = [{name = "a", fraction = 0.5}]'},
            "key `eval_patience`",
            "set eval_every_n_steps",
        ),
        ({"model": "shift = 3\nflux_shift = true"}, "[model] shift", "flux_shift"),
        (
            {"model": "timestep_sample_method = 'uniform'\nsigmoid_scale = 2.0"},
            "[model] sigmoid_scale",
            '"log_snr" only',
        ),
        ({"model": "timestep_sample_method = 'mode'\nlogit_mean = 0.5"}, "[model] logit_mean", '"logit_normal" or'),
        ({"model": "transformer_dtype = 'float8'"}, "[model] transformer_dtype", '"float8" is for a base that stays'),
        ({"model": "diffusion_model_dtype = 'nf4'"}, "[model] transformer_dtype", "under an [adapter]; add one"),
        ({"model": "mode_scale = 1.0"}, "[model] mode_scale", 'timestep_sample_method = "mode"'),
        ({"model": "beta_alpha = 3.0"}, "[model] beta_alpha", 'timestep_sample_method = "beta"'),
        ({"model": "loss_type = 'mae'\nhuber_c = 0.2"}, "[model] huber_c", 'loss_type = "huber" or'),
        ({"model": "huber_schedule = 'constant'"}, "[model] huber_schedule", "set that, or leave this out"),
        (
            {"model": "multires_noise_discount = 0.5"},
            "[model] multires_noise_discount",
            "is for multires_noise_iterations only",
        ),
        ({"top": "regularisation_target = 'parent'"}, "key `regularisation_target`", "needs [adapter]"),
        ({"model": "vae_path = 'gone'"}, "[model] vae_path", "no gone"),
        ({"model": "transformer_path = 'gone'"}, "[model] transformer_path", "no gone"),
        (
            {"model": "text_encoders = [{type = 't5', path = 'gone'}]"},
            "[model] text_encoders[0].path",
            "no gone",
        ),
        ({"weights": "diffusers_path = 'gone'"}, "[model] diffusers_path", "no gone"),
        ({"weights": ""}, "[model] diffusers_path", "is required: give the model"),
        ({"model": "architecture = 'dev'"}, "[model] architecture", "is for single files without a folder"),
        ({"model": "tokenizer_path = '.'"}, "[model] tokenizer_path", "is for single files without a folder"),
        ({"weights": "diffusers_path = 'dataset.toml'"}, "[model] diffusers_path", "is a file"),
        ({"output_dir": "output_dir = 'dataset.toml'"}, "key `output_dir`", "dataset.toml is no folder"),
        ({"output_dir": "output_dir = 'dataset.toml/runs'"}, "key `output_dir`", "dataset.toml is no folder"),
        ({"output_dir": "output_dir = '~nobody_here/runs'"}, "key `output_dir`", "no such user"),
        (
            {"tables": "[adapter]\ntype = 'lora'\nrank = 1\ninit_from_existing = 'gone'"},
            "[adapter] init_from_existing",
            "no gone",
        ),
        ({"tables": "[sampling]\nprompts = ['a']"}, "[sampling] prompts", "sample_every_n_steps"),
        (
            {"tables": "[sampling]\nsample_every_n_epochs = 1"},
            "[sampling] sample_every_n_epochs",
            "nothing to draw",
        ),
        ({"top": "blocks_to_swap = 3\nzero_stage = 2"}, "key `zero_stage`", "set zero_stage = 1, or 3"),
        (
            {"top": "pipeline_stages = 2\nzero_stage = 3"},
            "key `zero_stage`",
            "set zero_stage = 2, or",
        ),
        (
            {"top": "zero_stage = 3\nblocks_to_swap = 2\ndisable_block_swap_for_eval = true", "tables": LORA},
            "key `disable_block_swap_for_eval`",
            "would give each GPU all weights",
        ),
        (
            {"top": "blocks_to_swap = [1]\npipeline_stages = 2", "tables": LORA},
            "key `blocks_to_swap`",
            "has 1 numbers for pipeline_stages = 2",
        ),
        ({"top": "stage_weights = [2, 1]"}, "key `stage_weights`", "has 2 numbers for pipeline_stages = 1"),
        (
            {"top": "stage_weights = [2, 1]\npipeline_stages = 2\npartition_method = 'manual'\npartition_split = [3]"},
            "key `stage_weights`",
            "not used beside partition_split",
        ),
        (
            {"top": "activation_checkpointing_every_n_blocks = 2"},
            "key `activation_checkpointing_every_n_blocks`",
            "for activation_checkpointing only",
        ),
    ],
)
def test_each_rule(folder: Folder, parts: dict[str, str], where: str, words: str) -> None:
    settings = read_settings(folder.run(**parts), CHOICES)
    problems = check_rules(settings, world_size=4, file="run.toml")
    assert [(problem.file, problem.where) for problem in problems] == [("run.toml", where)]
    assert words in problems[0].message


@pytest.mark.parametrize(
    ("parts", "where", "words"),
    [
        ({"top": "eval_every_n_steps = 3"}, "key `eval_every_n_steps`", "nothing to evaluate"),
        ({"top": "eval_micro_batch_size_per_gpu = 3"}, "key `eval_micro_batch_size_per_gpu`", "nothing to evaluate"),
        ({"tables": "[monitoring]\nwandb_run_name = 'a'"}, "[monitoring] wandb_run_name", "enable_wandb"),
    ],
)
def test_what_is_said_in_vain_is_told_and_no_problem(
    folder: Folder, parts: dict[str, str], where: str, words: str
) -> None:
    settings = read_settings(folder.run(**parts), CHOICES)
    assert check_rules(settings, world_size=1) == []
    (remark,) = remarks_on_run(settings, "run.toml")
    assert (remark.file, remark.where) == ("run.toml", where)
    assert remark.message.startswith("not used") and words in remark.message


@pytest.mark.parametrize(
    ("top", "adapted", "told"),
    [
        ("blocks_to_swap = 2", True, True),
        ("blocks_to_swap = [3, 1]\npipeline_stages = 2", True, True),
        ("blocks_to_swap = 3", True, False),
        ("blocks_to_swap = [0, 3]\npipeline_stages = 2", True, False),
        ("blocks_to_swap = 'auto'", True, False),
        # Their pieces, or their optimizer state, leave the GPU.
        ("blocks_to_swap = 2\nzero_stage = 3", True, False),
        ("blocks_to_swap = 2", False, False),
    ],
)
def test_as_many_swapped_blocks_as_there_is_room_for_are_told(
    folder: Folder, top: str, adapted: bool, told: bool
) -> None:
    tables = "[adapter]\ntype = 'lora'\nrank = 2" if adapted else ""
    settings = read_settings(folder.run(top=top, tables=tables), CHOICES)
    assert [one.where for one in remarks_on_run(settings)] == ["key `blocks_to_swap`"] * told


@pytest.mark.parametrize(
    ("path", "is_name"),
    [
        ("black-forest-labs/FLUX.1-dev", True),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", True),
        ("./models/flux", False),
        ("/data/models", False),
        ("models/flux/dev", False),
        ("models/flux.safetensors", False),
    ],
)
def test_a_name_of_the_hub_is_to_be_downloaded(folder: Folder, path: str, is_name: bool) -> None:
    settings = read_settings(folder.run(weights=f"diffusers_path = '{path}'"), CHOICES)
    (problem,) = check_rules(settings, world_size=1)
    assert problem.where == "[model] diffusers_path" and f"there is no {path.removeprefix('./')}" in problem.message
    command = f"hf download {path} --local-dir models/{path.split('/')[-1]}"
    assert (command in problem.message) is is_name


def test_empty_texts_of_an_account_are_not_given(folder: Folder) -> None:
    empty = "".join(f"{key} = ''\n" for key in WANDB_KEYS)
    settings = read_settings(folder.run(tables=f"[monitoring]\n{empty}"), CHOICES)
    assert remarks_on_run(settings) == []
    assert [getattr(settings.monitoring, key) for key in WANDB_KEYS] == [None, None, None]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_told(folder: Folder) -> None:
    (folder.root / "weights").chmod(0o500)
    settings = read_settings(folder.run(output_dir="output_dir = 'weights/runs'"), CHOICES)
    (problem,) = check_rules(settings, world_size=1)
    assert "cannot be written to" in problem.message


def test_a_sound_run_has_no_problem(folder: Folder) -> None:
    top = "partition_method = 'manual'\npartition_split = [1, 3, 4]\npipeline_stages = 4\n"
    top += "micro_batch_size_per_gpu = [[512, 4], [1024, 1]]\nimage_micro_batch_size_per_gpu = 2\n"
    top += EVAL.replace('"a", config = "dataset.toml"}]', '"b", config = "dataset.toml"}]')
    model = "timestep_sample_method = 'log_snr'\nlogit_mean = 1\nmode_scale = 1.29\n"
    model += "loss_type = 'smooth_l1'\nhuber_c = 0.2\nmultires_noise_iterations = 6\nmultires_noise_discount = 0.5"
    model += "\ntransformer_dtype = 'int8'"
    tables = "[adapter]\ntype = 'lora'\nrank = 1\n"
    path = folder.run(top=top, model=model, tables=tables + "[sampling]\nprompts = ['a']\nsample_every_n_steps = 1")
    assert check_rules(read_settings(path, CHOICES), world_size=8) == []


def test_rules_leave_out_what_is_broken(folder: Folder) -> None:
    settings = read_settings(folder.run(top="pipeline_stages = 3", model="shift = 3\nflux_shift = true"), CHOICES)
    places = {problem.where for problem in check_rules(settings, 4)}
    assert places == {"key `pipeline_stages`", "[model] shift"}
    assert check_rules(settings, 4, broken=frozenset({"pipeline_stages", "model.flux_shift"})) == []
    assert {problem.where for problem in check_rules(settings, 4, broken=frozenset({"model"}))} == {
        "key `pipeline_stages`"
    }


def test_what_a_base_may_be_kept_in_is_told_as_one_list(folder: Folder) -> None:
    with pytest.raises(UserError) as error:
        read_settings(folder.run(model="transformer_dtype = 'fp8'"), CHOICES)
    assert len(error.value.problems) == 1 and "'nf4' or 'int4'" in str(error.value)


def test_what_an_adapter_needs_is_told(folder: Folder) -> None:
    """But nothing that may follow from another mistake of its table."""
    for rank, expected in (
        ("", "is required and not given"),
        ("rank = 0\ndora = true\ndtype = 'bfloat16'", "at least 1"),
    ):
        path = folder.run(tables=f"[adapter]\ntype = 'lora'\n{rank}")
        with pytest.raises(UserError) as raised:
            read_all(path, CHOICES, 1)
        (problem,) = raised.value.problems
        assert problem.where == "[adapter] rank" and expected in problem.message


@pytest.mark.parametrize(("accumulation", "told"), [(1, ["key `schedule`"]), (2, [])])
def test_a_schedule_without_use_is_told(folder: Folder, accumulation: int, told: list[str]) -> None:
    keys = f"schedule = 'interleaved'\npipeline_stages = 2\ngradient_accumulation_steps = {accumulation}"
    assert [one.where for one in remarks_on_run(read_settings(folder.run(top=keys), CHOICES))] == told


@pytest.mark.parametrize(
    ("schedule", "processes", "told"),
    [
        ("1f1b", 1, "or set it to 1"),
        ("1f1b", 9, "or set it to 1 or 3 or 9"),
        ("interleaved", 1, "or set it to 1 without schedule"),
        ("interleaved", 9, "or set it to 1 without schedule or 3 or 9"),
    ],
)
def test_stages_that_fit_the_launch_are_told(folder: Folder, schedule: str, processes: int, told: str) -> None:
    path = folder.run(top=f"schedule = '{schedule}'\npipeline_stages = 2\ngradient_accumulation_steps = 2")
    (problem,) = check_rules(read_settings(path, CHOICES), world_size=processes)
    assert problem.where == "key `pipeline_stages`" and problem.message.endswith(told)


def test_a_schedule_of_the_learning_rate_has_another_key(folder: Folder) -> None:
    with pytest.raises(UserError, match="key `schedule`.*the learning rate's is named by lr_scheduler"):
        read_settings(folder.run(top="schedule = 'cosine'"), CHOICES)


@pytest.mark.parametrize("name", ["sage", "flex"])
def test_why_some_kernels_are_not_offered_is_told(folder: Folder, name: str) -> None:
    with pytest.raises(UserError, match=rf'key `attention`.*\("{name}"\) (has no backward pass|no kernel)'):
        read_settings(folder.run(top=f"attention = '{name}'"), CHOICES)
