"""What a run is told of its data, and what it is rid of."""

import csv
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.processes import run_ranks
from tests.utils.dataset.conftest import (
    CLIP_FACTS,
    FACTS,
    LengthEncoder,
    MeanEncoder,
    dataset_of,
    draw_pictures,
    filled,
    truncate,
)
from tests.utils.media.clips import write_video
from utils.dataset.collecting import collect_together
from utils.dataset.collection import (
    FAILED_NAME,
    LISTED,
    Source,
    check_encoder_names,
    collect,
    shortfalls,
    tell,
    too_many_failures,
    without_failures,
)
from utils.dataset.manifest import Scan
from utils.errors import UserError
from utils.ranks import Ranks
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings


def source_of(*folders, name="train", **keys):
    return Source(name, Path(f"{name}.toml"), dataset_of(*folders, **keys))


def collected(cache, *sources, facts=FACTS, **choices):
    return collect(sources, facts, Scan(cache / "files.sqlite"), **{"max_failed_fraction": 1.0, **choices})


def messages(error):
    return [problem.message for problem in error.value.problems]


def test_each_file_has_its_collection(pictures, cache, tmp_path):
    draw_pictures(tmp_path / "others", 2, seed=3)
    train, other = collected(cache, source_of(pictures), source_of(tmp_path / "others", name="eval"))
    assert (len(train.samples), train.files, len(other.samples), other.files) == (6, 6, 2, 2)
    assert (train.controls, train.has_masks, train.left_out, train.rejected) == (0, False, [], [])


def test_whole_directories_are_told_at_once(pictures, cache, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        collected(cache, source_of(tmp_path / "gone", pictures), source_of(tmp_path / "empty", name="eval"))
    assert [problem.file for problem in error.value.problems] == ["train.toml", "eval.toml"]


def test_as_many_broken_files_as_are_allowed(pictures, cache):
    (pictures / "000.png").write_text("broken")
    (pictures / "001.txt").unlink()
    (train,) = collected(cache, source_of(pictures), max_failed_fraction=2 / 6)
    assert len(train.samples) == 4 and {fault.kind for fault in train.rejected} == {"unreadable", "caption missing"}
    with pytest.raises(UserError) as error:
        collected(cache, source_of(pictures), max_failed_fraction=0.33)
    told = messages(error)
    assert any("000.png: " in line for line in told) and any("001" in line for line in told)
    assert "2 of 6 files cannot be used, which is more than max_failed_fraction = 0.33 allows" in told[-1]


def test_long_lists_are_cut(cache, tmp_path):
    for path in draw_pictures(tmp_path / "a", LISTED + 5):
        path.write_text("broken")
    draw_pictures(tmp_path / "b", 1)
    with pytest.raises(UserError) as error:
        collected(cache, source_of(tmp_path / "a", tmp_path / "b"), max_failed_fraction=0.5)
    assert len(messages(error)) == LISTED + 1 and messages(error)[-1].startswith("and 5 more; 15 of 16 files")


def test_all_that_is_broken_is_listed_where_it_ends_the_run(pictures, cache, tmp_path):
    for path in draw_pictures(tmp_path / "more", LISTED + 5):
        path.write_text("broken")
    with pytest.raises(UserError, match=f"{FAILED_NAME} in the cache lists all"):
        collected(cache, source_of(pictures, tmp_path / "more"), max_failed_fraction=0.5)
    assert len((cache / FAILED_NAME).read_text().splitlines()) == 1 + LISTED + 5


def test_what_nobody_asked_for_does_not_hide_what_is_broken(pictures, cache):
    for number in range(LISTED + 2):
        (pictures / f"lone{number:02d}.txt").write_text("a caption without a picture")
    (pictures / "005.png").write_text("broken")
    lines = shortfalls(collected(cache, source_of(pictures)))
    assert lines[0] == "cannot be used: 1 (1 unreadable)" and "005.png" in lines[1]
    assert lines[2] == f"not used: {LISTED + 2} ({LISTED + 2} no picture)" and "lone00.txt" in lines[3]
    assert lines[-1] == f"not used: and 2 more; {FAILED_NAME} in the cache has all" and len(lines) == LISTED + 4


def test_what_is_not_broken_does_not_count(pictures, cache):
    """Files that nobody asked for, and pictures that are there twice."""
    (pictures / "copy.png").write_bytes((pictures / "000.png").read_bytes())
    (pictures / "copy.txt").write_text("a copy")
    (pictures / "photo.psd").write_bytes(b"unknown")
    (pictures / "lone.txt").write_text("a caption without a picture")
    (train,) = collected(cache, source_of(pictures, deduplicate=True), max_failed_fraction=0.0)
    assert len(train.samples) == 6
    assert {fault.kind for fault in train.rejected} == {"twice", "unknown kind of file", "no picture"}
    (pictures / "001.png").write_text("broken")
    # Nor does it hide what is: one of six.
    with pytest.raises(UserError, match="1 of 6 files cannot be used"):
        collected(cache, source_of(pictures, deduplicate=True), max_failed_fraction=0.15)


def test_nothing_left(pictures, cache):
    with pytest.raises(UserError, match="48x32 pixels are fewer than min_resolution = 64 squared"):
        collected(cache, source_of(pictures, min_resolution=64))
    for path in pictures.glob("*.png"):
        path.write_text("broken")
    with pytest.raises(UserError, match="none of its 6 files can be used$"):
        collected(cache, source_of(pictures))


def test_pictures_without_any_caption_lead_to_the_keys_that_give_one(pictures, cache):
    for caption in pictures.glob("*.txt"):
        caption.unlink()
    with pytest.raises(UserError, match="none of its 6 files can be used, since none has a caption. .*instance_prompt"):
        collected(cache, source_of(pictures))


def test_all_directories_have_as_many_controls(pictures, cache, tmp_path):
    draw_pictures(tmp_path / "others", 2, seed=3)
    draw_pictures(tmp_path / "controls", 6, captions=False)
    directories = [
        DirectorySettings(path=pictures, control_path=tmp_path / "controls"),
        DirectorySettings(path=tmp_path / "others"),
    ]
    settings = DatasetSettings(resolutions=[32], directory=directories)
    with pytest.raises(UserError, match="other numbers of control images"):
        collected(cache, Source("train", Path("train.toml"), settings))
    (alone,) = collected(
        cache, Source("train", Path("train.toml"), settings.model_copy(update={"directory": directories[:1]}))
    )
    assert alone.controls == 1


def test_a_row_with_another_number_of_controls_is_named(pictures, cache):
    rows = [f'{{"file": "00{n}.png", "caption": "x", "controls": ["003.png", "004.png"]}}' for n in range(2)]
    rows.append('{"file": "002.png", "caption": "x", "controls": ["003.png"]}')
    (pictures / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError) as error:
        collected(cache, source_of(pictures / "rows.jsonl", data_file_keys=["controls"]))
    (problem,) = error.value.problems
    assert problem.where == f"[[directory]] {pictures / 'rows.jsonl'}"
    assert problem.message.startswith("2 of its 3 samples have 2 control images, and ")
    assert "002.png has 1; give each row" in problem.message


def test_captions_of_training_alone_are_left_as_written(pictures, cache):
    keys = {"caption_prefix": "a "}
    sources = source_of(pictures, **keys), source_of(pictures, name="eval", **keys)
    for made, expected in ((True, "a picture 000"), (False, "picture 000")):
        train, evaluation = collected(cache, *sources, caption_versions=made)
        assert (train.samples[0].captions, evaluation.samples[0].captions) == ((expected,), ("a picture 000",))


def test_what_cannot_be_encoded_is_rejected_wherever_it_lies(pictures, cache):
    """Two files of the same broken content are tried once."""
    truncate(pictures / "002.png")
    (pictures / "copy.png").write_bytes((pictures / "002.png").read_bytes())
    (pictures / "copy.txt").write_text("a copy")
    collections = collected(cache, source_of(pictures, resolutions=[32, 64]))
    encoders = [MeanEncoder(), LengthEncoder()]
    reports = [filled(encoder, collections[0].samples, cache) for encoder in encoders]
    assert reports[0].failed == 2 and reports[1].failed == 0
    (train,) = without_failures(collections, reports)
    assert len(train.samples) == 10 and train.files == 7
    assert [(Path(fault.location).name, fault.kind) for fault in train.rejected] == [
        ("002.png", "unreadable"),
        ("copy.png", "unreadable"),
    ]
    assert len(too_many_failures([train], 0.1)) == 3 and too_many_failures([train], 2 / 7) == []
    assert without_failures(collections, reports[1:]) == collections


def test_a_broken_control_takes_its_picture_along(pictures, cache, tmp_path):
    draw_pictures(tmp_path / "controls", 6, captions=False, seed=2)
    truncate(tmp_path / "controls" / "004.png")
    directory = DirectorySettings(path=pictures, control_path=tmp_path / "controls")
    settings = DatasetSettings(resolutions=[32], directory=[directory])
    collections = collected(cache, Source("train", Path("train.toml"), settings))
    encoder = MeanEncoder()
    encoder.reads, encoder.encode = ("control",), lambda control: {"c": control}
    (train,) = without_failures(collections, [filled(encoder, collections[0].samples, cache)])
    (fault,) = train.rejected
    assert fault.location == str(pictures / "004.png") and str(tmp_path / "controls" / "004.png") in fault.reason


def test_what_is_told(pictures, cache, tmp_path, caplog):
    (pictures / "000.png").write_text("broken")
    (pictures / "001.txt").unlink()
    write_video(pictures / "long.mp4", frames=113, fps=24)
    write_video(pictures / "short.mp4", frames=20, fps=24)
    for name in ("long", "short"):
        (pictures / f"{name}.txt").write_text(name)
    collections = collected(cache, source_of(pictures, frame_buckets=[73]), facts=CLIP_FACTS)
    lines = shortfalls(collections)
    assert lines[0] == "cannot be used: 2 (1 caption missing, 1 unreadable)"
    assert sum(line.startswith("cannot be used: ") and "000.png" in line for line in lines) == 1
    assert lines[-2:] == [
        f"not used: {pictures / 'short.mp4'}: 20 frames at 24 fps = 13 at 16 fps, and the shortest bucket has 73",
        f"cut short: {pictures / 'long.mp4'}: 113 frames at 24 fps = 75 at 16 fps, bucket 73",
    ]
    with caplog.at_level(logging.WARNING):
        tell(collections, cache)
    assert set(lines) <= set(caplog.messages)
    with (cache / FAILED_NAME).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(Path(row["file"]).name, row["kind"]) for row in rows} == {
        ("000.png", "unreadable"),
        ("001.png", "caption missing"),
    }
    assert all(row["dataset"] == "train.toml" and row["reason"] for row in rows)


def test_a_list_of_broken_files_is_emptied_when_they_are_mended(pictures, cache):
    (pictures / "000.png").write_text("broken")
    tell(collected(cache, source_of(pictures)), cache)
    (pictures / "000.png").write_bytes((pictures / "001.png").read_bytes())
    tell(collected(cache, source_of(pictures)), cache)
    assert len((cache / FAILED_NAME).read_text().splitlines()) == 1


def test_ten_files_of_each_kind_are_told(pictures, cache):
    draw_pictures(pictures, 25, size=(22, 22))
    assert shortfalls(collected(cache, source_of(pictures, min_resolution=22))) == []
    draw_pictures(pictures, 1)
    lines = shortfalls(collected(cache, source_of(pictures, min_resolution=23)))
    assert len(lines) == LISTED + 1 and lines[-1] == "not used: and 14 more files"


def test_encoders_are_known_by_name(pictures, cache):
    known = collected(cache, source_of(pictures, uncond_fraction_per_encoder={"text": 0.1}))
    check_encoder_names(known, [MeanEncoder(), LengthEncoder()])
    for name in ("vae", "t5"):
        other = collected(cache, source_of(pictures, uncond_fraction_per_encoder={name: 0.1}))
        with pytest.raises(UserError, match=f"'{name}' is none of this model's text encoders; they are text"):
            check_encoder_names(other, [MeanEncoder(), LengthEncoder()])


def collect_as_rank(ranks, folders, cache):
    """What one of two ranks makes of the data; each looks at a folder of its own."""
    how = Scan(cache / "files.sqlite")
    try:
        collections = collect_together(ranks, [source_of(folders[ranks.rank])], FACTS, how, max_failed_fraction=1.0)
    except UserError as error:
        return str(error)
    return [sample.id for sample in collections[0].samples]


def test_all_ranks_have_the_same(pictures, cache):
    first, second = run_ranks(collect_as_rank, 2, [pictures, pictures], cache)
    assert first == second and len(first) == 6


def collect_on_two_machines(ranks, folders, cache):
    return collect_as_rank(replace(ranks, local_rank=0), folders, cache)


def test_ranks_that_see_other_files_are_told(pictures, cache, tmp_path):
    draw_pictures(tmp_path / "others", 6, seed=5)
    told = run_ranks(collect_on_two_machines, 2, [pictures, tmp_path / "others"], cache)
    assert all("the ranks [1] see other files than rank 0" in one for one in told)


def collect_on_one_machine(ranks, folders, cache):
    ids = collect_as_rank(ranks, folders, cache)
    return ids, sorted(path.name for path in cache.iterdir())


def test_ranks_of_one_machine_take_what_the_first_has_found(pictures, cache, tmp_path):
    """The second could only find another folder's."""
    (first, left), (second, _) = run_ranks(collect_on_one_machine, 2, [pictures, tmp_path / "gone"], cache)
    assert first == second and len(first) == 6
    assert [name for name in left if name.startswith("samples")] == []


def test_what_the_main_rank_finds_wrong_ends_all(pictures, cache, tmp_path):
    told = run_ranks(collect_as_rank, 2, [tmp_path / "gone", pictures], cache)
    assert told[0] == told[1] and str(tmp_path / "gone") in told[0]


def test_a_single_process_needs_no_others(pictures, cache):
    (alone,) = collect_together(Ranks(), [source_of(pictures)], FACTS, Scan(cache / "files.sqlite"))
    assert len(alone.samples) == 6
