"""What encoders read of a sample, and by which name it is kept, against what is read of the files by hand."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.utils.dataset.conftest import (
    CLIP_FACTS,
    DifferenceEncoder,
    InstructionEncoder,
    LengthEncoder,
    MeanEncoder,
    PixelEncoder,
    WeightEncoder,
    counts,
    dataset_of,
    draw_pictures,
    filled,
    item,
    plain_sample,
    samples_of,
)
from tests.utils.media.clips import numbered, write_video
from utils.dataset.encoders import decoded_bytes, inputs_of, item_key, items_wanted, versions
from utils.dataset.inputs import GUIDE, REGIONS
from utils.dataset.masks import MASK, MaskEncoder
from utils.dataset.samples import SampleVersion, evaluation_version
from utils.media.colour import Jitter
from utils.media.decode import load_clip, load_image, load_mask
from utils.media.geometry import View
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings


def test_a_key_names_all_that_an_item_is_made_from():
    version = evaluation_version(plain_sample("a", fps=16.0))
    sample, bucket = version.sample, version.sample.bucket

    def other(**parts):
        return replace(version, sample=replace(sample, **parts))

    def took(**parts):
        return replace(version, take=replace(version.take, **parts))

    pictures = {
        "other picture": other(media=replace(sample.media, digest="0" * 32)),
        "other width": other(bucket=replace(bucket, width=48)),
        "other frames": other(bucket=replace(bucket, frames=5)),
        "other rate": other(fps=8.0),
        "flipped": took(flip=True),
        "crop": took(crop=(0.0, 0.5)),
        "whole": took(crop="none"),
        "colours": took(jitter=Jitter(1.1)),
        "start": took(start=0.5),
    }
    the_same = {
        "caption": replace(version, caption="another"),
        "name": other(id="x", repeats=4.0, media=replace(sample.media, locator=None)),
        "weight": other(rules=plain_sample(loss_weight=0.5).rules),
    }
    vae, text = MeanEncoder(), LengthEncoder()
    keys = {item_key(vae, one) for one in (version, *pictures.values())}
    assert len(keys) == 1 + len(pictures)
    assert {item_key(vae, one) for one in the_same.values()} == {item_key(vae, version)}
    captions = {item_key(text, one) for one in (version, *pictures.values(), the_same["name"])}
    assert captions == {item_key(text, version)} and item_key(text, the_same["caption"]) not in captions
    assert item_key(MeanEncoder("mean-2"), version) not in keys


def test_keys_stay_what_they_were():
    """Another key for the same item would have every cache encoded again."""
    version = replace(evaluation_version(plain_sample("a", fps=16.0)), caption='Käse "und" \n\\ \u2028 🐈')
    assert item_key(MeanEncoder(), version) == "d5c889d625770e562951f020a8ce37fa033570fc"
    assert item_key(LengthEncoder(), version) == "992d59cea468821eb8d4f721794f21a2b8387264"


def beside(pictures, **keys):
    directory = DirectorySettings(path=pictures, **keys)
    return DatasetSettings(resolutions=[32], directory=[directory])


def test_control_images(pictures, cache, tmp_path):
    draw_pictures(tmp_path / "controls", 6, size=(24, 16), captions=False, seed=1)
    samples = samples_of(beside(pictures, control_path=tmp_path / "controls"), cache)
    edit = DifferenceEncoder()
    assert counts(filled(edit, samples, cache)) == (6, 0, 6, 0)
    for sample in samples:
        files = (sample.media, sample.controls[0].media)
        pixels, control = (load_image(file.locator.path, View(32, 32)) for file in files)
        found = item(cache, edit, evaluation_version(sample))["difference_BC"]
        torch.testing.assert_close(found, (pixels - control).mean(dim=(1, 2, 3)))
    control = samples[0].controls[0]
    other = replace(samples[0], controls=(replace(control, media=replace(control.media, digest="0" * 32)),))
    assert item_key(edit, evaluation_version(other)) != item_key(edit, evaluation_version(samples[0]))
    with pytest.raises(ValueError, match="000.png: .*set `control_path`"):
        item_key(edit, evaluation_version(replace(samples[0], controls=())))


def test_further_control_images(pictures, cache, tmp_path):
    class Second(DifferenceEncoder):
        reads = ("pixels", "control_2")

        def encode(self, *, pixels, control_2):
            return super().encode(pixels=pixels, control=control_2)

    for number in (1, 2):
        draw_pictures(tmp_path / f"c{number}", 6, captions=False, seed=number)
    samples = samples_of(beside(pictures, control_path=[tmp_path / "c1", tmp_path / "c2"]), cache)
    filled(Second(), samples, cache)
    swapped = [replace(sample, controls=sample.controls[::-1]) for sample in samples]
    assert counts(filled(DifferenceEncoder(), swapped, cache / "other")) == (6, 0, 6, 0)
    for sample, other in zip(samples, swapped, strict=True):
        found = item(cache, Second(), evaluation_version(sample))["difference_BC"]
        assert torch.equal(
            found, item(cache / "other", DifferenceEncoder(), evaluation_version(other))["difference_BC"]
        )


def gradient(path, size=(64, 32)):
    """A picture whose every place can be told by its colour."""
    picture = Image.new("RGB", size)
    picture.putdata([(4 * x, 8 * y, 0) for y in range(size[1]) for x in range(size[0])])
    picture.save(path)


def test_masks_and_controls_follow_the_crop_and_flip_of_their_take(cache, tmp_path):
    """The same picture as target, control and mask: what each becomes must show the same place."""
    for name in ("pictures", "controls", "masks"):
        (tmp_path / name).mkdir()
        gradient(tmp_path / name / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("")
    keys = {"control_path": tmp_path / "controls", "mask_path": tmp_path / "masks"}
    varied = {"crop": "random", "flip": True, "augment_variants": 4, "color_jitter": (0.3, 0, 0, 0)}
    (sample,) = samples_of(beside(tmp_path / "pictures", **keys, **varied), cache)
    assert {take.flip for take in sample.takes} == {False, True} and len({take.crop for take in sample.takes}) == 4

    class Control(PixelEncoder):
        name, reads = "control", ("control",)

        def encode(self, *, control):
            return {"control": control}

    masks = MaskEncoder(lambda width, height, frames: (1, height, width))
    encoders = [PixelEncoder(), Control(), masks]
    assert [counts(filled(encoder, [sample], cache)) for encoder in encoders] == [(4, 0, 4, 0)] * 3
    for take in sample.takes:
        pixels, control, mask = (item(cache, encoder, SampleVersion(sample, take, "", "")) for encoder in encoders)
        plain = load_image(tmp_path / "pictures" / "a.png", View(32, 32, take.crop, take.flip))[:, 0]
        assert torch.equal(control["control"][:, 0], plain)
        jittered = ((plain + 1) * take.jitter.brightness - 1).clamp(-1, 1)
        torch.testing.assert_close(pixels["latents"], jittered, atol=1e-5, rtol=0)
        luma = (plain + 1) / 2 * torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        # Masks are scaled by another filter, and read in whole levels.
        torch.testing.assert_close(mask[MASK], luma.sum(0, keepdim=True), atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [(256, 128), (128, 64), (256, 127), (64, 32)])
def test_a_mask_of_another_size_lies_where_its_picture_does(cache, tmp_path, size):
    """The left quarter is red and is masked in; all of a picture of 2:1 but its middle half is cropped away."""
    picture, mask = Image.new("RGB", (256, 128), "blue"), Image.new("L", size)
    picture.paste("red", (0, 0, 96, 128))
    mask.paste(255, (0, 0, size[0] * 96 // 256, size[1]))
    for name, image in (("pictures", picture), ("masks", mask)):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("")
    (sample,) = samples_of(beside(tmp_path / "pictures", mask_path=tmp_path / "masks"), cache)
    masks = MaskEncoder(lambda width, height, frames: (1, height // 8, width // 8))
    filled(masks, [sample], cache)
    weight = item(cache, masks, evaluation_version(sample))[MASK][0]
    torch.testing.assert_close(weight, torch.tensor([1.0, 0, 0, 0]).expand(4, 4), atol=0.02, rtol=0)


class RegionsEncoder(PixelEncoder):
    name, reads = "regions", (REGIONS,)


class GuideEncoder(PixelEncoder):
    name, reads = "guide", (GUIDE,)


@pytest.mark.parametrize("control", ["clips", "controls"])
def test_regions_lie_on_their_clip_in_place_and_time(cache, tmp_path, control):
    """The mask is a clip of half the size and half the rate. Where a clip that follows itself is made anew, it is grey;
    another clip is as it is."""
    for name in ("clips", "controls", "masks"):
        (tmp_path / name).mkdir()
    write_video(tmp_path / "clips" / "a.mp4", frames=27, fps=16)
    write_video(tmp_path / "controls" / "a.mp4", frames=27, fps=16, picture=lambda index: numbered(255 - index))
    write_video(tmp_path / "masks" / "a.mp4", frames=14, fps=8, picture=lambda index: numbered(7 * index, 32, 24))
    (tmp_path / "clips" / "a.txt").write_text("")
    keys = {"control_path": tmp_path / control, "mask_path": tmp_path / "masks"}
    varied = {"crop": "random", "flip": True, "augment_variants": 2}
    directory = DirectorySettings(path=tmp_path / "clips", **keys, **varied)
    dataset = DatasetSettings(resolutions=[32], frame_buckets=[9], directory=[directory], video_clip_mode="chunks")
    samples = samples_of(dataset, cache, CLIP_FACTS)
    made = [one for sample in samples for one in versions(RegionsEncoder(), sample)]
    assert {one.take.flip for one in made} == {False, True} and len({one.take.start for one in made}) == 3
    for version in made:
        take, bucket = version.take, version.sample.bucket
        when = take.start, bucket.frames, 16.0
        view = View(bucket.width, bucket.height, take.crop, take.flip)
        region = load_mask(tmp_path / "masks" / "a.mp4", view, *when).round()
        guide = load_clip(tmp_path / control / "a.mp4", view, *when)
        expected = guide * (1 - region) if control == "clips" else guide
        found = inputs_of(RegionsEncoder(), version)[REGIONS]
        assert 0.1 < region.mean() < 0.9 and torch.equal(found, torch.cat([expected, region]))
        assert (region[:, 0] - region[:, -1]).abs().mean() > 0.1


def test_what_regions_are_made_of_is_in_their_keys(cache, tmp_path):
    """And masks are in no key of what reads none."""
    draw_pictures(tmp_path / "pictures", 1)
    draw_pictures(tmp_path / "masks", 1, captions=False)
    keys = {"control_path": tmp_path / "pictures", "mask_path": tmp_path / "masks"}
    (sample,) = samples_of(beside(tmp_path / "pictures", **keys), cache)
    (control,) = sample.controls
    others = [
        sample,
        replace(sample, mask=None),
        replace(sample, mask=replace(sample.mask, media=replace(sample.mask.media, digest="0" * 32))),
        replace(sample, mask=replace(sample.mask, is_alpha=True)),
        replace(sample, controls=(replace(control, media=replace(control.media, digest="0" * 32)),)),
        # No longer its own file.
        replace(sample, media=replace(sample.media, digest="0" * 32)),
    ]
    assert len({item_key(RegionsEncoder(), evaluation_version(one)) for one in others}) == len(others)
    assert len({item_key(GuideEncoder(), evaluation_version(one)) for one in others}) == 2
    unmasked = evaluation_version(others[1])
    guide_4FHW, whole = inputs_of(RegionsEncoder(), unmasked)[REGIONS], torch.ones(1, 1, 32, 32)
    assert torch.equal(guide_4FHW, torch.cat([torch.zeros(3, 1, 32, 32), whole]))


# Of a strip of 128 x 64: where black fields begin, how wide they are, and where the square then is black.
FITTED = {
    "crop": ((32, 80), 16, [[1, 0, 0, 1]] * 4),
    "stretch": ((0, 96), 32, [[1, 0, 0, 1]] * 4),
    "pad": ((0, 96), 32, [[0, 0, 0, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0]]),
}


@pytest.mark.parametrize("fit", FITTED)
def test_a_control_that_is_a_view_of_its_own_is_fitted_as_asked(cache, tmp_path, fit):
    starts, width, expected = FITTED[fit]
    control = Image.new("RGB", (128, 64), "white")
    for left in starts:
        control.paste("black", (left, 0, left + width, 64))
    for name, image in (("pictures", Image.new("RGB", (64, 64))), ("controls", control)):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("")
    keys = {"control_path": tmp_path / "controls", "control_fit": fit}
    (sample,) = samples_of(beside(tmp_path / "pictures", **keys), cache)
    version = evaluation_version(sample)
    pixels = load_image(tmp_path / "controls" / "a.png", version.control_view(sample.controls[0]))
    dark = 1 - (torch.nn.functional.adaptive_avg_pool2d(pixels[0], 4)[0] + 1) / 2
    torch.testing.assert_close(dark, torch.tensor(expected, dtype=torch.float32), atol=0.15, rtol=0)
    own = replace(sample, rules=sample.rules.model_copy(update={"control_fit": None}))
    keys = {item_key(DifferenceEncoder(), evaluation_version(one)) for one in (sample, own)}
    assert len(keys) == 2


def test_a_picture_without_a_mask_has_no_item(pictures, cache, tmp_path):
    Image.new("LA", (48, 32), (255, 128)).save(pictures / "003.png")
    samples = samples_of(beside(pictures, alpha_mask=True), cache)
    masks = MaskEncoder(lambda width, height, frames: (16, height // 8, width // 8))
    assert counts(filled(masks, samples, cache)) == (6, 0, 6, 0)
    values = [item(cache, masks, evaluation_version(sample))[MASK] for sample in samples]
    assert [value.mean().item() for value in values] == pytest.approx([1, 1, 1, 128 / 255, 1, 1])
    assert all(value.shape == (1, 4, 4) for value in values)
    assert counts(filled(masks, [replace(sample, mask=None) for sample in samples], cache)) == (0, 0, 0, 0)


def test_clips(cache, tmp_path):
    write_video(tmp_path / "clip.mp4", frames=60, fps=24)
    (tmp_path / "clip.txt").write_text("a clip")
    dataset = dataset_of(tmp_path, frame_buckets=[17], video_clip_mode="multiple_overlapping", resolutions=[64])
    samples = samples_of(dataset, cache, CLIP_FACTS)
    assert [sample.takes[0].start for sample in samples] == [0.0, 11 / 16, 23 / 16]
    encoder = PixelEncoder()
    assert counts(filled(encoder, samples, cache)) == (3, 0, 3, 0)
    for sample in samples:
        expected = load_clip(tmp_path / "clip.mp4", View(64, 64), sample.takes[0].start, 17, 16.0)
        assert torch.equal(item(cache, encoder, evaluation_version(sample))["latents"], expected)


def test_encoders_that_read_several_things(pictures, cache, tmp_path):
    draw_pictures(tmp_path / "controls", 6, captions=False, seed=1)
    keys = {"flip": True, "augment_variants": 2, "crop": "random", "uncond_fraction": 0.1}
    samples = samples_of(beside(pictures, control_path=tmp_path / "controls", **keys), cache)
    encoder = InstructionEncoder()
    # Two views of each control image, each with its caption and without.
    assert counts(filled(encoder, samples, cache)) == (24, 0, 24, 0)
    for sample in samples:
        for take in sample.takes:
            control = load_image(sample.controls[0].media.locator.path, take.plain_view(sample.bucket))
            for without in (frozenset(), frozenset(["instruction"])):
                found = item(cache, encoder, SampleVersion(sample, take, sample.captions[0], "", without))[
                    "instruction_BC"
                ]
                length = 0 if without else len(sample.captions[0])
                torch.testing.assert_close(found, control.mean(dim=(1, 2, 3)) + length)


def test_weighted_captions(pictures, cache):
    (pictures / "000.txt").write_text("a (bear:1.5)")
    weights, text = WeightEncoder(), LengthEncoder()
    for used, weight, length in ((True, 2 + 4 * 1.5, 6), (False, 12, 12)):
        sample = samples_of(dataset_of(pictures, weighted_tags=used), cache)[0]
        for encoder in (weights, text):
            filled(encoder, [sample], cache)
        assert item(cache, weights, evaluation_version(sample))["weight_B"] == pytest.approx(weight)
        assert item(cache, text, evaluation_version(sample)) == {"length_B": length}


def test_a_caption_without_weights_has_one_name(pictures, cache):
    """Whoever reads it, and whether weights are looked for: it is not encoded again."""
    (pictures / "001.txt").write_text("a (bear:1.5)")
    weights, text = WeightEncoder(), LengthEncoder()
    weights.name = text.name
    keys = {
        (encoder, used): [item_key(encoder, evaluation_version(sample)) for sample in samples_of(dataset, cache)[:2]]
        for used in (True, False)
        for dataset in (dataset_of(pictures, weighted_tags=used),)
        for encoder in (weights, text)
    }
    assert len({plain for plain, _ in keys.values()}) == 1
    assert keys[weights, False] == keys[text, False]
    assert len({marked for _, marked in keys.values()}) == 3


def test_versions_and_sizes_of_items(pictures, cache):
    samples = samples_of(dataset_of(pictures, resolutions=[32, 64], flip=True, augment_variants=2), cache)
    wanted = items_wanted(MeanEncoder(), samples)
    assert len(wanted) == 24 and {str(bucket) for _, bucket in wanted} == {"32x32x1", "64x64x1"}
    assert {key for key, _ in wanted} == {
        item_key(MeanEncoder(), version) for sample in samples for version in versions(MeanEncoder(), sample)
    }


def test_what_a_batch_takes():
    """Two pictures of 64x64 at 64x64, in three channels of four bytes: as they come, and as they are in the file."""
    version = evaluation_version(plain_sample("a"))
    assert decoded_bytes(MeanEncoder(), version) == 2 * 3 * 4 * 64 * 64
    assert decoded_bytes(LengthEncoder(), version) == 0
