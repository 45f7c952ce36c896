"""What a run tells a server, and that a server cannot hinder it."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.runs import launch
from utils.errors import UserError
from utils.ranks import Ranks
from utils.run.beginning import Beginning
from utils.run.parts import RunParts
from utils.run.report import RunPage
from utils.run.signals import StopRequested, StopRequests
from utils.run.webhook import Webhook
from utils.settings.run_tables import SECRETS, MonitoringSettings


class Server(HTTPServer):
    """Keeps what it is sent, and answers with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[dict] = []
        self.status = 200

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/secret"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert self.headers["Content-Type"] == "application/json"
        self.server.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with served() as own:
        yield own


@contextmanager
def served() -> Iterator[Server]:
    with Server() as own:
        thread = threading.Thread(target=own.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield own
        own.shutdown()
        thread.join()


def test_events_arrive_in_order(server: Server, tmp_path: Path) -> None:
    webhook = Webhook(server.address, tmp_path / "fox")
    webhook.post("evaluation", step=5, numbers={"held/loss": 0.5})
    webhook.post("end", how="done")
    webhook.finish()
    first, second = server.received
    assert abs(first.pop("time") - time.time()) < 60
    where = {"run": "fox", "folder": str(tmp_path / "fox")}
    assert first == {"event": "evaluation", **where, "step": 5, "numbers": {"held/loss": 0.5}}
    assert second["event"] == "end" and second["how"] == "done"


def test_what_is_refused_is_told_once_and_the_next_is_sent(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.status = 500
    webhook = Webhook(server.address, tmp_path)
    for event in ("evaluation", "evaluation", "end"):
        webhook.post(event)
    webhook.finish()
    assert len(server.received) == 3
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("[monitoring] webhook did not take 'evaluation'") and "secret" not in told


def test_a_server_that_is_silent_or_away_costs_seconds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        webhook = Webhook(address, tmp_path, seconds=0.2)
        webhook.post("end")
        assert time.monotonic() - began < 0.1
        webhook.finish()
        assert time.monotonic() - began < 2
    webhook = Webhook(address, tmp_path, seconds=2)
    with caplog.at_level(logging.WARNING):
        webhook.post("end")
        webhook.finish()
    assert "Connection refused" in caplog.text


def test_nobody_is_told_without_an_address(tmp_path: Path) -> None:
    webhook = Webhook(None, tmp_path)
    webhook.post("end")
    webhook.finish()
    assert webhook._thread is None


@pytest.mark.parametrize("wrong", ["example.org/hook", "ftp://example.org", "https://"])
def test_an_address_is_one_of_the_web(wrong: str) -> None:
    with pytest.raises(ValueError, match="is no address like"):
        MonitoringSettings(webhook=wrong)


def test_the_address_is_a_secret() -> None:
    assert "webhook" in SECRETS
    assert "secret" not in repr(MonitoringSettings(webhook="https://example.org/secret"))


def parts_of(page: RunPage, webhook: Webhook) -> RunParts:
    nothing = dict.fromkeys(("settings", "ranks", "engine", "optimizer", "parameters", "shares", "folder", "metrics"))
    return RunParts(**nothing, stop=StopRequests(), page=page, webhook=webhook)


def test_a_failure_that_ends_a_run_is_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    parts = parts_of(RunPage(tmp_path), Webhook(server.address, tmp_path))

    def fail() -> bool:
        raise UserError.of("training has diverged", where="step 7")

    with pytest.raises(UserError):
        parts.telling(fail)
    (told,) = server.received
    assert (told["event"], told["reason"]) == ("failure", "step 7: training has diverged")
    assert "the run failed: step 7: training has diverged" in (tmp_path / "run.html").read_text()


def test_the_end_of_a_run_by_its_watch_is_told(server: Server, tmp_path: Path) -> None:
    """Of one that hangs, no error is raised."""
    (tmp_path / "metrics.jsonl").write_text("")
    parts = parts_of(RunPage(tmp_path), Webhook(server.address, tmp_path))
    parts.telling(lambda: True)
    parts.stop.watch.tell_end("rank 1 has given no sign of life")
    assert [(told["event"], told["reason"]) for told in server.received] == [
        ("failure", "rank 1 has given no sign of life")
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failure_before_the_first_step_is_told_once(
    server: Server, tmp_path: Path, write_config: Callable[..., Path], processes: int
) -> None:
    """Where nothing is loaded, and where the ranks have met."""
    (tmp_path / "empty").mkdir()
    lacking = {"model__diffusers_path": str(tmp_path / "empty")}
    changes = [lacking, {"adapter__init_from_existing": str(tmp_path / "empty")}][processes - 1]
    config = write_config(monitoring__webhook=server.address, **changes)
    assert launch(config, "--check")[0] == [1] and not server.received
    codes, log = launch(config, processes=processes, ends_others=True)
    assert codes[0] == 1, log
    (told,) = server.received
    assert (told["event"], told["run"], told["folder"], told["config"]) == ("failure", "", "", str(config))
    assert str(tmp_path / "empty") in told["reason"] and "secret" not in log


def test_a_stop_before_the_first_step_is_no_failure(server: Server) -> None:
    stop = StopRequests()
    with pytest.raises(StopRequested), stop, Beginning(server.address, Path("a.toml"), Ranks(), stop, 0.0):
        raise StopRequested
    with (
        pytest.raises(OSError, match="gone"),
        stop,
        Beginning(server.address, Path("a.toml"), Ranks(), stop, 0.0) as begins,
    ):
        begins.over()
        raise OSError("gone")
    assert not server.received
