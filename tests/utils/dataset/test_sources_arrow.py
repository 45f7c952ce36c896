"""Parquet and Arrow tables, with pictures in their cells or with names of files."""

import io
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tests.utils.dataset.test_sources_folders import captions, read, told, write
from utils.dataset.sources.arrow_tables import ArrowTable, Recent
from utils.media.decode import probe
from utils.media.source import MediaError


def png(number):
    stream = io.BytesIO()
    Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def parquet(table, path):
    pyarrow.parquet.write_table(table, path, row_group_size=4)


def arrow(table, path, opener=pyarrow.ipc.new_file, **options):
    options = pyarrow.ipc.IpcWriteOptions(**options)
    with pyarrow.OSFile(str(path), "wb") as file, opener(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=4)


FORMATS = {
    "x.parquet": parquet,
    "x.arrow": arrow,
    "stream.arrow": lambda table, path: arrow(table, path, pyarrow.ipc.new_stream),
    "packed.arrow": lambda table, path: arrow(table, path, compression="zstd"),
    "packed_stream.arrow": lambda table, path: arrow(table, path, pyarrow.ipc.new_stream, compression="lz4"),
}


def pictures(count=10, **columns):
    return pyarrow.table(
        {
            "text_en": [f"picture {number}" for number in range(count)],
            "image": [png(number) for number in range(count)],
            "width": list(range(8, 8 + count)),
            **columns,
        }
    )


@pytest.mark.parametrize("name", FORMATS)
def test_pictures_in_cells(tmp_path, name):
    path = tmp_path / name
    FORMATS[name](pictures(), path)
    listing = read(path)
    assert not listing.problems and not listing.rejected
    assert [remark.text for remark in listing.remarks] == ["width"]
    assert [entry.captions for entry in listing.entries] == [(f"picture {number}",) for number in range(10)]
    assert str(listing.entries[6].media) == f"{path}: row 7, column image"
    # In no order, and by several threads at once.
    order = [9, 0, 5, 4, 3, 8, 1, 7, 2, 6] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: listing.entries[number].media.open().read(), order))
    assert found == [png(number) for number in order]
    # As another process gets them.
    handed = pickle.loads(pickle.dumps([entry.media for entry in listing.entries]))
    assert handed[6] == listing.entries[6].media and handed[6].open().read() == png(6)
    assert len({id(locator.container) for locator in handed}) == 1
    assert [probe(entry.media.source).width for entry in listing.entries] == list(range(8, 18))
    assert [entry.captions[0] for entry in read(path, filter="width in (9, 17)").entries] == ["picture 1", "picture 9"]
    assert [entry.captions for entry in read(path, instance_prompt="a dog").entries] == [("a dog",)] * 10


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_pieces_are_kept_in_bounds(tmp_path, name, monkeypatch):
    FORMATS[name](pictures(), tmp_path / name)
    monkeypatch.setattr("utils.dataset.sources.arrow_tables._KEPT_BYTES", 1)
    recent = Recent()
    table = ArrowTable(tmp_path / name, recent)
    assert sum(1 for _ in table.rows(["width"])) == 10
    for number in (1, 9, 5, 6):
        assert table.open(table.part(number, "image")).read() == png(number - 1)
        assert len(recent._pieces) == 1


def test_the_kind_of_hunyuan(tmp_path):
    """Several files, structs of bytes, digests that repeat across them, a control image, a number of repeats."""
    columns = {
        "md5": [f"{number % 8:032x}" for number in range(10)],
        "depth": [{"bytes": png(50 + number), "path": None} for number in range(10)],
        "repeats": [None, 2, *[1] * 8],
    }
    for name in ("b.arrow", "a.parquet"):
        (arrow if name.endswith("arrow") else parquet)(pictures(**columns), tmp_path / name)
    keys = {"deduplicate": True, "data_file_keys": ["depth"], "image_column": "image", "filter": "width > 8"}
    listing = read(tmp_path, **keys)
    assert [str(entry.media) for entry in listing.entries] == [
        f"{tmp_path}/a.parquet: row {number}, column image" for number in range(2, 10)
    ]
    assert [entry.repeats for entry in listing.entries][:2] == [2.0, 1.0]
    assert listing.entries[0].controls[0].open().read() == png(51)
    assert told(listing, tmp_path)["a.parquet row 10"] == "twice"
    assert "a.parquet row 2" in listing.rejected[-1].reason and len(listing.rejected) == 10
    assert len(read(tmp_path, **{**keys, "deduplicate": False}).entries) == 18
    structs = pictures(**columns).drop(["image"])
    parquet(structs, tmp_path / "structs.parquet")
    assert read(tmp_path / "structs.parquet").entries[3].media.open().read() == png(53)


def test_files_named_by_a_parquet_table(tmp_path):
    write(tmp_path, a_png="", b_png="", c_png="")
    table = pyarrow.table({"file_name": ["a.png", "b.png", "d.png"], "caption": [["x", "y"], ["z"], ["w"]]})
    parquet(table, tmp_path / "metadata.parquet")
    listing = read(tmp_path)
    assert captions(listing) == {"a.png": ("x", "y"), "b.png": ("z",)}
    assert told(listing, tmp_path) == {"metadata.parquet row 3": "no such file", "c.png": "not listed"}


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_captions_that_are_not_utf8_are_told_by_row(tmp_path, name):
    raw = pyarrow.array([b"good", b"caf\xe9", None])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    for column in (text, raw):
        FORMATS[name](pyarrow.table({"image": [png(1)] * 3, "caption": column}), tmp_path / name)
        listing = read(tmp_path / name)
        assert [entry.captions for entry in listing.entries] == [("good",)]
        assert told(listing, tmp_path) == {f"{name} row 2": "caption unreadable", f"{name} row 3": "caption missing"}


def test_an_empty_cell_is_found_when_it_is_read(tmp_path):
    parquet(pyarrow.table({"image": [png(1), None], "caption": ["a", "b"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="row 2, column image: .*the cell is empty"):
        probe(read(tmp_path).entries[1].media.source)


@pytest.mark.parametrize(
    "columns, keys, words",
    [
        ({"jpg": [b""], "png": [b""]}, {"data_file_keys": ["image"]}, "name it with image_column"),
        ({"media": [b""]}, {}, 'choose with image_column = "image"'),
        ({"prompt": ["x"]}, {}, "caption_column"),
        ({}, {"image_column": "text_en"}, "holds no bytes"),
        ({}, {"filter": "len(image) > 3"}, "no column image"),
        ({}, {"control_path": "."}, "data_file_keys"),
        ({}, {"caption_source": "filename"}, "goes with files"),
    ],
)
def test_what_is_wrong_with_tables(tmp_path, columns, keys, words):
    parquet(pictures(1, **columns), tmp_path / "x.parquet")
    assert words in read(tmp_path, **keys).problems[0]


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_tables(tmp_path, name):
    path = tmp_path / name
    FORMATS[name](pictures(), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    listing = read(path)
    assert not listing.entries and "bring it anew" in listing.problems[0]
    path.write_bytes(b"")
    assert "cannot be read" in read(path).problems[0]


def test_pictures_that_nothing_reads_are_offered_as_controls_once(tmp_path):
    table = pictures(depth=[png(0)] * 10)
    for name in ("x.parquet", "y.parquet"):
        parquet(table, tmp_path / name)
    listing = read(tmp_path, image_column="image")
    assert len(listing.entries) == 20
    assert [remark.text for remark in listing.remarks] == [
        'depth hold files; if these are control images, set data_file_keys = ["depth"]',
        "width",
    ]
    read_too = read(tmp_path, image_column="image", data_file_keys=["depth"], filter="width > 10")
    assert read_too.remarks == [] and len(read_too.entries[0].controls) == 1


@pytest.mark.parametrize("column", ["caption", "image"])
def test_places_outside_of_the_file_are_told(tmp_path, column):
    """pyarrow would read them, or end the process."""
    path = tmp_path / "a.arrow"
    table = pyarrow.table({"image": [b"x" * 100, b"y" * 50], "caption": ["one", "three"]})
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    first, last = {"image": (100, 150), "caption": (3, 8)}[column]
    content, places = path.read_bytes(), struct.pack("<3i", 0, first, last)
    assert content.count(places) == 1
    path.write_bytes(content.replace(places, struct.pack("<3i", 0, 2**30, last)))
    listing = read(path)
    if column == "caption":
        assert not listing.entries and "cannot be read behind row 0" in listing.problems[0]
    else:
        # Pictures are looked at when they are wanted.
        with pytest.raises(MediaError, match="row 1, column image: cannot be read"):
            probe(listing.entries[0].media.source)
