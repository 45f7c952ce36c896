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
