"""A stop that is asked for is heard and does not interrupt."""

from __future__ import annotations

import os
import signal

from utils.run.signals import StopRequests


def test_a_signal_is_remembered_until_it_is_asked_for() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as stop:
        assert not stop.pending()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.pending()
        assert stop.exit_code == 143
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.pending(), "a repeat is the same wish, and this process lives"
    assert signal.getsignal(signal.SIGTERM) == before


def test_signals_end_the_process_at_once_for_a_while() -> None:
    with StopRequests() as stop:
        heard = signal.getsignal(signal.SIGTERM)
        with stop.ending_at_once():
            assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == heard
        os.kill(os.getpid(), signal.SIGTERM)
        with stop.ending_at_once():
            assert stop.pending()
