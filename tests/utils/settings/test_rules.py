"""Keys that must agree: each rule fires on its fault, names its place, and is silent on a sound run."""

import pytest

from tests.utils.settings.conftest import Folder, options_for
from utils.settings.errors import Problem
from utils.settings.reader import read_dataset, read_settings
from utils.settings.rules import check_dataset, check_evaluation_set, check_rules
from utils.settings.schema import DatasetSettings, DirectorySettings

EVAL = 'eval_datasets = [{name = "a", config = "dataset.toml"}, {name = "a", config = "dataset.toml"}]'


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
        ({"dataset": "dataset = 'gone.toml'"}, "key `dataset`", "no gone.toml"),
        ({"top": "eval_every_n_steps = 3"}, "key `eval_every_n_steps`", "nothing to evaluate"),
        ({"top": EVAL}, "key `eval_datasets[1].name`", '"a"'),
        ({"top": EVAL.replace('"a"', '"train"', 1)}, "key `eval_datasets[0].name`", "training set"),
        (
            {"top": EVAL.replace('"a", config = "dataset.toml"}]', '"b", config = "gone"}]')},
            "key `eval_datasets[1].config`",
            "no gone",
        ),
        ({"model": "shift = 3\nflux_shift = true"}, "[model] shift", "flux_shift"),
        ({"model": "vae_path = 'gone'"}, "[model] vae_path", "no gone"),
        ({"model": "transformer_path = 'gone'"}, "[model] transformer_path", "no gone"),
        (
            {"model": "text_encoders = [{type = 't5', path = 'gone'}]"},
            "[model] text_encoders[0].path",
            "no gone",
        ),
        ({"weights": "diffusers_path = 'gone'"}, "[model] diffusers_path", "no gone"),
        ({"weights": ""}, "[model]", "transformer_path"),
        (
            {"weights": "transformer_path = 'dataset.toml'", "model": "from_scratch = true"},
            "[model] from_scratch",
            "weights only",
        ),
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
        ({"tables": "[monitoring]\nwandb_run_name = 'a'"}, "[monitoring] wandb_run_name", "enable_wandb"),
    ],
)
def test_each_rule(folder: Folder, parts: dict[str, str], where: str, words: str) -> None:
    settings = read_settings(folder.run(**parts), options_for)
    problems = check_rules(settings, world_size=4, file="run.toml")
    assert [(problem.file, problem.where) for problem in problems] == [("run.toml", where)]
    assert words in problems[0].message


def test_a_sound_run_has_no_problem(folder: Folder) -> None:
    top = "partition_method = 'manual'\npartition_split = [1, 3, 4]\npipeline_stages = 4\n"
    top += EVAL.replace('"a", config = "dataset.toml"}]', '"b", config = "dataset.toml"}]')
    path = folder.run(top=top, tables="[sampling]\nprompts = ['a']\nsample_every_n_steps = 1")
    assert check_rules(read_settings(path, options_for), world_size=8) == []


def test_rules_leave_out_what_is_broken(folder: Folder) -> None:
    settings = read_settings(folder.run(top="pipeline_stages = 3", model="shift = 3\nflux_shift = true"), options_for)
    places = {problem.where for problem in check_rules(settings, 4)}
    assert places == {"key `pipeline_stages`", "[model] shift"}
    assert check_rules(settings, 4, broken=frozenset({"pipeline_stages", "model.flux_shift"})) == []
    assert {problem.where for problem in check_rules(settings, 4, broken=frozenset({"model"}))} == {
        "key `pipeline_stages`"
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[directory]]\npath = 'pictures'", ("key `directory[0]`", "resolutions")),
        ("resolutions = [1]\n[[directory]]\npath = 'gone'", ("key `directory[0].path`", "no gone")),
        ("resolutions = [1]\n[[directory]]\npath = 'run.toml'", ("key `directory[0].path`", "is a file")),
        (
            "resolutions = [1]\n[[directory]]\npath = 'pictures'\ncontrol_path = 'gone'",
            ("key `directory[0].control_path`", "no gone"),
        ),
        (
            "resolutions = [1]\nsize_buckets = [[1, 1, 1]]\n[[directory]]\npath = 'pictures'",
            ("key `size_buckets`", "resolutions"),
        ),
        (
            "resolutions = [1]\nenable_ar_bucket = true\nar_buckets = [1]\nmin_ar = 0.5\n"
            "[[directory]]\npath = 'pictures'",
            ("key `ar_buckets`", "min_ar"),
        ),
        (
            "resolutions = [1]\nenable_ar_bucket = true\n[[directory]]\npath = 'pictures'\nmin_ar = 3",
            ("key `directory[0]`", "above max_ar"),
        ),
        (
            "resolutions = [1]\nmin_ar = 0.5\n[[directory]]\npath = 'pictures'",
            ("key `min_ar`", "enable_ar_bucket"),
        ),
    ],
)
def test_each_rule_of_a_dataset(folder: Folder, text: str, problem: tuple[str, str]) -> None:
    folder.run()
    found: list[Problem] = check_dataset(read_dataset(folder.write("other.toml", text)), "other.toml")
    assert [entry.where for entry in found] == [problem[0]]
    assert problem[1] in found[0].message


def test_a_directory_has_its_own_values_or_the_files() -> None:
    plain = DirectorySettings(path="a")
    own = DirectorySettings(path="b", resolutions=[32], min_ar=0.8, num_repeats=5)
    whole = DatasetSettings(
        size_buckets=[[64, 64, 1]],
        ar_buckets=[1.0],
        num_repeats=2,
        enable_ar_bucket=True,
        directory=[plain, own],
    )
    first, second = whole.resolved(plain), whole.resolved(own)
    assert (first.size_buckets, first.ar_buckets, first.num_repeats) == ([(64, 64, 1)], [1.0], 2)
    assert (first.min_ar, first.max_ar, first.num_ar_buckets) == (0.5, 2.0, 7)
    # What a directory says of sizes replaces what the file says, in whatever key.
    assert (second.size_buckets, second.resolutions, second.num_repeats) == (None, [32], 5)
    assert (second.ar_buckets, second.min_ar, second.enable_ar_bucket) == (None, 0.8, True)


def test_a_run_has_one_cache():
    def dataset(cache_dir):
        return DatasetSettings(cache_dir=cache_dir, resolutions=[64], directory=[DirectorySettings(path="x")])

    training = {"train.toml": dataset("/cache")}
    for cache_dir, told in ((None, False), ("/cache", False), ("/other", True)):
        problems = check_evaluation_set(dataset(cache_dir), training, ["train.toml"], "eval.toml")
        assert bool(problems) == told, cache_dir
