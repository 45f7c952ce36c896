"""What is told of files that can be used, but probably not as they were meant."""

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from tests.utils.dataset.conftest import FACTS, LengthEncoder, MeanEncoder, dataset_of, draw_pictures, scanned, truncate
from tests.utils.media.icc import DISPLAY_P3, of_rgb
from utils.dataset.collection import LISTED, Source, collect, shortfalls, with_truncated
from utils.dataset.decoding_check import undecodable
from utils.dataset.manifest import Scan
from utils.errors import UserError
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings


def source(folder, name="train", file=None, resolutions=(32,), **keys):
    directory = DirectorySettings(path=folder, **keys)
    return Source(
        name, Path(file or f"{name}.toml"), DatasetSettings(resolutions=list(resolutions), directory=[directory])
    )


def remarks(cache, *sources, **choices):
    """(title, name of the file, text) of all that is remarked."""
    collections = collect(sources, FACTS, Scan(cache / "files.sqlite"), **choices)
    found = [remark for collection in collections for remark in collection.remarks]
    assert [line for line in shortfalls(collections) if "not used" not in line][: len(found)] == [
        f"{one.title}: {one.file}: {one.text}" for one in found
    ]
    return [(one.title, Path(one.file).name, one.text) for one in found]


def masked(folder, levels, size=(48, 32), mode="L"):
    """Captioned pictures and a mask of one level for each."""
    draw_pictures(folder / "pictures", len(levels), size=size)
    (folder / "masks").mkdir()
    for number, level in enumerate(levels):
        Image.new(mode, size, level).save(folder / "masks" / f"{number:03d}.png")
    return {"folder": folder / "pictures", "mask_path": folder / "masks"}


def test_nothing_is_remarked_where_all_is_well(pictures, cache):
    assert remarks(cache, source(pictures)) == []


def test_colours_that_are_taken_as_they_are_are_named(tmp_path, cache):
    picture = draw_pictures(tmp_path, 3)[0]
    Image.open(picture).save(picture, icc_profile=b"profile")
    wide = tmp_path / "001.png"
    Image.open(wide).save(wide, icc_profile=of_rgb(DISPLAY_P3, 2.2))
    for _ in range(2):
        ((title, name, text),) = remarks(cache, source(tmp_path))
        assert (title, name) == ("colours not converted", "000.png") and "save it without a profile" in text
    digests = {Path(row.media.locator.file): row.media.digest for row in scanned(dataset_of(tmp_path), cache).rows}
    plain = {path: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in digests}
    assert {path for path in digests if digests[path] != plain[path]} == {wide}, (
        "what an older version has encoded of it was another picture"
    )


def test_inks_that_nobody_knows_are_named_and_counted(tmp_path, cache):
    for picture in draw_pictures(tmp_path, LISTED + 2):
        Image.open(picture).convert("CMYK").save(picture.with_suffix(".jpg"))
        picture.unlink()
    told = [line for line in shortfalls(collect([source(tmp_path)], FACTS, Scan(cache / "files.sqlite"))) if line]
    first = f"colours not converted: {tmp_path / '000.jpg'}: it is CMYK without a profile that can be used, "
    assert len(told) == LISTED + 1 and told[0].startswith(first) and told[0].endswith("convert it to sRGB")
    assert told[-1] == "colours not converted: and 2 more files"


def test_an_animation_of_which_only_the_beginning_is_whole_is_named(tmp_path, cache):
    frames = [Image.effect_noise((48, 32), 50 + number) for number in range(6)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.txt").write_text("noise")
    (tmp_path / "a.gif").write_bytes((tmp_path / "a.gif").read_bytes()[:-2000])
    for _ in range(2):
        ((title, name, text),) = remarks(cache, source(tmp_path))
        assert (title, name) == ("used as a picture", "a.gif") and text.startswith("is broken behind frame ")


def test_masks_of_next_to_no_weight_are_named(tmp_path, cache):
    keys = masked(tmp_path, [0, 2, 3, 128])
    found = remarks(cache, source(**keys))
    assert [(title, name) for title, name, _ in found] == [("next to no weight", f"00{n}.png") for n in (0, 1)]
    assert "masks/001.png is 0.78% on average" in found[1][2]
    # What is masked out counts too, or the weight is divided by it.
    assert remarks(cache, source(**keys, unmasked_weight=0.1)) == []
    assert [name for _, name, _ in remarks(cache, source(**keys, normalize_masked_area=True))] == ["000.png"]


def test_a_mask_is_looked_at_once(tmp_path, cache, monkeypatch):
    keys = masked(tmp_path, [0, 128])
    first = remarks(cache, source(**keys))
    monkeypatch.setattr("utils.dataset.mask_means._mean", lambda mask: pytest.fail("looked at again"))
    assert remarks(cache, source(**keys)) == first


def test_masks_that_are_all_black_end_the_run(tmp_path, cache):
    keys = masked(tmp_path, [0, 0, 0])
    with pytest.raises(UserError, match="all 3 masks are black, the first is .*000.png"):
        remarks(cache, source(**keys))
    assert len(remarks(cache, source(**keys, unmasked_weight=0.005))) == 3


def test_a_mask_that_cannot_be_decoded_is_told_at_its_picture(tmp_path, cache):
    keys = masked(tmp_path, [255, 100])
    mask = tmp_path / "masks" / "001.png"
    mask.write_bytes(mask.read_bytes()[:60])
    with pytest.raises(UserError, match="pictures/001.png: .*masks/001.png"):
        remarks(cache, source(**keys))


def test_masks_that_mask_nothing_are_told_by_directory(tmp_path, cache):
    keys = masked(tmp_path, [255, 255])
    ((title, name, text),) = remarks(cache, source(**keys))
    assert (title, name) == ("masks nothing", "pictures") and "all 2 masks are white" in text
    ((title, _, text),) = remarks(cache, source(keys["folder"], alpha_mask=True))
    assert title == "masks nothing" and "no picture has transparency" in text
    white = tmp_path / "masks" / "000.png"
    assert remarks(cache, source(keys["folder"], default_mask_file=white)) == []


def test_masks_of_regions_are_remarked_by_what_they_mean(tmp_path, cache):
    """All black ones keep all, and end no run."""
    keys = masked(tmp_path, [0, 3, 255])
    found = remarks(cache, source(**keys), masks_weigh=False)
    assert [(title, name) for title, name, _ in found] == [("next to nothing made anew", "000.png")]
    assert "masks/000.png is 0.00% on average; white is what is made anew" in found[0][2]
    black = tmp_path / "masks" / "000.png"
    found = remarks(cache, source(keys["folder"], default_mask_file=black), masks_weigh=False)
    assert len(found) == 3
    found = remarks(cache, source(keys["folder"]), masks_weigh=False)
    assert {(title, text) for title, _, text in found} == {
        ("without a mask", "it has no mask, so that all of it is made anew")
    }
    ((_, _, text),) = remarks(cache, source(keys["folder"], alpha_mask=True), masks_weigh=False)
    assert text == "no picture has transparency, so that nothing is kept"


def test_pictures_without_a_caption_are_named_wherever_captions_come_from(pictures, cache):
    (pictures / "002.txt").write_text(" \n")
    assert [(title, name) for title, name, _ in remarks(cache, source(pictures))] == [("without a caption", "002.png")]
    table = pictures.parent / "table.csv"
    table.write_text("file_name,caption\npictures/000.png,one\npictures/001.png,\n")
    found = remarks(cache, source(table))
    assert [(title, name) for title, name, _ in found] == [("without a caption", "001.png")]
    assert remarks(cache, source(pictures, instance_prompt="")) == []


def test_wildcards_that_are_trained_as_text_are_named(pictures, cache):
    (pictures / "001.txt").write_text("a {red|blue} field")
    ((title, name, text),) = remarks(cache, source(pictures))
    assert (title, name) == ("wildcards as text", "001.png") and "'{red|blue}'" in text and "enable_wildcard" in text
    assert remarks(cache, source(pictures, enable_wildcard=True)) == []


class FourWords(LengthEncoder):
    """A text encoder that reads the first four words."""

    token_limit = 4

    def token_count(self, caption):
        return len(caption.split())


def test_captions_that_are_longer_than_a_text_encoder_reads_are_named(pictures, cache):
    (pictures / "001.txt").write_text("one two three four five")
    (pictures / "002.txt").write_text("one two three four")
    (collection,) = collect([source(pictures, resolutions=(32, 64))], FACTS, Scan(cache / "files.sqlite"))
    encoders = [MeanEncoder(), LengthEncoder(), FourWords()]
    (found,) = with_truncated([collection], encoders, lambda: None)
    ((title, file, text),) = [(one.title, one.file, one.text) for one in found.remarks if one.title != "enlarged"]
    assert (title, Path(file).name) == ("caption truncated", "001.png")
    assert text == "text reads 4 of the 5 tokens of 'one two three four five'"


def test_files_of_which_only_the_header_is_sound_are_found_by_decoding(pictures, cache, tmp_path):
    draw_pictures(tmp_path / "masks", 6, captions=False)
    truncate(pictures / "003.png")
    directory = DirectorySettings(path=pictures, control_path=tmp_path / "masks")
    settings = DatasetSettings(resolutions=[32], directory=[directory])
    truncate(tmp_path / "masks" / "005.png")
    (collection,) = collect([Source("train", Path("train.toml"), settings)], FACTS, Scan(cache / "files.sqlite"))
    assert len(collection.samples) == 6
    failures = undecodable(collection.samples, lambda: None)
    assert [failure.reason.split(":")[0] for failure in failures] == [
        str(tmp_path / "masks" / "005.png"),
        str(pictures / "003.png"),
    ]


def test_pictures_that_are_enlarged_by_more_than_half_are_named(tmp_path, cache):
    draw_pictures(tmp_path, 1, size=(64, 64))
    draw_pictures(tmp_path / "small", 1, size=(42, 60))
    assert remarks(cache, source(tmp_path, resolutions=(32, 64, 96))) == []
    ((title, name, text),) = remarks(cache, source(tmp_path / "small", resolutions=(32, 64)))
    assert (title, name) == ("enlarged", "000.png")
    assert text.startswith("42x60 pixels are enlarged 1.5 times to 64x64x1; no_upscale")
    assert remarks(cache, source(tmp_path / "small", resolutions=(32, 64), no_upscale=True)) == []


def test_pictures_of_which_most_is_cut_off_are_named(tmp_path, cache):
    draw_pictures(tmp_path, 1, size=(400, 40))
    draw_pictures(tmp_path / "half", 1, size=(80, 40))
    assert remarks(cache, source(tmp_path / "half")) == []
    ((title, name, text),) = remarks(cache, source(tmp_path))
    assert (title, name) == ("mostly cut off", "000.png") and text.startswith(
        "400x40 pixels lose 90% to the crop of 32x32"
    )
    assert remarks(cache, source(tmp_path, crop="none")) == []
    assert remarks(cache, source(tmp_path, enable_ar_bucket=True, max_ar=10.0)) == []


def test_pictures_in_training_and_evaluation_are_named(pictures, cache, tmp_path):
    draw_pictures(tmp_path / "held_out", 2, seed=5)
    (tmp_path / "held_out" / "001.png").write_bytes((pictures / "004.png").read_bytes())
    ((title, name, text),) = remarks(cache, source(pictures), source(tmp_path / "held_out", "eval"))
    assert (title, name) == ("in both sets", "001.png") and f"{pictures / '004.png'}" in text
    # Whoever evaluates the training set itself means to.
    assert remarks(cache, source(pictures), source(pictures, "eval", "train.toml")) == []
