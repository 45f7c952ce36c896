"""Files of prompts, as several trainers' users write them, and the samples that follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.settings.prompt_files import parse
from utils.settings.run_tables import SamplingSettings
from utils.settings.sample_requests import SampleRequest, remarks_of, requests_of

KOHYA = """\
# prompts of the run

a cat, sleeping --w 512 --h 768 --d 1 --s 28 --l 7.5 --g 3.5 --n blurred, dark --f 5 --ci pictures/a cat.png --cim a.png
  a -- plain - one
a dog --am 0.5 --ss euler_a
"""


def drawn(text: str, name: str = "p.txt", *, second: bool = True, **sampling: object) -> list[SampleRequest]:
    settings = SamplingSettings(prompt_file=Path(name), **sampling)
    return requests_of(settings, second, parse(Path(name), text))


def test_lines_are_read_as_kohyas_scripts_read_them() -> None:
    cat, plain, dog = drawn(KOHYA, steps=20, seed=9)
    one = cat.settings
    assert (one.width, one.height, one.seed, one.steps, one.frames) == (512, 768, 1, 28, 5)
    assert (cat.prompt, one.negative_prompt) == ("a cat, sleeping", "blurred, dark")
    assert cat.control_images == [Path("pictures/a cat.png")] and cat.seeded and cat.where == "line 3"
    assert cat.mask_image == Path("a.png") and plain.mask_image is None
    assert plain.prompt == "a -- plain - one" and not plain.seeded
    assert (plain.settings.steps, plain.settings.seed, plain.settings.adapter_scale) == (20, 9, 1.0)
    assert dog.settings.adapter_scale == 0.5


def test_the_guidance_is_that_of_the_models_kind_and_the_other_is_told() -> None:
    assert [one.settings.guidance for one in drawn(KOHYA, second=True)] == [7.5, 3.5, 3.5]
    assert [one.settings.guidance for one in drawn(KOHYA, second=False, guidance=2.0)] == [3.5, 2.0, 2.0]
    # A scale of 1 is none: nothing is lost.
    assert [one.settings.guidance for one in drawn("a --l 1", second=False, guidance=2.0)] == [2.0]
    file = parse(Path("p.txt"), KOHYA)
    for second, named in ((True, "--g"), (False, "--l")):
        sampler, guidance = remarks_of(file, second)
        assert sampler.where == "line 5 --ss" and "not used: it is a sampler" in sampler.message
        assert guidance.where.startswith("line 3") and named in guidance.where and "is not used" in guidance.message
    assert not remarks_of(parse(Path("p.txt"), "a --l 1"), False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a cat --width 5", "line 1 --width: no such flag; known are w, h"),
        ("a cat --w", "line 1 --w: has no value"),
        ("a\nb --s many", "line 2 --s: must be a whole number; given: many"),
        ("a --s 0", r"line 1 steps: must be at least 1; given: 0"),
        ("a --w 64 --w 65", "line 1 --w: is given twice"),
        ("--w 64", "line 1: has no prompt"),
        ("# nothing\n", "has no prompts"),
        ("a --l -2", "line 1 cfg_scale: must be a number, at least 0"),
        ("a --d 99999999999999999999", "line 1 seed: must be less than"),
    ],
)
def test_what_is_wrong_with_a_line_is_told_with_its_place(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as raised:
        parse(Path("p.txt"), text)
    assert {problem.file for problem in raised.value.problems} == {"p.txt"}


def test_tables_say_the_same_in_json_and_toml() -> None:
    kohya_json = json.dumps(["a fox", {"prompt": "a cat", "sample_steps": 5, "scale": 4, "width": 64, "seed": 3}])
    kohya_toml = '[prompt]\nsample_steps = 5\nscale = 4\n[[prompt.subset]]\nprompt = "a cat"\nwidth = 64\nseed = 3\n'
    ours = '[[samples]]\nprompt = "a cat"\nsteps = 5\nguidance = 4.0\nwidth = 64\nseed = 3\ncontrol_images = "a.png"\n'
    fox, cat = drawn(kohya_json, "p.json")
    (other,), (own,) = drawn(kohya_toml, "p.toml"), drawn(ours, "p.toml")
    assert fox.prompt == "a fox" and cat.settings.width == 64 and cat.seeded and cat.where == "sample 2"
    assert cat.settings.model_dump() == other.settings.model_dump()
    assert own.control_images == [Path("a.png")] and own.settings.guidance == cat.settings.guidance == 4.0
    (masked,) = drawn('[{"prompt": "a cat", "control_image_mask_path": "m.png"}]', "p.json")
    assert masked.mask_image == Path("m.png")
    assert [one.prompt for one in drawn('{"fox": "a fox", "cat": "a cat"}', "p.json")] == ["a fox", "a cat"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.json", "[1]", "sample 1: must be a prompt, or a table"),
        ("p.json", '["a", {"prompt": "b", "witdh": 5}]', "sample 2 witdh: no such key; did you mean `width`"),
        ("p.json", '{"samples": 5}', "is no list of samples"),
        ("p.json", "[", "is not JSON"),
        ("p.toml", "a", "is not valid TOML"),
        ("p.toml", 'width = 5\n[[samples]]\nprompt = "a"', "key `width`: no such key; samples are"),
        ("p.json", '[{"prompt": "a", "width": "64"}]', "sample 1 width: must be a whole number"),
    ],
)
def test_what_is_wrong_with_a_table_is_told_with_its_place(name: str, text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse(Path(name), text)


def test_samples_come_in_order_and_have_what_all_have_where_they_say_nothing() -> None:
    sampling = SamplingSettings(
        prompts=["a", "b"],
        control_images=["1.png", "2.png"],
        mask_images=["m.png"],
        samples=[
            {"prompt": "c", "width": 64},
            {"prompt": "d", "seed": 0, "control_images": ["3.png"], "mask_image": "n.png"},
        ],
        width=32,
        negative_prompt="dark",
    )
    requests = requests_of(sampling, True)
    assert [one.prompt for one in requests] == ["a", "b", "c", "d"]
    assert [one.place for one in requests] == [0, 1, 2, 3]
    assert [one.settings.width for one in requests] == [32, 32, 64, 32]
    assert [one.seeded for one in requests] == [False, False, False, True]
    assert [list(map(str, one.control_images)) for one in requests] == [["1.png"], ["2.png"], [], ["3.png"]]
    assert [str(one.mask_image) for one in requests] == ["m.png", "m.png", "m.png", "n.png"]
    assert {one.settings.negative_prompt for one in requests} == {"dark"}
    several = requests_of(sampling.model_copy(update={"mask_images": [Path("1.gif"), Path("2.gif")]}), True)
    assert [one.mask_image and str(one.mask_image) for one in several] == ["1.gif", "2.gif", None, "n.png"]
    shared = sampling.model_copy(update={"control_images": sampling.control_images[:1]})
    assert [list(map(str, one.control_images)) for one in requests_of(shared, True)][2] == ["1.png"]
