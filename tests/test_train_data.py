"""The command line on data: what is cached, shown, drawn anew, broken."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from tests.runs import (
    COLOURS,
    MINI_FLUX,
    launch,
    metrics,
    only_run,
)


def test_adding_one_picture_encodes_one(write_config: Callable[..., Path], pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "own")
    config = write_config(folder)
    codes, log = launch(config, "--cache_only", processes=2)
    assert codes == [0, 0], log
    Image.new("RGB", (64, 64), "orange").save(folder / "new.png")
    (folder / "new.txt").write_text("an orange picture")
    codes, log = launch(config, "--cache-only")
    assert codes == [0]
    assert "cache vae: wanted=8 reused=7 encoded=1 failed=0" in log
    assert "cache t5: wanted=8 reused=7 encoded=1 failed=0" in log
    assert not (tmp_path / "runs").joinpath("latest").exists()


def test_mistakes_in_the_data_are_told_together(
    write_config: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pictures, tmp_path / "own")
    (folder / "0.txt").unlink()
    (folder / "1.png").write_bytes(b"no picture")
    empty = tmp_path / "empty"
    empty.mkdir()
    config = write_config(data={"directory": [{"path": str(folder)}, {"path": str(empty)}]})
    codes, log = launch(config, processes=2)
    assert codes == [1, 1]
    assert "Traceback" not in log
    for part in ("0.txt", "1.png", str(empty)):
        assert part in log


def test_the_dataset_is_shown_as_the_trainer_sees_it(
    write_config: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    """What is shown is the stock VAE's own round trip of each picture."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in pictures.glob("*.png"):
        Image.new("L", Image.open(path).size, 128).save(masks / path.name)
    data = {"directory": [{"path": str(pictures), "mask_path": str(masks), "unmasked_weight": 0.5}]}
    config = write_config(data=data | {"trigger_word": "zzz"}, model__latents="mode")
    codes, log = launch(config, "--dump_dataset", str(tmp_path / "shown"))
    assert codes == [0], log
    page = (tmp_path / "shown" / "dataset.html").read_text()
    assert all(f"zzz, a {colour} picture" in page for colour in COLOURS)
    files = re.findall(r'<img src="([^"]+)"', page)
    assert len(files) == 3 * len(COLOURS) and all((tmp_path / "shown" / file).is_file() for file in files)
    vae = AutoencoderKL.from_pretrained(MINI_FLUX / "vae")
    for name in ("train/000001", "train/000002"):
        source, decoded = (Image.open(tmp_path / "shown" / f"{name}{what}.png") for what in ("_source", ""))
        pixels_BCHW = torch.from_numpy(np.array(source)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            expected = vae.decode(vae.encode(pixels_BCHW).latent_dist.mode()).sample[0].clamp(-1, 1)
        shown = torch.from_numpy(np.array(decoded)).permute(2, 0, 1) / 127.5 - 1
        assert (shown - expected).abs().max() < 1.5 / 127.5


def test_captions_may_be_encoded_as_they_are_needed(write_config: Callable[..., Path]) -> None:
    """With nothing drawn of them, training is what it is with cached ones."""
    losses = []
    for cached in (True, False):
        config = write_config(cache_text_embeddings=cached, pipeline_stages=2, max_steps=3)
        codes, log = launch(config, processes=2)
        assert codes == [0, 0], log
        assert ("cache t5: wanted=7" in log) is cached
        losses.append(metrics(only_run(config), "train/loss"))
        shutil.rmtree(config.parent / "runs")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_micro_batches_of_several_sizes_share_a_step(write_config: Callable[..., Path]) -> None:
    """The loss of a step that takes the whole set is the mean over its samples, however they are batched."""
    losses = []
    for sizes, accumulation in (([[64, 1]], 7), ([[64, 4], [68, 3]], 2)):
        config = write_config(
            data={"resolutions": [64], "enable_ar_bucket": True},
            micro_batch_size_per_gpu=sizes,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            adapter__dropout=0.0,
        )
        codes, log = launch(config)
        assert codes == [0], log
        losses.append(metrics(only_run(config), "train/loss")[1])
        shutil.rmtree(config.parent / "runs")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_broken_files_are_left_out(write_config: Callable[..., Path], pictures: Path, tmp_path: Path) -> None:
    """One is seen to be broken by its header, one only when it is decoded."""
    folder = shutil.copytree(pictures, tmp_path / "own")
    Image.effect_noise((256, 256), 90).save(folder / "2.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:20_000])
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "4.txt").write_text("one word after another " * 40)
    codes, log = launch(write_config(folder), processes=2)
    assert codes == [1, 1] and "max_failed_fraction" in log
    codes, log = launch(write_config(folder, max_failed_fraction=0.5, pipeline_stages=2), processes=2)
    assert codes == [0, 0], log
    assert "cache vae: wanted=6 reused=0 encoded=5 failed=1" in log
    assert re.search(r"caption truncated: .*4.png: \w+ reads \d+ of the \d+ tokens of 'one word after", log)
    with (tmp_path / "runs" / "cache" / "failed.csv").open() as file:
        assert [Path(row["file"]).name for row in csv.DictReader(file)] == ["3.png", "2.png"]
    codes, log = launch(write_config(folder, max_failed_fraction=0.5), "--check")
    assert codes == [0] and "caption truncated: " in log
    assert "3.png" in log and "2.png" not in log and "only their headers were read" in log
    codes, log = launch(write_config(folder, max_failed_fraction=0.5, verify="content"), "--check")
    assert codes == [0] and "3.png" in log and "2.png: cannot be read" in log and "all of them were decoded" in log
