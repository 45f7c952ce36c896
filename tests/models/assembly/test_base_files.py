"""Damaged data of the files that a run begins with are told before it begins."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.assembly import base_files
from tests.models import tiny_flux
from tests.models.tiny_folder import settings_of
from utils.errors import UserError
from utils.ranks import Ranks

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.write_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    return shutil.copytree(made, tmp_path / "flux")


def verify(folder: Path, how: str, **options: object) -> None:
    pipeline = tiny_flux.pipeline(folder, verify_files=how, **options)
    base_files.verify(settings_of(pipeline), pipeline, folder.parent / "cache", Ranks(), lambda: None)


def change(file: Path) -> None:
    """Another byte of the last tensor, with the size and the time that the file has."""
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_files_that_are_read(folder: Path) -> None:
    own = folder / "own.safetensors"
    own.write_bytes((folder / "vae" / WEIGHTS).read_bytes())
    pipeline = tiny_flux.pipeline(folder, vae_path=own)
    files = [str(file.relative_to(folder)) for file in base_files.files_of(settings_of(pipeline), pipeline)]
    texts = ["text_encoder/model.safetensors", "text_encoder_2/model.safetensors"]
    assert sorted(files) == ["own.safetensors", *texts, f"transformer/{WEIGHTS}"]


def test_values_that_are_no_numbers_are_told(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = torch.inf
    save_file(tensors, file)
    verify(folder, "never")
    with pytest.raises(UserError, match=f"(?s){file}.*verify_files: 1 of its tensors .* the first is '{name}'"):
        verify(folder, "once")


def test_data_that_nobody_changed_are_noticed_and_known_files_are_not_read_again(folder: Path) -> None:
    verify(folder, "once")
    file = folder / "transformer" / WEIGHTS
    change(file)
    verify(folder, "once")
    with pytest.raises(UserError, match=f"(?s){file}.*other data than when it was read last"):
        verify(folder, "always")
    # Written by somebody: it is another file.
    os.utime(file)
    verify(folder, "always")
    verify(folder, "always")


@pytest.mark.parametrize("left", ["link", "note", "nothing"])
def test_sums_of_the_publisher(folder: Path, left: str) -> None:
    file = folder / "transformer" / WEIGHTS
    sum_ = hashlib.sha256(file.read_bytes()).hexdigest()
    if left == "link":
        blob = folder.parent / "blobs" / sum_
        blob.parent.mkdir()
        file.rename(blob)
        file.symlink_to(blob)
    elif left == "note":
        note = folder / base_files.DOWNLOADS / "transformer" / f"{WEIGHTS}.metadata"
        note.parent.mkdir(parents=True)
        note.write_text(f"{'a' * 40}\n{sum_}\n1700000000.5\n")
    assert base_files.published_sum(file) == (None if left == "nothing" else sum_)
    verify(folder, "always")
    change(file)
    os.utime(file)
    if left == "nothing":
        verify(folder, "always")
        return
    with pytest.raises(UserError, match=f"(?s){file}.*has the SHA-256 .*, and its publisher's is {sum_}"):
        verify(folder, "always")


@pytest.mark.parametrize("content", ["{", "[]", '{"a": [1]}', '{"a": 3}', '{"a": ["b", 2, 3]}', "\udcff"], ids=range(6))
def test_a_damaged_record_is_made_anew(folder: Path, content: str) -> None:
    record = folder.parent / "cache" / base_files.RECORD
    record.parent.mkdir()
    record.write_text(content, errors="surrogateescape")
    verify(folder, "once")
    assert str(folder / "vae" / WEIGHTS) in record.read_text()
