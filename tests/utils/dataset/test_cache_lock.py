"""One run at a time fills a cache, and the next one is told which."""

import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest

from tests.processes import PRELOADED
from utils.dataset.cache_lock import CacheBusy, CacheLock


def hold(folder, held):
    with CacheLock(folder) as lock:
        lock.acquire(0, str)
        held.set()
        time.sleep(60)


def test_the_second_waits_and_is_told(tmp_path):
    told = []
    with CacheLock(tmp_path) as first, CacheLock(tmp_path) as second:
        first.acquire(0, told.append)
        assert told == []
        threading.Timer(0.2, first.release).start()
        second.acquire(30, told.append)
        assert len(told) == 1 and f"host {socket.gethostname()}, pid {os.getpid()}, since 20" in told[0]
        with pytest.raises(CacheBusy, match=f"pid {os.getpid()}"):
            first.acquire(0, told.append)
    with CacheLock(tmp_path) as third:
        third.acquire(0, told.append)


def test_a_killed_run_holds_nothing(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path, held), daemon=True)
    process.start()
    assert held.wait(60)
    with CacheLock(tmp_path) as lock:
        with pytest.raises(CacheBusy, match=f"pid {process.pid}, since"):
            lock.acquire(0.1, str)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lock.acquire(0, str)
        assert f"pid {os.getpid()}" in lock.holder()
