"""A stop that is asked for is heard and does not interrupt."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from utils.run import signals
from utils.run.signals import DEMANDS, NOTICES, StopRequests
from utils.run.time_limit import TimeLimit


@pytest.fixture(autouse=True)
def nothing_is_ignored() -> Iterator[None]:
    """As some signals are in the background of a shell, or under nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (*DEMANDS, *NOTICES)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [*DEMANDS, *NOTICES])
def test_a_signal_is_remembered_until_it_is_asked_for(number: int) -> None:
    before = signal.getsignal(number)
    with StopRequests() as stop:
        assert not stop.pending()
        os.kill(os.getpid(), number)
        assert stop.pending()
        assert stop.exit_code == 128 + number
        os.kill(os.getpid(), number)
        assert stop.pending(), "a repeat is the same wish, and this process lives"
    assert signal.getsignal(number) == before


def test_what_a_system_sends_again_and_again_ends_nothing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of processor time is told every second; and a job scheduler's SIGTERM after its SIGUSR1 is the first."""
    monkeypatch.setattr(signals, "SECONDS_OF_REPEATS", -1.0)
    killed = []
    with StopRequests() as stop:
        for number in (*NOTICES, *NOTICES, signal.SIGTERM, signal.SIGXCPU):
            os.kill(os.getpid(), number)
        assert stop.exit_code == 128 + signal.SIGHUP
        monkeypatch.setattr(os, "kill", lambda process, number: killed.append((process, number)))
        signal.raise_signal(signal.SIGINT)
        assert killed == [(os.getpid(), signal.SIGINT)]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    """As SIGHUP does under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            with stop.ending_at_once():
                os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.pending()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_end_the_process_at_once_for_a_while() -> None:
    with StopRequests() as stop:
        heard = signal.getsignal(signal.SIGTERM)
        with stop.ending_at_once():
            assert {signal.getsignal(number) for number in (*DEMANDS, *NOTICES)} == {signal.SIG_DFL}
        assert signal.getsignal(signal.SIGTERM) == heard
        os.kill(os.getpid(), signal.SIGTERM)
        with stop.ending_at_once():
            assert stop.pending()


def test_the_end_of_the_time_is_a_stop_with_code_0(caplog: pytest.LogCaptureFixture) -> None:
    stop = StopRequests()
    stop.time = TimeLimit(100.0, 0.0, lambda: 90.0)
    assert not stop.pending() and stop.exit_code == 143
    stop.time = TimeLimit(100.0, 0.0, lambda: 96.0)
    assert stop.pending() and stop.pending() and stop.exit_code == 0
    assert not stop.asked() and caplog.text.count("time_limit is near") == 1
