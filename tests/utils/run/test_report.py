"""The page of a run is whole HTML in one file, shows what the run left, and never hinders the run."""

from __future__ import annotations

import errno
import json
import logging
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from utils.run import report
from utils.run.metrics import Metrics
from utils.run.notes import NOTE, NOTES, Notes, notes_in
from utils.run.numbers import Numbers
from utils.run.report import PAGE_NAME, RunPage, main
from utils.settings.run_tables import MonitoringSettings

WITHOUT_END = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Reads a page, and whether all that begins ends."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in WITHOUT_END:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def a_run(folder: Path, lr: float = 1e-3, factor: float = 1.0, *, samples: bool = True) -> Path:
    """A run's folder as a run of 20 steps leaves it."""
    folder.mkdir()
    (folder / "settings.toml").write_text(
        f'epochs = 1\n[optimizer]\nlr = {lr}\n[model]\ntype = "flux"\n[adapter]\ntype = "lora"\nrank = 4\n'
    )
    metrics = Metrics.from_settings(folder, MonitoringSettings(enable_tensorboard=False), {}, is_main=True)
    for step in range(1, 21):
        values = {"train/loss": factor / step, "train/lr": lr, "train/step_time_sec": 0.5, "train/grad_norm": 1.0}
        metrics.scalars({**values, "train_deciles/loss_0.35": 2 * factor / step}, step)
    for step in (0, 20):
        quantiles = {f"held/loss_quantile_0.{n}0": factor * n / (step + 1) for n in range(1, 10)}
        metrics.scalars({**quantiles, "held/loss": factor / (step + 1), "held/loss_standard_error": 0.25}, step)
    metrics.close()
    for step in (0, 20) if samples else ():
        place = folder / "samples" / f"step{step:06d}"
        place.mkdir(parents=True)
        Image.new("RGB", (600, 300), "red").save(place / "00_a_red_star.png")
        (place / "01_broken.png").write_bytes(b"no picture")
    return folder


def test_the_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "fox")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"name": "train/lo\n{"name": "cut')
    notes = Notes()
    log = logging.getLogger("test")
    records = [(logging.WARNING, "a <b>\x1b[31m thing", {}), (logging.INFO, "steps: 20", {NOTE: "plan"})]
    for level, text, extra in [*records, records[0], (logging.INFO, "not kept", {})]:
        notes.handle(log.makeRecord("test", level, "", 0, text, (), None, extra=extra))
    told = {"name": "train", "file": "data.toml", "samples": 5, "files": 7, "rejected": {"unreadable": 2}}
    notes.data = [{**told, "directories": {"stars": [5, "10"]}, "buckets": {"64 x 64": 5}, "told": ["x.png: is empty"]}]
    notes.how = "stopped"
    notes.save(run)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / PAGE_NAME}\n"
    page = Page(run / PAGE_NAME)
    for text in (
        "a <b>\\x1b[31m thing",
        "steps: 20",
        "2 unreadable",
        "x.png: is empty",
        "lr = 0.001",
        "held/loss at step 20",
        f"{1 / 21:.4f} ± 0.2500",
        "1 lines of metrics.jsonl are no numbers",
        "cannot be read",
        "Trained: flux, lora of rank 4. ",
        "stopped",
    ):
        assert page.text.count(text) >= 1, text
    assert page.text.count("thing") == 1 and "not kept" not in page.text
    titles = [own["aria-label"] for tag, own in page.attributes if tag == "svg" and "aria-label" in own]
    assert titles[:4] == ["Training loss", "Training loss by noise level", "Evaluation", "held/loss by noise level"]
    pictures = [own["src"] for tag, own in page.attributes if tag == "img"]
    assert len(pictures) == 2 and all(source.startswith("data:image/jpeg;base64,") for source in pictures)
    # In one file, which asks nobody for anything, and as wide as the screen.
    assert not any({"href", "srcset"} & own.keys() for _, own in page.attributes)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.attributes
    assert (run / PAGE_NAME).stat().st_size < 100_000


def test_runs_are_compared(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / name, lr, factor, samples=False) for name, lr, factor in (("a", 1e-3, 1), ("b", 1e-4, 2))]
    page = tmp_path / "both.html"
    assert main([*map(str, runs), "--output", str(page)]) == 0
    read = Page(page)
    assert "optimizer.lr0.0010.0001" in read.text and "epochs" not in read.text.split("Curves")[0]
    assert f"{2 / 21:.4f} ± 0.2500" in read.text and f"{1 / 21:.4f} ± 0.2500" in read.text
    assert [own["aria-label"] for tag, own in read.attributes if "aria-label" in own][:2] == [
        "Training loss",
        "held/loss",
    ]


def test_what_is_no_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert f"{tmp_path}\n  has no metrics.jsonl; name the folder of a run" in capsys.readouterr().err
    run = a_run(tmp_path / "a", samples=False)
    assert main([str(run), "--output", str(tmp_path / "none" / "x.html")]) == 1
    assert "cannot be written (No such file" in capsys.readouterr().err


def test_a_full_disk_is_told_once_and_the_page_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = a_run(tmp_path / "a", samples=False)
    page = RunPage(run)
    with monkeypatch.context() as full:

        def no_room(path: Path, text: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        full.setattr(report, "replace_text", no_room)
        page.write()
        page.write()
    told = f"run.html cannot be written, and training goes on: {run / PAGE_NAME}: No space left on device"
    assert [record.getMessage() for record in caplog.records] == [told]
    page.write()
    assert Page(run / PAGE_NAME).text


def test_numbers_are_read_as_they_come(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a", samples=False)
    numbers = Numbers(run)
    numbers.read()
    assert numbers.last("train/loss") == 1 / 20 and numbers.evaluations() == ["held/loss"]
    line = json.dumps({"name": "train/loss", "value": 0.5, "step": 21, "time": 1.0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line)
        file.flush()
        numbers.read()
        assert numbers.last("train/loss") == 1 / 20
        file.write("\n")
    numbers.read()
    assert numbers.points("train/loss")[-2:] == [(20, 1 / 20), (21, 0.5)] and numbers.unreadable == 0
    # A run that goes on from an earlier step cuts its file.
    Metrics.from_settings(run, MonitoringSettings(enable_tensorboard=False), {}, is_main=True, resumed_at=5).close()
    numbers.read()
    assert numbers.points("train/loss")[-1] == (5, 1 / 5)


def test_warnings_before_a_stop_come_first(tmp_path: Path) -> None:
    notes = [Notes(), Notes()]
    for own, texts in zip(notes, [["first", "both"], ["both", "second"]], strict=True):
        for text in texts:
            own.handle(logging.getLogger("test").makeRecord("test", logging.ERROR, "", 0, text, (), None))
    notes[0].save(tmp_path)
    notes[1].go_on(tmp_path)
    assert list(notes[1].warnings) == ["first", "both", "second"]
    (tmp_path / NOTES).write_text("{")
    assert "notes.json cannot be read" in next(iter(notes_in(tmp_path).warnings))
