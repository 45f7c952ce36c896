"""Damage of a checkpoint is noticed, and no moment is without a whole one."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_ranks
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run import checksums, saving
from utils.run.checkpoint import Checkpoint, damage_in
from utils.run.folder import find_checkpoint
from utils.run.progress import Progress

MADE_WITH = {"optimizer": {}, "steps_in_epoch": 4, "identity": {}}
NAMES = ("checksums.json", "progress.json", "state-0.safetensors")


def state() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    parameters = {"weight": torch.nn.Parameter(torch.arange(600.0).reshape(20, 30))}
    return parameters, torch.optim.SGD(parameters.values(), lr=1.0)


def save(run: Path, *steps: int, read_back: bool = False) -> None:
    for step in steps:
        saving.save(run, Ranks(), Progress(step=step), *state(), MADE_WITH, read_back=read_back)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def none_of_other_run(checkpoint: Path) -> list[str]:
    return []


def found(run: Path, asked: str = "") -> Path:
    return find_checkpoint(run.parent, asked, none_of_other_run, damage_in)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "20260101_00-00-00"


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_told_with_the_file_and_the_one_before_is_taken(
    run: Path, caplog: pytest.LogCaptureFixture, name: str, where: str
) -> None:
    save(run, 1, 2, 3)
    damaged = run / "global_step3" / name
    flip(damaged, {"first": 0, "middle": damaged.stat().st_size // 2, "last": -1}[where])
    flip(run / "global_step2" / "state-0.safetensors", -1)
    with pytest.raises(UserError) as raised:
        found(run, str(run / "global_step3"))
    assert f"{damaged}: " in str(raised.value)
    assert f"newest whole one before it is --resume_from_checkpoint {run / 'global_step1'}" in str(raised.value)
    for asked in ("", run.name):
        assert found(run, asked) == run / "global_step1"
    assert f"passed over a newer checkpoint, which is damaged. {damaged}: " in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_a_lost_or_shortened_file_is_damage(run: Path, name: str) -> None:
    save(run, 1, 2)
    path = run / "global_step2" / name
    os.truncate(path, path.stat().st_size - 1)
    assert found(run) == run / "global_step1"
    path.unlink()
    assert found(run) == run / "global_step1"
    shutil.rmtree(run / "global_step1")
    with pytest.raises(UserError, match=f"every checkpoint is damaged(.|\n)*{path}"):
        found(run)


def test_a_checkpoint_of_before_has_no_checksums_and_goes_on(run: Path) -> None:
    save(run, 1)
    progress = run / "global_step1" / "progress.json"
    progress.write_text(progress.read_text().replace('"checksums": "checksums.json"', '"other": 1'))
    (run / "global_step1" / "checksums.json").unlink()
    assert found(run) == run / "global_step1"
    os.truncate(run / "global_step1" / "state-0.safetensors", 100)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        found(run)


def test_pieces_have_sums_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "PIECE", 1000)
    content = os.urandom(2500)
    summing = checksums.Summing()
    for start in range(0, 2500, 700):
        summing.add(content[start : start + 700])
    sums = checksums.sums_of(content)
    assert summing.sums() == sums and len(sums) == 1 + 3
    (tmp_path / "file").write_bytes(content)
    assert checksums.damage_of(tmp_path / "file", sums) is None
    flip(tmp_path / "file", 1999)
    assert "bytes from 1000 to 2000" in checksums.damage_of(tmp_path / "file", sums)
    for wrong in (None, [], {}, [1.5], ["a"], 3):
        assert "no checksums" in checksums.damage_of(tmp_path / "file", wrong)


def save_and_look(ranks: Ranks, folder: str) -> list[str | None]:
    """On two stages: each writes a file, and looks at a part of all."""
    run = Path(folder)
    ranks = ranks.with_stages(2)
    weight = torch.nn.Parameter(torch.full((4,), float(ranks.rank)))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    path = saving.save(run, ranks, Progress(step=1), {f"weight{ranks.rank}": weight}, optimizer, MADE_WITH)
    answers = [damage_in(path, ranks)]
    saving.save(run, ranks, Progress(step=2), {f"weight{ranks.rank}": weight}, optimizer, MADE_WITH)
    if ranks.is_main:
        flip(run / "global_step2" / "state-1.safetensors", -1)
    torch.distributed.barrier()
    return [*answers, damage_in(run / "global_step2", ranks)]


def test_ranks_share_the_reading_and_agree(tmp_path: Path) -> None:
    first, second = run_ranks(save_and_look, 2, str(tmp_path))
    assert first == second and first[0] is None
    assert f"{tmp_path / 'global_step2' / 'state-1.safetensors'}: is damaged" in first[1]


def whole_ones(run: Path) -> list[str]:
    """What a resume finds, if the process ends at this moment."""
    return [path.name for path in run.glob("global_step*") if path.suffix in ("", ".replaced") and not damage_in(path)]


def traced(monkeypatch: pytest.MonkeyPatch, run: Path) -> list[tuple[str, list[str]]]:
    """After each call that changes a name or removes one, and each sync: what is whole."""
    calls: list[tuple[str, list[str]]] = []

    def trace(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **keys: Any) -> Any:
            result = original(*arguments, **keys)
            told = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[0])
            calls.append((f"{name} {Path(told).relative_to(run.parent)}", whole_ones(run)))
            return result

        monkeypatch.setattr(owner, name, call)

    trace(os, "fsync")
    trace(os, "replace")
    trace(Path, "rename")
    trace(shutil, "rmtree")
    return calls


def test_with_one_kept_there_is_always_a_whole_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1, read_back=True)
    calls = traced(monkeypatch, run)
    save(run, 2, read_back=True)
    saving.remove_older(run / "global_step2", 1, None)
    # The same step once more, as after a resume.
    save(run, 2, read_back=True)
    monkeypatch.undo()
    assert all(whole for _, whole in calls)
    assert whole_ones(run) == ["global_step2"] and found(run) == run / "global_step2"
    names = [name for name, _ in calls]
    new, moved = f"{run.name}/global_step2.unfinished", f"replace {run.name}/latest.new"
    for file in ("state-0.safetensors", "progress.json", "checksums.json"):
        assert names.index(f"fsync {new}/{file}") < names.index(f"rename {new}")
    expected = [f"fsync {new}", f"rename {new}", f"fsync {run.name}", f"fsync {run.name}/latest.new", moved]
    assert names[names.index(expected[0]) :][: len(expected)] == expected
    assert names.index(moved) < names.index(f"rename {run.name}/global_step1")


def test_a_checkpoint_that_was_to_be_replaced_is_found(run: Path) -> None:
    """The process ended between two renames."""
    save(run, 1, 2)
    (run / "global_step2").rename(run / "global_step2.replaced")
    assert found(run) == run / "global_step2.replaced"
    assert Checkpoint(found(run)).progress.step == 2
    save(run, 2)
    assert found(run) == run / "global_step2" and not (run / "global_step2.replaced").exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that takes no larger files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_does_not_keep_what_is_written_is_noticed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)
    write: Callable[..., Any] = saving.write_tensors

    def forgetful(path: Path, *arguments: Any) -> Any:
        sums = write(path, *arguments)
        flip(path, -1)
        return sums

    monkeypatch.setattr(saving, "write_tensors", forgetful)
    with pytest.raises(UserError, match="state-0.safetensors: is damaged.*reading it back"):
        save(run, 2, read_back=True)
    assert {path.name for path in run.iterdir()} == {"global_step1", "latest"}


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(run, 1)
    write = saving.write_bytes

    def full(path: Path, content: bytes) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(saving, "write_bytes", full)
    is_state = name.startswith("state")
    reason = "File too large" if is_state else "No space left on device"
    with largest_file(100 if is_state else 10**9):
        with pytest.raises(UserError, match=f"{run / 'global_step2.unfinished' / name}: {reason}") as raised:
            save(run, 2)
    assert f"go on from the newest: --resume_from_checkpoint {run / 'global_step1'}" in str(raised.value)
    assert {path.name for path in run.iterdir()} == {"global_step1", "latest"}
    assert found(run) == run / "global_step1"


def save_beside_a_full_disk(ranks: Ranks, folder: str) -> str:
    """The disk of the second stage's machine is full."""
    ranks = ranks.with_stages(2)
    parameters, optimizer = state()
    with largest_file(10 if ranks.rank == 1 else 10**9):
        try:
            saving.save(Path(folder), ranks, Progress(step=1), parameters, optimizer, MADE_WITH)
        except UserError as error:
            return str(error)
    return "saved"


def test_all_ranks_learn_of_the_full_disk_of_one(tmp_path: Path) -> None:
    first, second = run_ranks(save_beside_a_full_disk, 2, str(tmp_path))
    assert first == second and "state-1.safetensors: File too large (on rank 1)" in first
    assert not list(tmp_path.iterdir())
