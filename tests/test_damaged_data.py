"""Damaged files of datasets, caches, checkpoints and settings are read all the same, or told: never an error from deep
within."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import models
from tests.damage import COUNT, Damages, damaged_bytes, damaged_json, damaged_safetensors, outcomes
from tests.utils.dataset.conftest import (
    MeanEncoder,
    dataset_of,
    draw_pictures,
    filled,
    plain_sample,
    samples_of,
    scanned,
)
from tests.utils.dataset.stored import item
from tests.utils.dataset.test_sources_tars import pack
from utils.dataset import references
from utils.dataset.epochs import Continued, Epochs
from utils.dataset.sources import read_source
from utils.dataset.tensor_store import TensorStore
from utils.errors import UserError
from utils.media.decode import View, decode_all, load_clip, probe
from utils.media.source import MediaError
from utils.ranks import Ranks
from utils.run import saving
from utils.run.checkpoint import Checkpoint, damage_in, of_other_run
from utils.run.export import _metadata_of
from utils.run.folder import find_checkpoint
from utils.run.metrics import _cut
from utils.run.owed import Owed
from utils.run.progress import Progress
from utils.settings.dataset_schema import DirectorySettings
from utils.settings.reader import read_all

TOLD = (UserError,)


def check(
    file: Path, read: Callable[[], object], damages: Damages = damaged_bytes, told: tuple[type[Exception], ...] = TOLD
) -> None:
    read()
    _, faults = outcomes(file, read, damages, told)
    assert not faults, "\n".join(faults)


ROWS = [{"file": "000.png", "caption": "A", "width": 48}, {"file": "001.png", "caption": ["B", "C"], "repeats": 2}]
TABLES = {
    "metadata.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "metadata.json": json.dumps(ROWS).encode(),
    "captions.json": json.dumps({"000.png": "A", "001.png": {"caption": "B"}}).encode(),
    "metadata.csv": b'file,caption,width\n000.png,"A, b",3\n001.png,B,\n',
    "000.txt": "a cät\n".encode(),
    "000.json": json.dumps({"caption": ["x", "y"], "width": 8}).encode(),
}


def of_rows(content: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """A table of JSON lines with wrong values in a row, and with wrong bytes."""
    rows = [json.loads(line) for line in content.decode().splitlines()]
    for done, changed in damaged_json(json.dumps(rows).encode(), seed):
        try:
            listed = json.loads(changed)
        except (ValueError, RecursionError):
            continue
        yield done, "".join(json.dumps(row) + "\n" for row in listed).encode() if isinstance(listed, list) else changed
    yield from damaged_bytes(content, seed)


@pytest.mark.parametrize("name", TABLES)
def test_captions(tmp_path: Path, name: str) -> None:
    draw_pictures(tmp_path / "pictures", 2, captions=name.startswith("0"))
    file = tmp_path / "pictures" / name
    file.write_bytes(TABLES[name])
    keys = {"caption_extension": ".json"} if name == "000.json" else {}
    rules = DirectorySettings(path=tmp_path / "pictures", **keys)
    form = {".json": damaged_json, ".jsonl": of_rows}.get(file.suffix, damaged_bytes)

    def read() -> None:
        listing = read_source(rules, remember=tmp_path)
        assert listing.entries or listing.problems or listing.rejected
        assert all(isinstance(text, str) for entry in listing.entries for text in entry.captions)

    check(file, read, form, ())


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.arrow"])
def test_containers(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name == "a.tar":
        pack(file, [("b.png", png()), ("b.txt", " one "), ("a.png", png()), ("a.json", '{"caption": ["x", "y"]}')])
    else:
        table = pyarrow.table({"image": [png(), png()], "caption": ["A", "B"]})
        if name == "a.parquet":
            pyarrow.parquet.write_table(table, file)
        else:
            with pyarrow.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
    dataset = dataset_of(file)

    def read() -> None:
        (tmp_path / "files.sqlite").unlink(missing_ok=True)
        manifest = scanned(dataset, tmp_path)
        for row in manifest.rows:
            with io.BytesIO(row.media.locator.open().read()) as stream:
                assert stream.getbuffer().nbytes

    # A cell that cannot be read any more when it is wanted is told by its file.
    check(file, read, told=(MediaError,))


def test_the_remembered_index_of_a_tar(tmp_path: Path) -> None:
    tar = pack(tmp_path / "a.tar", [("b.png", png()), ("b.txt", " one ")])
    cache = tmp_path / "cache"

    def read() -> None:
        listing = read_source(DirectorySettings(path=tar), remember=cache)
        assert [(entry.media.part, entry.captions) for entry in listing.entries] == [("b.png", ("one",))]

    read()
    (file,) = cache.glob("*.json")
    check(file, read, damaged_json)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_pictures(tmp_path: Path, form: str) -> None:
    levels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
    file, exif = tmp_path / f"a.{form.lower()}", Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    further = {"exif": exif} if form in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    frames = {"save_all": True, "append_images": [Image.new("RGB", (16, 12), "blue")]} if form == "GIF" else {}
    Image.fromarray(levels).save(file, form, **further, **frames)

    def read() -> None:
        assert probe(file).width
        decode_all(file)
        assert load_clip(file, View(16, 16), 0.0, 1, 1.0).shape == (3, 1, 16, 16)

    check(file, read, told=(MediaError,))


def test_the_cache(tmp_path: Path) -> None:
    """Its shards and indices: what is damaged is told, or is as it was."""
    draw_pictures(tmp_path / "pictures", 3)
    dataset, cache, encoder = dataset_of(tmp_path / "pictures"), tmp_path / "cache", MeanEncoder()
    samples = samples_of(dataset, cache)
    filled(encoder, samples, cache)
    with TensorStore(cache / "vae") as store:
        keys = store.keys()
        before = {key: store.get(key) for key in keys}
    for database in cache.rglob("*.sqlite"):
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def read() -> None:
        for old in cache.rglob("*.sqlite-*"):
            old.unlink()
        samples_of(dataset, cache)
        references.stores_of(cache, cache / "run.toml")
        with TensorStore(cache / "vae") as store:
            there = set(keys) - set(store.missing(keys))
            assert set(store.lost(keys)) <= there and set(store.verify(keys)) <= there
            assert store.stats().shards and store.lengths(keys) is not None
            for key in there:
                found = store.get(key)
                assert all(torch.equal(found[name], tensor) for name, tensor in before[key].items())

    for file in (*cache.glob("vae/*.shard"), cache / "vae" / "index.sqlite", *cache.glob("*.sqlite")):
        check(file, read)


def test_the_headers_of_items(tmp_path: Path) -> None:
    """With a checksum that fits, as if they had been written so."""
    with TensorStore(tmp_path, "w") as store:
        store.put("a", item(0))
        store.flush()
    (shard,) = tmp_path.glob("*.shard")
    content = shard.read_bytes()

    def read() -> None:
        import zlib

        with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection, connection:
            now = shard.read_bytes()
            connection.execute("UPDATE items SET length = ?, crc32 = ?", (len(now), zlib.crc32(now)))
        with TensorStore(tmp_path) as opened:
            assert opened.get("a")

    check(shard, read, damaged_safetensors)
    assert shard.read_bytes() == content


EPOCHS = Epochs([plain_sample(f"s{number}") for number in range(4)], lambda bucket: 1, 1, 1, 0)
MADE_WITH = {
    "identity": {"seed": 0, "[adapter] rank": 4},
    "run": {"dataset": "a.toml"},
    "optimizer": {"type": "adamw", "lr": 1e-3, "betas": [0.9, 0.99]},
    "steps_in_epoch": 4,
    "order": {**EPOCHS.state(1, 2), "continued": Continued(1, 0, 1, {"64x64x1": 1}).as_dict()},
}
OWED = Owed(Progress(), False, ("samples",))


@pytest.mark.parametrize("name", ["progress.json", "checksums.json", "state-0.safetensors", "latest"])
@pytest.mark.parametrize("summed", [True, False])
def test_checkpoints(tmp_path: Path, name: str, summed: bool) -> None:
    run = tmp_path / "20260101_00-00-00"
    parameters = {"weight": torch.nn.Parameter(torch.arange(60.0).reshape(6, 10))}
    optimizer = torch.optim.AdamW(parameters.values())
    parameters["weight"].sum().backward()
    optimizer.step()
    for step in (1, 2):
        progress = Progress(step=step, epoch=1, step_in_epoch=2, examples=8, epoch_loss_sum=0.5)
        saving.save(run, Ranks(), progress, parameters, optimizer, MADE_WITH, owed=OWED)
    newest = run / "global_step2"
    if not summed:
        # As by an older version.
        for checkpoint in run.glob("global_step*"):
            content = json.loads((checkpoint / "progress.json").read_text())
            content.pop("checksums", None)
            (checkpoint / "progress.json").write_text(json.dumps(content))
            (checkpoint / "checksums.json").unlink()
        if name == "checksums.json":
            return

    def read() -> None:
        found = find_checkpoint(tmp_path, "", lambda one: [], damage_in)
        opened = Checkpoint(found)
        opened.check_identity(MADE_WITH["identity"])
        opened.check_optimizer(MADE_WITH["optimizer"], new_parameters=True, new_state=False)
        opened.warn_of_other_run({"dataset": "b.toml"})
        opened.check_weights(parameters)
        opened.load_weights(parameters)
        opened.load_optimizer(parameters, torch.optim.AdamW(parameters.values()))
        assert opened.starting_point(EPOCHS, restart_data=False).progress.step >= 0
        if summed and name != "latest":
            assert found.name == "global_step1" or name == "checksums.json" or opened.progress.step == 2

    forms = {"progress.json": damaged_json, "checksums.json": damaged_json, "state-0.safetensors": damaged_safetensors}
    check(run / "latest" if name == "latest" else newest / name, read, forms.get(name, damaged_bytes))


def test_metrics_and_exports_of_before(tmp_path: Path) -> None:
    metrics, kept = tmp_path / "metrics.jsonl", tmp_path / "kept"
    metrics.write_text(
        "".join(json.dumps({"name": "train/loss", "step": step, "value": 0.5}) + "\n" for step in range(5))
    )

    def read() -> None:
        kept.write_bytes(metrics.read_bytes())
        _cut(kept, lambda name, step: step <= 3)

    check(metrics, read, of_rows)
    from safetensors.torch import save_file

    export = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2)}, export, {"step": "3"})
    check(export, lambda: _metadata_of(export), damaged_safetensors)


RUN = """
output_dir = "runs"
dataset = "data.toml"
epochs = 3
[model]
type = "flux"
diffusers_path = "."
dtype = "bfloat16"
[adapter]
type = "lora"
rank = 8
[optimizer]
type = "adamw"
lr = 1e-3
betas = [0.9, 0.99]
[sampling]
sample_every_n_steps = 5
prompts = ["a", "b"]
"""
DATA = """
resolutions = [64, [32, 48]]
[[directory]]
path = "."
repeats = 2
"""


@pytest.mark.parametrize("name", ["run.toml", "data.toml"])
def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "data.toml").write_text(DATA)
    read = partial(read_all, Path("run.toml"), models.choices(), 1)
    check(tmp_path / name, read, lambda content, seed: damaged_bytes(content, seed, 2 * COUNT))


def test_settings_of_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"communication_data_type": "fp32", "dump_state": False}))
    (tmp_path / "run.toml").write_text('deepspeed = "deepspeed.json"\n' + RUN)
    (tmp_path / "data.toml").write_text(DATA)
    counts, faults = outcomes(file, partial(read_all, Path("run.toml"), models.choices(), 1), damaged_json, TOLD)
    assert not faults and counts["told"]


def test_whose_checkpoint_it_is_is_not_asked_of_a_damaged_one(tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    file.write_text(json.dumps({"format": 1, "progress": Progress().as_dict(), "made_with": {**MADE_WITH, "run": 3}}))
    assert of_other_run(tmp_path, None) == []
