"""What the headers of exports say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from utils.dataset.samples import Bucket
from utils.errors import UserError
from utils.run.export_metadata import ABOUT, keep, kept, legacy_hash, of_file, of_samples
from utils.run.tensor_file import write_tensors

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.arange(3, dtype=torch.float16)}


def sample(path: str, digest: str, caption: str, bucket: tuple[int, int, int] = (64, 32, 1), **rules: Any) -> Any:
    usual = {"num_repeats": 1, "is_regularisation_data": False, "trigger_word": None, "instance_prompt": None}
    return SimpleNamespace(
        media=SimpleNamespace(digest=digest),
        bucket=Bucket(*bucket),
        captions=(caption,),
        rules=SimpleNamespace(path=Path(path), **{**usual, **rules}),
    )


def test_hashes_are_those_of_what_lies_behind_the_header(tmp_path: Path) -> None:
    header = of_file({"rank": "4"}, TENSORS, layout="comfyui", title="fox step7", stem="fox-step000007")
    file = tmp_path / "fox.safetensors"
    write_tensors(file, TENSORS, header)
    content = file.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata()
    assert (said["modelspec.hash_sha256"], said["sshs_model_hash"]) == (f"0x{digest}", digest)
    assert (said["modelspec.title"], said["ss_output_name"], said["ss_network_dim"]) == (
        "fox step7",
        "fox-step000007",
        "4",
    )
    assert said["modelspec.implementation"].endswith("ComfyUI") and said["modelspec.sai_model_spec"] == "1.0.1"


def test_data_are_counted_by_the_names_of_directories() -> None:
    samples = [
        sample("/home/me/secret/fox", "1", "fox, red, red", trigger_word="sks"),
        sample("/home/me/secret/fox", "1", "fox, red", (32, 32, 1), trigger_word="sks"),
        sample("/home/me/secret/fox", "2", f"fox, {'long' * 30}", (32, 32, 1), trigger_word="sks"),
        sample("/data/fox", "3", "a fox", (32, 32, 9), num_repeats=2, instance_prompt="a fox"),
        sample("/data/others", "4", "cat", is_regularisation_data=True, trigger_word="not told"),
    ]
    about = of_samples(samples)
    assert "secret" not in json.dumps(about) and all(isinstance(value, str) for value in about.values())
    assert json.loads(about["ss_tag_frequency"]) == {
        "fox": {"fox": 2, "red": 1},
        "fox (2)": {"a fox": 1},
        "others": {"cat": 1},
    }
    assert json.loads(about["ss_dataset_dirs"]) == {
        "fox": {"n_repeats": 1, "img_count": 2},
        "fox (2)": {"n_repeats": 2, "img_count": 1},
    }
    assert (about["ss_num_train_images"], about["ss_num_reg_images"]) == ("3", "1")
    assert json.loads(about["ss_bucket_info"])["buckets"] == {
        "0": {"resolution": [32, 32], "count": 2},
        "1": {"resolution": [32, 32], "count": 1, "frames": 9},
        "2": {"resolution": [64, 32], "count": 2},
    }
    assert about["modelspec.trigger_phrase"] == "sks, a fox"
    assert about["modelspec.resolution"] == "64x32"


def test_what_is_kept_of_a_run_comes_back(tmp_path: Path) -> None:
    assert kept(tmp_path) == {}
    keep(tmp_path, {"ss_seed": "0"})
    assert kept(tmp_path) == {"ss_seed": "0"}
    (tmp_path / ABOUT).write_text('{"ss_seed": 0}')
    with pytest.raises(UserError, match="is no table of texts; remove it"):
        kept(tmp_path)


def test_the_short_hash_is_of_64_kib_at_one_mib(tmp_path: Path) -> None:
    file = tmp_path / "base.safetensors"
    block = bytes(range(256)) * 256
    file.write_bytes(b"\0" * 2**20 + block + b"more")
    assert legacy_hash(file) == hashlib.sha256(block).hexdigest()[:8]
    file.write_bytes(b"small")
    assert legacy_hash(file) is None
