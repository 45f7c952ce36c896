"""Keys of a dataset file that must agree: each rule fires on its fault, at its place; what is sound passes."""

from pathlib import Path

import pytest

from tests.utils.settings.conftest import Folder
from utils.errors import Problem
from utils.settings.dataset_rules import (
    RATIO_KEYS,
    TRAINING_KEYS,
    check_dataset,
    check_evaluation_set,
    remarks_on_dataset,
)
from utils.settings.dataset_schema import DataKeys, DatasetSettings, DirectorySettings
from utils.settings.reader import read_dataset

HERE = "resolutions = [64]\n[[directory]]\npath = 'pictures'\n"


def problems_of(folder: Folder, text: str) -> list[Problem]:
    problems = check_dataset(read_dataset(folder.write("other.toml", text)), "other.toml")
    assert all(problem.file == "other.toml" for problem in problems)
    return problems


def top(lines: str) -> str:
    """A sound file with further lines at its top."""
    return f"{lines}\n{HERE}"


def own(lines: str, above: str = "") -> str:
    """A sound file with further lines in its directory, and at its top."""
    return f"{above}\n{HERE}{lines}\n"


@pytest.fixture
def files(folder: Folder) -> Folder:
    """The sound run's folder, with more that a dataset can name."""
    for name in ("masks", "controls", "more"):
        (folder.root / name).mkdir()
    (folder.root / "listed").mkdir()
    for name in ("listed/metadata.jsonl", "table.csv", "table.parquet", "SHARD.TAR", "one.png", "shard.tar.gz"):
        folder.write(name, "")
    return folder


SIZED = "size_buckets = [[64, 64, 1]]\n[[directory]]\npath = 'pictures'\n"
FAULTS = [
    # Files.
    ("[[directory]]\npath = 'pictures'", "directory[0]", "resolutions"),
    (HERE.replace("pictures", "gone"), "directory[0].path", "no gone"),
    (HERE.replace("pictures", "one.png"), "directory[0].path", "none of .csv"),
    (HERE.replace("pictures", "shard.tar.gz"), "directory[0].path", "none of .csv"),
    (own("control_path = 'gone'"), "directory[0].control_path", "no gone"),
    (own("control_path = 'table.csv'"), "directory[0].control_path", "a folder is needed"),
    (own("control_path = ['controls', 'gone']"), "directory[0].control_path[1]", "no gone"),
    (own("mask_path = 'gone'"), "directory[0].mask_path", "no gone"),
    (own("mask_path = 'one.png'"), "directory[0].mask_path", "a folder is needed"),
    (own("default_mask_file = 'gone.png'"), "directory[0].default_mask_file", "no gone.png"),
    (top("default_mask_file = 'masks'"), "default_mask_file", "goes into mask_path"),
    (top("cache_dir = 'one.png'"), "cache_dir", "is no folder"),
    # Sizes.
    (f"resolutions = [64]\n{SIZED}", "resolutions", "size_buckets"),
    (f"enable_ar_bucket = true\n{SIZED}", "enable_ar_bucket", "size_buckets"),
    (f"frame_buckets = [1, 9]\n{SIZED}", "frame_buckets", "size_buckets"),
    (f"{SIZED}ar_buckets = [1]", "directory[0].ar_buckets", "size_buckets"),
    (own("size_buckets = [[64, 64, 1]]"), "resolutions", "size_buckets"),
    (top("ar_buckets = [1]"), "ar_buckets", "enable_ar_bucket"),
    (own("enable_ar_bucket = true\nmin_ar = 3"), "directory[0].min_ar", "above max_ar 2.0"),
    (top("min_resolution = 9\nmax_resolution = 8"), "min_resolution", "above max_resolution 8"),
    (own("max_resolution = 8", above="min_resolution = 9"), "directory[0].max_resolution", "above max_resolution 8"),
    # Variants and clips.
    (top("flip = true"), "flip", "augment_variants = 4"),
    (own("color_jitter = [0.1, 0, 0, 0]"), "directory[0].color_jitter", "augment_variants = 4"),
    (top("augment_variants = 4"), "augment_variants", "all the same"),
    (top("augment_variants = 4\nvideo_clip_mode = 'chunks'\nframe_buckets = [9]"), "augment_variants", "all the same"),
    (top("framerate = 16"), "framerate", "set frame_buckets"),
    (own("video_clip_mode = 'chunks'"), "directory[0].video_clip_mode", "set frame_buckets"),
    # Captions.
    (own("instance_prompt = 'a'\ncaption_source = 'filename'"), "directory[0].instance_prompt", '"filename"'),
    (top("instance_prompt = 'a'\ncaption_extension = '.caption'"), "caption_extension", "instance_prompt"),
    (own("caption_source = 'foldername'\ncaption_column = 'a'"), "directory[0].caption_column", "caption_source"),
    (own("caption_source = 'filename'\nmultiple_captions = 'all'"), "directory[0].multiple_captions", "are read"),
    # Masks, controls, weights.
    (top("mask_probability = 0.5"), "mask_probability", "there are none"),
    (own("unmasked_weight = 0.5"), "directory[0].unmasked_weight", "there are none"),
    (top("normalize_masked_area = true"), "normalize_masked_area", "there are none"),
    (own("alpha_mask = true\nmask_path = 'masks'"), "directory[0].alpha_mask", "from masks"),
    (own("mask_path = 'masks'", above="alpha_mask = true"), "directory[0].mask_path", "alpha_mask = false"),
    (top("alpha_mask = true\ndefault_mask_file = 'one.png'"), "default_mask_file", "beside alpha_mask"),
    (top("control_resolution = 64"), "control_resolution", "set control_path or data_file_keys"),
    (top("is_regularisation_data = true"), "is_regularisation_data", "all directories"),
    (own("is_regularisation_data = true"), "directory[0].is_regularisation_data", "all directories"),
    (
        own("is_regularisation_data = true\nnum_repeats = 3\n[[directory]]\npath = 'more'"),
        "directory[0].num_repeats",
        "changes nothing",
    ),
    # When.
    (own("start_epoch = 3\nend_epoch = 2"), "directory[0].end_epoch", "before start_epoch 3"),
    (top("start_step = 3\nend_step = 3"), "end_step", "not after start_step 3"),
    # What is read.
    (HERE.replace("pictures", "table.csv") + "recursive = true", "directory[0].recursive", "is a file"),
    *(
        (HERE.replace("pictures", "SHARD.TAR") + f"{key} = 'a'", f"directory[0].{key}", "is a .tar")
        for key in ("file_column", "caption_column", "image_column", "filter")
    ),
    (HERE.replace("pictures", "table.csv") + "image_column = 'a'", "directory[0].image_column", "set file_column"),
    (HERE.replace("pictures", "table.csv") + "caption_extension = '.a'", "directory[0].caption_extension", "a table"),
    (own("image_column = 'a'\nfile_column = 'b'"), "directory[0].image_column", "leave out one"),
]


@pytest.mark.parametrize(("text", "where", "words"), FAULTS)
def test_each_fault_is_one_problem(files: Folder, text: str, where: str, words: str) -> None:
    (problem,) = problems_of(files, text)
    assert problem.where == f"key `{where}`"
    assert words in problem.message


HARMLESS = [
    (top("min_ar = 0.5"), "min_ar", "without enable_ar_bucket"),
    *((own(f"{key} = 1"), f"directory[0].{key}", "without enable_ar_bucket") for key in RATIO_KEYS),
    *((top(f"enable_ar_bucket = true\nar_buckets = [1]\n{key} = 1"), key, "beside ar_buckets") for key in RATIO_KEYS),
    *((f"{SIZED}{key} = 1", f"directory[0].{key}", "beside size_buckets") for key in RATIO_KEYS),
    (own("cache_shuffle_delimiter = ';'"), "directory[0].cache_shuffle_delimiter", "stay as they are"),
    (top("cache_shuffle_delimiter = ';'"), "cache_shuffle_delimiter", "stay as they are"),
]


@pytest.mark.parametrize(("text", "where", "words"), HARMLESS)
def test_what_is_overridden_is_told_and_no_problem(files: Folder, text: str, where: str, words: str) -> None:
    assert problems_of(files, text) == []
    (remark,) = remarks_on_dataset(read_dataset(files.write("dataset.toml", text)), "dataset.toml")
    assert (remark.file, remark.where) == ("dataset.toml", f"key `{where}`")
    assert remark.message.startswith("not used") and words in remark.message


SOUND = [
    HERE,
    HERE.replace("pictures", "table.csv") + "filter = 'a > 1'\nfile_column = 'f'\ncaption_column = 'c'",
    HERE.replace("pictures", "table.parquet") + "image_column = 'a'\nrecursive = false",
    HERE.replace("pictures", "SHARD.TAR") + "data_file_keys = ['pose.png']\ncontrol_resolution = 64",
    HERE.replace("pictures", "table.csv") + "mask_path = 'masks'\nrecursive = true",
    # A table may have a column of masks, and members of a tar may be masks.
    HERE.replace("pictures", "SHARD.TAR") + "mask_probability = 0.5",
    HERE.replace("pictures", "listed") + "mask_probability = 0.5",
    own("control_path = ['controls', 'more']\ncontrol_resolution = 32\nmask_path = 'masks'\nunmasked_weight = 0.1"),
    own("mask_path = 'masks'\ndefault_mask_file = 'one.png'\nmask_probability = 0.5\nnormalize_masked_area = true"),
    own("alpha_mask = true\nunmasked_weight = 0.1"),
    f"{SIZED}augment_variants = 2\ncrop = 'random'",
    f"{SIZED}resolutions = [64]",
    own("augment_variants = 2\nflip = true\ncolor_jitter = [0.1, 0, 0, 0]"),
    own("augment_variants = 2\nvideo_clip_mode = 'single_random'\nframe_buckets = [1, 9]\nframerate = 8"),
    own("instance_prompt = 'a'\ncaption_prefix = 'b'\ntrigger_word = 'c'\nuncond_fraction = 0.1"),
    own("caption_source = 'file'\ncaption_extension = '.caption'\nmultiple_captions = 'all'"),
    own("start_epoch = 2\nend_epoch = 2\nstart_step = 1\nend_step = 2\nmin_resolution = 8\nmax_resolution = 8"),
    own("num_repeats = 3\n[[directory]]\npath = 'more'\nis_regularisation_data = true\nloss_weight = 0.5"),
    # A key with its default asks for nothing.
    own("flip = false\ncrop = 'center'\nmask_probability = 1.0\nframe_buckets = [1]\naugment_variants = 1"),
]


@pytest.mark.parametrize("text", SOUND)
def test_what_is_sound_has_no_problem(files: Folder, text: str) -> None:
    assert problems_of(files, text) == []


def test_a_key_at_the_top_may_be_of_use_to_some_directories_alone(files: Folder) -> None:
    text = top("unmasked_weight = 0.1\nar_buckets = [1]") + "[[directory]]\npath = 'more'\n"
    assert len(problems_of(files, text)) == 2
    assert problems_of(files, text + "mask_path = 'masks'\nenable_ar_bucket = true") == []
    # But a directory with a value of its own has no use for the file's.
    found = problems_of(files, text + "unmasked_weight = 0.2\nalpha_mask = true")
    assert {problem.where for problem in found} == {"key `unmasked_weight`", "key `ar_buckets`"}


def test_a_fault_of_the_files_own_keys_is_told_once(files: Folder) -> None:
    text = top("start_epoch = 3\nend_epoch = 2") + "[[directory]]\npath = 'more'\n"
    assert [problem.where for problem in problems_of(files, text)] == ["key `end_epoch`"]


def test_rules_leave_out_what_is_broken(files: Folder) -> None:
    dataset = read_dataset(files.write("other.toml", top("flip = true\ncache_dir = 'one.png'")))
    assert {problem.where for problem in check_dataset(dataset)} == {"key `flip`", "key `cache_dir`"}
    assert [problem.where for problem in check_dataset(dataset, broken=frozenset({"crop"}))] == ["key `cache_dir`"]
    # What a reader makes of a file whose directories are broken has none.
    partial = DatasetSettings.model_construct(default_mask_file=Path("gone"))
    found = check_dataset(partial, broken=frozenset({"directory"}))
    assert [problem.where for problem in found] == ["key `default_mask_file`"]


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


def test_a_run_has_one_cache() -> None:
    def dataset(cache_dir: str | None) -> DatasetSettings:
        return DatasetSettings(cache_dir=cache_dir, resolutions=[64], directory=[DirectorySettings(path="x")])

    train, other = Path("train.toml"), Path("eval.toml")
    kept = dataset(None).model_copy(update={"cache_keep_days": 3.0})
    kept.model_fields_set.add("cache_keep_days")
    (problem,) = check_evaluation_set(kept, {train: dataset("/cache")}, [train], other)
    assert problem.where == "key `cache_keep_days`"
    for cache_dir, told in ((None, False), ("/cache", False), ("/other", True)):
        problems = check_evaluation_set(dataset(cache_dir), {train: dataset("/cache")}, [train], other)
        assert bool(problems) == told, cache_dir


VALUES = {
    "num_repeats": 2,
    "start_epoch": 2,
    "end_epoch": 2,
    "start_step": 2,
    "end_step": 2,
    "uncond_fraction": 0.1,
    "uncond_fraction_per_encoder": {"t5": 0.1},
    "uncond_every_n_epochs": 2,
    "mask_probability": 0.5,
    "is_regularisation_data": True,
    "augment_variants": 2,
}


@pytest.mark.parametrize("key", TRAINING_KEYS)
def test_evaluation_refuses_what_is_for_training(key: str) -> None:
    train, other = Path("train.toml"), Path("eval.toml")
    plain = DirectorySettings(path="x")
    at_top = DatasetSettings(directory=[plain], **{key: VALUES[key]})
    in_directory = DatasetSettings(directory=[plain, DirectorySettings(path="x", **{key: VALUES[key]})])
    for dataset, place in ((at_top, key), (in_directory, f"directory[1].{key}")):
        (problem,) = check_evaluation_set(dataset, {}, [train], other)
        assert (problem.file, problem.where) == ("eval.toml", f"key `{place}`")
        assert check_evaluation_set(dataset, {}, [train], train) == []
        assert check_evaluation_set(dataset, {}, [train], other, broken=frozenset({"crop"})) == []
    same = DatasetSettings(directory=[plain], **{key: DataKeys.model_fields[key].default})
    assert check_evaluation_set(same, {}, [train], other) == []
