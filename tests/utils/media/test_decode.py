"""Files written by Pillow come back as the pixels they hold, whatever their mode and orientation."""

import random
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps

from utils.media.colour import Jitter
from utils.media.decode import MediaError, Probe, load_alpha, load_clip, load_image, load_mask, load_rgba, probe
from utils.media.geometry import View, cover_box
from utils.media.source import MAX_PIXELS, Blob
from utils.media.writing import tensor_to_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(width=40, height=20):
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def colour_at(pixels_CFHW, x, y):
    """The RGB levels at (x, y)."""
    return tensor_to_image(pixels_CFHW).getpixel((x, y))


def test_pixels_come_back_exactly_at_their_own_size(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    pixels_CFHW = load_image(tmp_path / "a.png", View(20, 12))
    assert pixels_CFHW.shape == (3, 1, 12, 20) and pixels_CFHW.dtype == torch.float32
    expected = torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels_CFHW[:, 0], expected)
    assert (np.array(tensor_to_image(pixels_CFHW)) == levels).all()


def test_scales_to_cover_and_crops_the_centre_as_pillow_does(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    image.save(tmp_path / "a.png")
    for size in [(32, 32), (80, 24), (16, 64), (200, 200)]:
        expected = np.array(ImageOps.fit(image, size, Image.Resampling.LANCZOS)).astype(int)
        found = np.array(tensor_to_image(load_image(tmp_path / "a.png", View(*size)))).astype(int)
        assert abs(found - expected).max() <= 1


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(tmp_path, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    image = halves(64, 32)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    found = probe(path)
    assert (found.width, found.height) == upright.size == ((32, 64) if orientation >= 5 else (64, 32))
    pixels_CFHW = load_image(path, View(*upright.size))
    difference = np.array(tensor_to_image(pixels_CFHW)).astype(int) - np.array(upright.convert("RGB"))
    assert abs(difference).max() <= 1


def transparent(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode != "P":
        return image.convert(mode), {}
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.paste(0, (0, 0, 4, 8))
    return palette, {"transparency": 1}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_becomes_white(tmp_path, mode):
    image, options = transparent(mode)
    image.save(tmp_path / "a.png", **options)
    pixels_CFHW = load_image(tmp_path / "a.png", View(8, 8))
    assert colour_at(pixels_CFHW, 0, 0) == (0, 0, 0) and colour_at(pixels_CFHW, 7, 7) == (255, 255, 255)


def test_grey_of_8_and_16_bits_is_the_same_picture(tmp_path):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(grey * 257).save(tmp_path / "16.png")
    Image.fromarray(grey * 257).save(tmp_path / "16.tif")
    expected = load_image(tmp_path / "8.png", View(16, 16))
    assert expected.min() == -1 and expected.max() == 1
    for name in ["16.png", "16.tif"]:
        assert torch.equal(load_image(tmp_path / name, View(16, 16)), expected)


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = colour_at(load_image(tmp_path / "a.jpg", View(16, 16)), 8, 8)
    assert red > 250 and green < 5 and blue < 5
    assert probe(tmp_path / "a.jpg").colours == "inks"
    # A profile that is broken says no more of the inks than none.
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.tif", icc_profile=b"profile")
    assert probe(tmp_path / "a.tif").colours == "inks"


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floating_point_pixels_have_the_scale_that_holds_them(tmp_path, white):
    grey = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(grey * white).save(tmp_path / "a.tif")
    expected = torch.from_numpy(grey).expand(3, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(load_image(tmp_path / "a.tif", View(8, 8)), expected, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_deep_pixels_of_no_known_scale_fill_their_own_range(tmp_path, kind):
    grey = np.arange(64, dtype=kind).reshape(8, 8)
    Image.fromarray(grey * 3000000 - 1000).save(tmp_path / "a.tif")
    expected = torch.from_numpy(grey).float().expand(3, 1, 8, 8) / 31.5 - 1
    torch.testing.assert_close(load_image(tmp_path / "a.tif", View(8, 8)), expected, atol=1 / 255, rtol=0)


def write_tiff(path, levels_HW, bits, white_is_zero=False):
    """An uncompressed TIFF of grey integers; 12 bits are packed without gaps."""
    height, width = levels_HW.shape
    if bits == 12:
        packed = "".join(format(int(level), "012b") for level in levels_HW.flat)
        rows = int(packed, 2).to_bytes(len(packed) // 8, "big")
    else:
        rows = levels_HW.astype({8: "u1", 16: "<u2"}[bits]).tobytes()
    fields = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1}
    fields |= {273: 8, 277: 1, 278: height, 279: len(rows)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(fields)) + entries + bytes(4)
    )


@pytest.mark.parametrize("bits", [12, 16])
def test_integers_of_any_depth_have_the_white_of_their_depth(tmp_path, bits):
    grey = np.linspace(0, 0.5, 64).reshape(8, 8)
    write_tiff(tmp_path / "a.tif", (grey * (2**bits - 1)).round(), bits)
    expected = torch.from_numpy(grey).float().expand(3, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(load_image(tmp_path / "a.tif", View(8, 8)), expected, atol=1.01 / 255, rtol=0)
    mask = load_mask(tmp_path / "a.tif", View(8, 8))
    torch.testing.assert_close(mask[0, 0], torch.from_numpy(grey).float(), atol=1 / 255, rtol=0)


def test_a_tiff_whose_white_is_zero_is_no_negative(tmp_path):
    for bits in (8, 16):
        grey = np.linspace(0, 1, 64).reshape(8, 8)
        write_tiff(tmp_path / "a.tif", ((1 - grey) * (2**bits - 1)).round(), bits, white_is_zero=True)
        expected = torch.from_numpy(grey).float().expand(3, 1, 8, 8) * 2 - 1
        torch.testing.assert_close(load_image(tmp_path / "a.tif", View(8, 8)), expected, atol=1.01 / 255, rtol=0)


def test_pixels_that_are_no_numbers_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(MediaError, match="a.tif: .*no numbers"):
        load_image(tmp_path / "a.tif", View(4, 4))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "png"), ("P", "png"), ("P", "bmp"), ("YCbCr", "tif"), ("RGB", "jp2"), ("RGB", "tga")],
)
def test_any_mode_is_read(tmp_path, mode, suffix):
    halves().convert(mode).save(tmp_path / f"a.{suffix}")
    expected = halves().convert(mode).convert("RGB")
    difference = np.array(tensor_to_image(load_image(tmp_path / f"a.{suffix}", View(40, 20)))) - np.array(expected, int)
    assert abs(difference).max() <= 2


def test_pages_and_views_are_no_frames(tmp_path):
    pages = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=pages[1:])
    for name in ["a.tif", "a.jpg"]:
        assert probe(tmp_path / name) == Probe(8, 8, 1)
        red, _, blue = colour_at(load_image(tmp_path / name, View(8, 8)), 4, 4)
        assert red > 250 and blue < 5


def test_content_decides_and_not_the_suffix(tmp_path):
    halves().save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert probe(tmp_path / "a.jpg") == Probe(40, 20, 1)
    assert colour_at(load_image(tmp_path / "a.jpg", View(40, 20)), 0, 0) == RED


def test_members_of_an_archive_are_read(tmp_path):
    halves().save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    with tarfile.open(tmp_path / "a.tar") as archive:
        blob = Blob("a.tar: a.png", lambda: archive.extractfile("a.png"))
        assert probe(blob) == Probe(40, 20, 1)
        assert torch.equal(load_image(blob, View(9, 9)), load_image(tmp_path / "a.png", View(9, 9)))


def png_of_size(width, height):
    """A PNG that is only a header and some bytes that decode to nothing."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_by_the_header(tmp_path):
    (tmp_path / "a.png").write_bytes(png_of_size(30000, 30000))
    for read in (probe, lambda path: load_image(path, View(8, 8))):
        with pytest.raises(MediaError, match=f"a.png: more than {MAX_PIXELS:,} pixels .*900000000.*scale it down"):
            read(tmp_path / "a.png")


def view_of(levels_HWC, view):
    """The reference: what a picture is to look like in a view, before jitter, by Pillow alone."""
    image = Image.fromarray(levels_HWC)
    box = None
    if view.crop != "none":
        place = (0.5, 0.5) if view.crop == "center" else view.crop
        box = cover_box(*image.size, view.width, view.height, place)
    image = image.resize((view.width, view.height), Image.Resampling.LANCZOS, box=box)
    image = ImageOps.mirror(image) if view.flip else image
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c 1 h w").float() / 127.5 - 1


@pytest.mark.parametrize("crop", ["center", "none", (0.0, 0.0), (1.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("flip", [False, True])
def test_views(tmp_path, crop, flip):
    levels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    for size in [(32, 32), (80, 24), (100, 60)]:
        view = View(*size, crop, flip)
        assert torch.equal(load_image(tmp_path / "a.png", view), view_of(levels, view))


def test_a_crop_at_a_place_is_that_part_of_the_picture(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    for place, left in [((0.0, 0.5), 0), ((0.25, 0.5), 10), ((1.0, 0.5), 40)]:
        found = np.array(tensor_to_image(load_image(tmp_path / "a.png", View(60, 60, place))))
        assert (found == levels[:, left : left + 60]).all()


def test_masks_are_luminance_of_the_same_view_without_jitter(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    view = View(20, 20, (1.0, 0.0), flip=True, jitter=Jitter(brightness=0.5))
    mask_1FHW = load_mask(tmp_path / "a.png", view)
    expected = levels[:, 10:][:, ::-1] @ [0.299, 0.587, 0.114] / 255
    assert mask_1FHW.shape == (1, 1, 20, 20) and abs(mask_1FHW[0, 0].numpy() - expected).max() <= 1 / 255


def test_masks_have_no_levels_that_the_file_has_not(tmp_path):
    mask = np.full((64, 64), 64, np.uint8)
    mask[:, 32:] = 192
    Image.fromarray(mask).save(tmp_path / "a.png")
    scaled = load_mask(tmp_path / "a.png", View(40, 40))
    assert scaled.min() == 64 / 255 and scaled.max() == 192 / 255


def spelled(name):
    """The left half as a mask."""
    half = np.zeros((16, 16), np.uint8)
    half[:, :8] = 1
    white = Image.fromarray(half * 255)
    return {
        "white on transparent": lambda: Image.merge("RGBA", [Image.new("L", (16, 16), 255)] * 3 + [white]),
        "white on transparent black": lambda: Image.merge("LA", [white] * 2),
        "opaque": lambda: white,
        "colours": lambda: Image.merge("RGB", [white] * 3),
        "0 and 1": lambda: Image.fromarray(half),
        "0 and 1 in colours": lambda: Image.merge("RGB", [Image.fromarray(half)] * 3),
        "one bit": lambda: white.convert("1"),
        "16 bits": lambda: Image.fromarray(half.astype(np.uint16) * 65535),
        "16 bits up to 255": lambda: Image.fromarray(half.astype(np.uint16) * 255),
        "16 bits up to 1": lambda: Image.fromarray(half.astype(np.uint16)),
    }[name]()


@pytest.mark.parametrize(
    "name",
    ["white on transparent", "white on transparent black", "opaque", "colours", "0 and 1", "0 and 1 in colours"]
    + ["one bit", "16 bits", "16 bits up to 255", "16 bits up to 1"],
)
def test_a_mask_means_the_same_in_every_spelling(tmp_path, name):
    spelled(name).save(tmp_path / "a.png")
    mask = load_mask(tmp_path / "a.png", View(16, 16))
    assert (mask[..., :8] == 1).all() and (mask[..., 8:] == 0).all()


def test_a_dark_mask_stays_dark(tmp_path):
    """Where levels may be those of a lossy code, and where they are more than 0 and 1."""
    Image.new("L", (16, 16), 1).save(tmp_path / "a.jpg", quality=100)
    dark = np.zeros((16, 16), np.uint8)
    dark[:, :8] = 2
    Image.fromarray(dark).save(tmp_path / "a.png")
    for name in ("a.jpg", "a.png"):
        assert 0 < load_mask(tmp_path / name, View(16, 16)).max() <= 2 / 255


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_read_as_a_mask(tmp_path, mode):
    image, options = transparent(mode)
    image.save(tmp_path / "a.png", **options)
    alpha = load_alpha(tmp_path / "a.png", View(8, 8))
    assert (alpha[..., :4] == 1).all() and (alpha[..., 4:] == 0).all()


def test_what_has_no_alpha_is_opaque(tmp_path):
    halves().save(tmp_path / "a.png")
    assert torch.equal(load_alpha(tmp_path / "a.png", View(8, 8)), torch.ones(1, 1, 8, 8))


def test_a_still_is_shown_for_ever(tmp_path):
    halves().save(tmp_path / "a.png")
    clip = load_clip(tmp_path / "a.png", View(8, 8), 3.0, 5, 24)
    assert torch.equal(clip, load_image(tmp_path / "a.png", View(8, 8)).expand(3, 5, 8, 8))


def test_a_probe_reads_the_header_alone(tmp_path):
    halves().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    assert probe(tmp_path / "cut.png") == Probe(40, 20, 1)
    with pytest.raises(MediaError, match="cut.png: cannot be read"):
        load_image(tmp_path / "cut.png", View(8, 8))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_broken_file_is_a_media_error(tmp_path):
    """Whatever bytes are damaged, the file is read or refused with its name; nothing else is raised."""
    draw = random.Random(0)
    for suffix in [".png", ".jpg", ".webp", ".tif", ".bmp"]:
        path = tmp_path / f"a{suffix}"
        halves().save(path)
        whole = path.read_bytes()
        for _ in range(40):
            broken = bytearray(whole)
            for _ in range(8):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
            path.write_bytes(broken)
            try:
                load_image(path, View(8, 8))
            except MediaError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize(("content", "reason"), [(b"hello", "neither"), (b"", "is empty"), (None, "no such")])
def test_reasons_are_readable(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(MediaError, match=f"a.png: .*{reason}"):
        probe(tmp_path / "a.png")


def test_translucent_pictures_keep_their_colours(tmp_path):
    """But for those that nothing is seen of; and their opacity is no colour."""
    levels = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
    levels[:4, :, 3], levels[8:, :, 3] = 0, 255
    Image.fromarray(levels).save(tmp_path / "a.png")
    pixels_CFHW = load_rgba(tmp_path / "a.png", View(20, 12, flip=True))
    levels[levels[..., 3] == 0] = 0
    expected = torch.from_numpy(levels[:, ::-1].copy()).permute(2, 0, 1)[:, None] / 127.5 - 1
    torch.testing.assert_close(pixels_CFHW, expected)
    brighter = load_rgba(tmp_path / "a.png", View(20, 12, flip=True, jitter=Jitter(brightness=1.5)))
    assert torch.equal(brighter[3], pixels_CFHW[3]) and not torch.equal(brighter[:3], pixels_CFHW[:3])


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_other_pictures_are_opaque(tmp_path, mode):
    Image.new(mode, (8, 8), 0).save(tmp_path / "a.png")
    pixels_CFHW = load_rgba(tmp_path / "a.png", View(4, 4))
    assert (pixels_CFHW[:3] == -1).all() and (pixels_CFHW[3] == 1).all()
