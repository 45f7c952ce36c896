"""Tables of text, and the choice of what is read of a folder."""

import json

import pytest

from tests.utils.dataset.test_sources_folders import captions, read, told, write
from utils.dataset.sources import FOLDER_TABLES, Locator


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, a_png="", b_png="", c_mp4="", in__d_png="")
    return tmp_path


def table(folder, name, content):
    if not isinstance(content, str | bytes):
        dumps = [json.dumps(content)] if name.endswith(".json") else [json.dumps(row) + "\n" for row in content]
        content = "".join(dumps)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


ROWS = [{"file": "a.png", "caption": "A"}, {"file": "in/d.png", "caption": "D, of two"}]


@pytest.mark.parametrize(
    "name, content",
    [
        ("metadata.csv", '\ufefffile,caption\r\na.png,A\r\nin/d.png,"D, of two"\r\n'),
        ("metadata.csv", "Image; Prompt\na.png;A\n\nin\\d.png;D, of two\n"),
        ("metadata.csv", "video\ttext\na.png\tA\n./in/d.png\tD, of two"),
        ("metadata.jsonl", ROWS),
        ("metadata.json", ROWS),
        ("captions.json", {"a.png": "A", "in/d.png": ["D, of two"]}),
        ("metadata.json", {"a": {"caption": "A", "train_resolution": [8, 8]}, "in/d": {"caption": "D, of two"}}),
    ],
)
def test_tables_of_a_folder(folder, name, content):
    table(folder, name, content)
    listing = read(folder)
    assert not listing.problems
    assert captions(listing) == {"a.png": ("A",), "d.png": ("D, of two",)}
    assert listing.entries[1].media == Locator(str(folder / "in" / "d.png"))
    assert told(listing, folder) == {"b.png": "not listed", "c.mp4": "not listed"}
    # A table that path names says nothing of the files that it does not name.
    assert read(folder / name).entries == listing.entries and not read(folder / name).rejected


def remarks(listing):
    return [(remark.title, remark.text) for remark in listing.remarks]


def test_columns_that_nothing_reads_are_told_and_those_of_files_are_offered_as_keys(folder):
    rows = [
        {"file": "a.png", "id": "a", "first": "b.png", "second": "in/d.png", "caption": "A", "width": 8, "seed": "c"},
        {"file": "b.png", "id": "b", "first": "a.png", "second": None, "caption": "nan", "width": 8},
    ]
    path = table(folder, "x.jsonl", rows)
    listing = read(path)
    offered = (
        'first, second, seed hold files; if these are control images, set data_file_keys = ["first", "second", "seed"]'
    )
    assert remarks(listing) == [("columns not read", offered), ("columns not read", "id, width")]
    assert [remark.file for remark in listing.remarks] == [str(path)] * 2
    assert told(listing, folder) == {"x.jsonl row 2": "caption missing"}
    # A filter reads its columns, and a caption that is given leaves the column of captions unread.
    keys = {"data_file_keys": ["first", "second"], "filter": "width > 5", "instance_prompt": "x"}
    assert remarks(read(path, **keys)) == [
        ("columns not read", 'seed hold files; if these are control images, set data_file_keys = ["seed"]'),
        ("columns not read", "id, caption"),
    ]
    path = table(folder, "y.csv", "file,caption\na.png,A\n")
    assert read(path).remarks == []


def test_files_that_only_an_unread_column_names_are_not_named(folder):
    table(folder, "metadata.csv", "file,caption,other\na.png,A,b.png\n")
    assert told(read(folder), folder) == {"b.png": "not listed", "c.mp4": "not listed"}


def test_several_captions(folder):
    table(folder, "captions.json", {"a.png": ["one", " two "], "b.png": []})
    listing = read(folder)
    assert captions(listing) == {"a.png": ("one", "two")}
    assert told(listing, folder)["captions.json: b.png"] == "caption missing"
    written = table(folder, "x.csv", 'file,text\na.png,"[""one"", ""two""]"\nb.png,[tag]\nc.mp4,\n')
    assert captions(read(written)) == {"a.png": ("one", "two"), "b.png": ("[tag]",), "c.mp4": ("",)}


def test_broken_rows_are_told_by_row(folder):
    content = b"""file,caption,repeats
a.png,caf\xe9,
gone.png,x,
b.png,y,-1
b.png
b.png,one,two,three
"b.png" x,y,
,z,
b.png,y,2.5
b.png,again,
"""
    written = table(folder, "x.csv", content)
    listing = read(written)
    assert captions(listing) == {"b.png": ("y",)} and listing.entries[0].repeats == 2.5
    assert told(listing, folder) == {
        "x.csv row 2": "caption unreadable",
        "x.csv row 3": "no such file",
        "x.csv row 4": "broken row",
        "x.csv row 5": "caption missing",
        "x.csv row 6": "broken row",
        "x.csv row 7": "broken row",
        "x.csv row 8": "no such file",
        "x.csv row 10": "twice",
    }
    assert all(fault.reason.encode() for fault in listing.rejected)


def test_a_quotation_that_is_not_closed_is_told(folder):
    listing = read(table(folder, "x.csv", 'file,caption\na.png,A\nb.png,"B\nc.mp4,C\n'))
    assert captions(listing) == {"a.png": ("A",)}
    assert [fault.kind for fault in listing.rejected] == ["broken row"]


def test_broken_objects_are_told_by_row(folder):
    lines = ['{"file": "a.png", "text": "A"}', '{"file": ', "", "[1]", '{"file": "b.png", "text": 3}']
    listing = read(table(folder, "x.jsonl", "\n".join(lines)))
    assert captions(listing) == {"a.png": ("A",)}
    assert told(listing, folder) == {
        "x.jsonl row 2": "broken row",
        "x.jsonl row 4": "broken row",
        "x.jsonl row 5": "caption unreadable",
    }
    listing = read(table(folder, "x.json", '{"a.png": "first", "a.png": "second", "b.png": "B"}'))
    assert captions(listing) == {"a.png": ("second",), "b.png": ("B",)}
    assert told(listing, folder) == {"x.json: a.png": "twice"}


def test_controls_masks_and_repeats(folder):
    rows = [
        {"image": "c.mp4", "edit": ["a.png", "b.png"], "mask": "b.png", "prompt": "x", "repeats": 3},
        {"image": "a.png", "edit": "b.png", "mask": None, "prompt": "y"},
        {"image": "a.png", "edit": "c.mp4", "prompt": "z"},
        {"image": "b.png", "edit": None, "prompt": "no control"},
        {"image": "b.png", "edit": "a.png", "mask": "gone.png", "prompt": "no mask"},
    ]
    listing = read(table(folder, "x.jsonl", rows), data_file_keys=["edit"])
    a, b, c = (Locator(str(folder / name)) for name in ("a.png", "b.png", "c.mp4"))
    assert [(entry.media, entry.controls, entry.mask, entry.repeats) for entry in listing.entries] == [
        (c, (a, b), b, 3.0),
        (a, (b,), None, 1.0),
        (a, (c,), None, 1.0),
    ]
    assert told(listing, folder) == {"x.jsonl row 4": "control missing", "x.jsonl row 5": "mask missing"}


def test_folders_of_controls_beside_a_table(folder, tmp_path):
    other = tmp_path / "other"
    write(other, a_png="", in__d_png="")
    rows = [{"file": "a.png", "depth": "b.png", "text": ""}, {"file": "in/d.png", "depth": "b.png", "text": ""}]
    listing = read(table(folder, "x.json", rows), control_path=other, recursive=True, data_file_keys=["depth"])
    assert [[locator.path for locator in entry.controls] for entry in listing.entries] == [
        [other / "a.png", folder / "b.png"],
        [other / "in/d.png", folder / "b.png"],
    ]


def test_captions_that_are_not_in_the_table(folder):
    written = table(folder, "x.csv", "file\na.png\n")
    assert captions(read(written, instance_prompt="a dog")) == {"a.png": ("a dog",)}
    assert captions(read(written, caption_source="filename")) == {"a.png": ("a",)}
    assert "caption_column" in read(written).problems[0]


@pytest.mark.parametrize(
    "header, keys, words",
    [
        ("file,caption,tags", {}, 'caption_column = "caption"'),
        ("image,video,caption", {}, 'file_column = "image"'),
        ("place,caption", {}, "there are place, caption; name it with file_column"),
        ("file,caption", {"caption_column": "captoin"}, "did you mean caption?"),
        ("file,caption", {"data_file_keys": ["depth"]}, "no column depth"),
        ("file,file,caption", {}, "several columns called file"),
        ("file,caption", {"filter": "widht > 3"}, "no column widht"),
    ],
)
def test_columns_that_cannot_be_told(folder, header, keys, words):
    written = table(folder, "x.csv", f"{header}\na.png,b.png,x\n")
    listing = read(written, **keys)
    assert not listing.entries and words in listing.problems[0]


def test_columns_that_are_chosen(folder):
    written = table(folder, "x.csv", "file,path,caption,tags,md5\na.png,b.png,x,y,1\nc.mp4,in/d.png,z,z,1\n")
    chosen = {"file_column": "path", "caption_column": "tags"}
    assert captions(read(written, **chosen)) == {"b.png": ("y",), "d.png": ("z",)}
    listing = read(written, deduplicate=True, **chosen)
    assert captions(listing) == {"b.png": ("y",)} and told(listing, folder) == {"x.csv row 3": "twice"}


def test_rows_are_filtered(folder):
    rows = "file,caption,width\na.png,x,512\nb.png,y,1024\nc.mp4,z,\nin/d.png,z,big\n"
    table(folder, "metadata.csv", rows)
    listing = read(folder, filter="width >= 600")
    assert captions(listing) == {"b.png": ("y",)}
    # What the filter leaves out was not forgotten in the table, and is not told of.
    assert told(listing, folder) == {"metadata.csv row 5": "broken row"}
    nothing = ["filter = \"caption == 'no'\" holds for no row that can be used"]
    assert read(folder, filter="caption == 'no'").problems == nothing
    # Nor if a row cannot be read at all.
    table(folder, "metadata.csv", f"{rows}a,b,c,d,e\n")
    assert read(folder, filter="caption == 'no'").problems == nothing


def test_one_of_several_tables_is_read(folder):
    for name in FOLDER_TABLES[:-1]:
        table(
            folder, name, "file,caption\na.png,x\n" if name.endswith(".csv") else [{"file": "a.png", "caption": name}]
        )
    (folder / "x.tar").write_bytes(b"")
    listing = read(folder)
    assert captions(listing) == {"a.png": ("captions.json",)}
    unread = {name for name, kind in told(listing, folder).items() if kind == "not read"}
    assert unread == {*FOLDER_TABLES[1:-1], "x.tar"}
    assert listing.rejected[-1].reason.startswith("captions.json is read")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.csv", "", "no rows"),
        ("x.csv", "file,caption\n", "no rows"),
        ("x.csv", "file,caption\na.png,x\n".encode("utf-16"), "save it as UTF-8"),
        ("x.json", "{", "is not JSON"),
        ("x.json", "[" * 100_000, "is not JSON"),
        ("x.json", "3", "list of objects"),
        ("x.jsonl", "[]", "no column looks like the file"),
    ],
)
def test_tables_that_cannot_be_read(folder, name, content, words):
    assert words in read(table(folder, name, content)).problems[0]


def test_keys_of_other_sources_are_left_aside_and_told(folder):
    written = table(folder, "metadata.csv", "file,caption\na.png,x\n")
    for path in (folder, written):
        listing = read(path, image_column="image", caption_extension=".caption")
        assert captions(listing) == {"a.png": ("x",)} and listing.problems == []
        assert listing.idle.keys() == {"image_column", "caption_extension"}


STRAYS = {
    "metadata.json": '[{"workflow": 1, "nodes": []}]',
    "captions.json": '{"version": "2", "settings": "x"}',
    "metadata.csv": "created,by\n2024,someone\n",
    "metadata.jsonl": '{"file": "other/x.png", "caption": "of another folder"}\n',
    "backup.tar": "",
    "photos.tar.gz": "",
    "x.parquet": "PAR1",
    "metadata.parquet": "PAR1",
    "y.arrow": "",
}


@pytest.mark.parametrize("stray", STRAYS)
def test_a_stray_container_does_not_replace_captioned_pictures(tmp_path, stray):
    write(tmp_path, a_png="", a_txt="A", b_png="", b_txt="B")
    table(tmp_path, stray, STRAYS[stray])
    listing = read(tmp_path)
    assert listing.problems == [] and captions(listing) == {"a.png": ("A",), "b.png": ("B",)}
    assert told(listing, tmp_path) == {stray: "not read"}
    assert "captioned pictures of this folder" in listing.rejected[0].reason
    # The same where the captions come from the settings.
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").unlink()
    listing = read(tmp_path, instance_prompt="x")
    assert captions(listing) == {"a.png": ("x",), "b.png": ("x",)}
    assert told(listing, tmp_path) == {stray: "not read"}


def test_a_table_that_names_pictures_is_read_and_their_captions_are_told(tmp_path):
    write(tmp_path, a_png="", a_txt="beside", b_png="", b_txt="beside")
    table(tmp_path, "metadata.json", [{"steps": 4}])
    table(tmp_path, "metadata.csv", "file,caption\na.png,listed\n")
    listing = read(tmp_path)
    assert captions(listing) == {"a.png": ("listed",)}
    # It comes before metadata.json, which is no table of pictures, and is told too.
    assert told(listing, tmp_path) == {"b.png": "not listed", "metadata.json": "not read"}
    assert remarks(listing) == [
        ("captions not read", "2 pictures have a caption file beside them, and metadata.csv is read instead")
    ]
