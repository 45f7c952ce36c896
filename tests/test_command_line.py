"""The flags of the command line, ours and those of the trainer that users come from."""

from __future__ import annotations

from pathlib import Path

import pytest

import train
from utils.run.flags import words_of

CONFIG = ["--config", "run.toml"]


@pytest.mark.parametrize(
    "words", [["--deepspeed"], ["--i_know_what_i_am_doing", "--deepspeed"], ["--i-know-what-i-am-doing"]]
)
def test_flags_of_diffusion_pipe_that_ask_for_nothing_are_taken(words: list[str]) -> None:
    arguments = train.parse_arguments([*words, *CONFIG])
    assert sorted(arguments.foreign) == sorted(word[2:].replace("-", "_") for word in words)
    assert train.parse_arguments(CONFIG).foreign == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--deepspeed_config", "zero.json"], "--deepspeed_config: write instead: `deepspeed_config` in the config"),
        (["--test_sample"], "--test_sample: write instead: `sample_before_first_step = true`"),
    ],
)
def test_flags_of_diffusion_pipe_that_ask_for_something_are_answered(
    capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        train.parse_arguments([*CONFIG, *words])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_help_lists_our_flags_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    said = capsys.readouterr().out
    assert "--trust_cache" in said and "--deepspeed" not in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--resume_from_checkpoint"], "leave --resume_from_checkpoint out"),
        (["--dump-dataset", "shown"], "leave --dump_dataset out"),
        (["--check"], "leave --check out"),
    ],
)
def test_an_export_does_nothing_else(capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert train.parse_arguments([*CONFIG, "--export", "runs/one"]).export == "runs/one"
    with pytest.raises(SystemExit):
        train.parse_arguments([*CONFIG, "--export", "runs/one", *words])
    assert told in capsys.readouterr().err


def test_an_export_needs_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse_arguments([*CONFIG, "--export", ""])
    assert "--export: name a checkpoint" in capsys.readouterr().err


def test_several_configs_are_named_in_one_flag_or_in_several() -> None:
    for words in (["--config", "a.toml", "b.toml"], ["--config", "a.toml", "--check", "--config", "b.toml"]):
        assert train.parse_arguments(words).configs == [Path("a.toml"), Path("b.toml")]
    assert train.parse_arguments(CONFIG).config == Path("run.toml")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config", "./a.toml"], "a.toml is named twice"),
        (["--export", "runs/one"], "--export is for one config"),
        (["--sample_only", "runs/one"], "--sample_only is for one config"),
        (["--dump_dataset", "shown"], "--dump_dataset is for one config"),
        (["--resume_from_checkpoint", "runs/one"], "leave runs/one out"),
    ],
)
def test_what_is_of_one_config_is_not_asked_of_several(
    capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    with pytest.raises(SystemExit):
        train.parse_arguments(["--config", "a.toml", "b.toml", *words])
    assert told in capsys.readouterr().err


def test_the_words_for_a_run_of_a_list_ask_for_the_same() -> None:
    words = ["--resume-from-checkpoint", "--reset_optimizer", "--i-know-what-i-am-doing", "--master_port", "29501"]
    asked = train.parse_arguments([*words, "--config", "a.toml", "b.toml", "--trust-cache"])
    of_one = train.parse_arguments([*words_of(asked), *CONFIG])
    different = {name for name, value in vars(asked).items() if vars(of_one)[name] != value}
    assert different == {"config", "configs"}
