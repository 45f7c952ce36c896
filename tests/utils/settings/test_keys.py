"""Keys of other trainers lead to keys that there are; guesses stay with close spellings in the same table."""

import re

import pytest

from tests.utils.settings.conftest import CHOICES
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings
from utils.settings.diffusion_pipe import FLAGS, FOREIGN, SAME, SAME_FLAGS, TYPES
from utils.settings.foreign import Foreign
from utils.settings.keys import (
    GROUPS,
    NESTED,
    SECTIONS,
    SPELLINGS,
    closest,
    edits,
    known_keys,
    run_keys,
    unknown_key,
    unknown_tables,
)
from utils.settings.kohya_and_others import ANYWHERE
from utils.settings.model_schema import ModelSettings

DATASET = known_keys("dataset", DatasetSettings) | known_keys("directory", DirectorySettings)
# Keys of models, which the tests' one model has not.
OF_MODELS = {
    "bypass_guidance_embedding",
    "expert",
    "first_frame_share",
    "from_first_frame",
    "guidance",
    "llama3_4bit",
    "llama3_path",
    "max_sequence_length",
    "prediction_type",
    "text_encoder_1_lr",
    "text_encoder_2_lr",
    "unet_lr",
}
CLASSES = [cls for choice in CHOICES.values() for cls in choice.classes.values()]
OF_TABLES = {key for cls in [*SECTIONS.values(), *CLASSES] for key in cls.model_fields}
RUN = {*run_keys(), *known_keys("model", ModelSettings)} | OF_TABLES | OF_MODELS
ALL = [*(entry for table in FOREIGN.values() for entry in table.items()), *ANYWHERE.items(), *FLAGS.items()]


@pytest.mark.parametrize(("name", "foreign"), ALL, ids=[name for name, _ in ALL])
def test_advice_names_keys_and_tables_that_there_are(name: str, foreign: Foreign) -> None:
    for said in (foreign.advice, foreign.warning):
        for key in re.findall(r"`([a-z_0-9]+)(?: = [^`]+)?`", said):
            assert key in DATASET | RUN, (name, key)
        for title in re.findall(r"`\[+([a-z_]+)\]+`", said):
            assert title in {*SECTIONS, *GROUPS, *NESTED}, (name, title)


def test_a_key_that_there_is_needs_no_advice() -> None:
    places = {
        "run": {*run_keys()},
        **{name: known_keys(name, cls) for name, cls in SECTIONS.items()},
        "dataset": known_keys("dataset", DatasetSettings),
        "directory": known_keys("directory", DirectorySettings),
    }
    for place, table in FOREIGN.items():
        assert not table.keys() & places[place], place
    # At the top of a file the one would mean something else than elsewhere; the other is a key of some models.
    assert ANYWHERE.keys() & (DATASET | RUN) == {"prior_loss_weight", "unet_lr"}
    assert "prior_loss_weight" not in known_keys("dataset", DatasetSettings)


def test_keys_of_the_same_name_are_here_and_nowhere_else_in_the_tables() -> None:
    known = {
        "run": {*run_keys()},
        "dataset": known_keys("dataset", DatasetSettings),
        "directory": known_keys("directory", DirectorySettings),
        **{name: known_keys(name, cls) | OF_TABLES for name, cls in SECTIONS.items()},
    }
    known["model"] |= OF_MODELS
    for place, names in SAME.items():
        assert set(names) <= known[place], place
        assert not set(names) & FOREIGN.get(place, {}).keys(), place
    import train

    assert set(SAME_FLAGS) <= train.FLAGS.keys()
    assert not FLAGS.keys() & train.FLAGS.keys()


def test_types_of_another_trainer_mean_types_that_there_are() -> None:
    for section, types in TYPES.items():
        for name, foreign in types.items():
            assert name not in CHOICES[section].classes
            assert not foreign.means or foreign.means in CHOICES[section].classes
            assert set(re.findall(r"`(adam[a-z0-9]*)`", foreign.note)) <= CHOICES[section].classes.keys()


def test_second_spellings_stand_for_keys_that_there_are() -> None:
    classes = {"model": ModelSettings, "dataset": DatasetSettings, "directory": DirectorySettings}
    for section, others in SPELLINGS.items():
        assert set(others.values()) <= classes[section].model_fields.keys()
        assert not others.keys() & classes[section].model_fields.keys()


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        ("abc", "abc", 0),
        ("", "abc", 3),
        ("abc", "ab", 1),
        ("abc", "xbc", 1),
        ("lenght", "length", 1),
        ("kitten", "sitting", 3),
        ("ca", "abc", 3),
    ],
)
def test_edits_count_letters_and_swaps(one: str, other: str, count: int) -> None:
    assert edits(one, other) == edits(other, one) == count


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("epoch", "epochs"),
        ("epcohs", "epochs"),
        ("output_directory", None),
        ("outputdir", "output_dir"),
        ("checkpoint_every_n_minute", "checkpoint_every_n_minutes"),
        ("gradient_acumulation_step", "gradient_accumulation_steps"),
        ("complie", "compile"),
        ("comp", None),
        ("sed", None),
        ("gradient_release", None),
        ("learning", None),
    ],
)
def test_a_guess_is_a_slip_of_the_pen(key: str, meant: str | None) -> None:
    assert closest(key, run_keys()) == meant


MISLED = """ae base_weights clip_l ckpt_path compile_mode enable_wildcard gradient_release vae_tiling t5_path clip_path
    llm_path byt5_path text_encoder_path single_file_path rank_dropout self_attn_lr cross_attn_lr mlp_lr mod_lr cfg
    image_shift huber_delta smooth_l1_beta online_captions subsample_ratio x_axis_examples""".split()


@pytest.mark.parametrize("key", MISLED)
@pytest.mark.parametrize("place", ["run", *SECTIONS, "dataset", "directory"])
def test_a_foreign_name_is_no_slip_of_another_key(key: str, place: str) -> None:
    here = {
        "run": run_keys(),
        "dataset": known_keys("dataset", DatasetSettings),
        "directory": known_keys("directory", DirectorySettings),
        **{name: known_keys(name, cls) for name, cls in SECTIONS.items()},
    }[place]
    assert "did you mean" not in unknown_key(key, place, here, CHOICES)


def test_a_table_is_guessed_from_tables_alone() -> None:
    assert unknown_tables({"optimiser": {}, "sampler": {}, "eval_dump": {}, "network": {}}, CHOICES) == {
        "optimiser": "optimizer",
        "sampler": "sampling",
        "eval_dump": "eval",
        "network": None,
    }
