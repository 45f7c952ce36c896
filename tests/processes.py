"""Starts a job on several processes, each of them one rank, and brings back what they return.

The processes are forked from a server that has imported torch and deepspeed already: a start takes a tenth of a second,
not five.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

TIMEOUT = timedelta(minutes=3)
PRELOADED = ["tests.preload"]


def start_server() -> str:
    """Lets the server import what it needs while the tests begin. Returns its address, for `use_server`."""
    _context()
    forkserver.ensure_running()
    return forkserver._forkserver._forkserver_address


def use_server(address: str) -> None:
    """Has processes forked from the server of another process, which ends with that one. multiprocessing knows how to
    ask any server, and not that it need not start one."""
    server = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd = address, os.pipe()[1]
    server.ensure_running = lambda: None


def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_ranks(job: Callable[..., Any], world_size: int, *arguments: Any, lost: Collection[int] = ()) -> list[Any]:
    """`job(ranks, *arguments)` on `world_size` connected processes; what each returns, in the order of the ranks, and
    None for those that are `lost` on the way.

    Raises:
        RuntimeError: one of them failed; with its traceback.
    """
    context = _context()
    results = context.Queue()
    port = _free_port()
    processes = [
        context.Process(target=_run, args=(job, rank, world_size, port, results, arguments, not lost), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    returned: dict[int, Any] = {}
    try:
        while len(returned) < world_size - len(lost):
            rank, value, error = results.get(timeout=TIMEOUT.total_seconds())
            if error:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
            returned[rank] = value
    finally:
        for process in processes:
            process.join(timeout=10 if len(returned) == world_size - len(lost) else 0.1)
            process.kill()
    return [returned.get(rank) for rank in range(world_size)]


def _check_server() -> None:
    """The server says nothing if it cannot import what it was given."""
    assert "tests.preload" in sys.modules, "run `python -m tests.preload` to see why it cannot be imported"


def _run(
    job: Callable[..., Any], rank: int, world_size: int, port: int, results: Any, arguments: tuple, all_end: bool
) -> None:
    from utils import ranks as together

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    try:
        _check_server()
        ranks = together.from_environment()
        together.connect(ranks)
        value = job(ranks, *arguments)
        if all_end:
            together.disconnect()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_command(
    words: list[str],
    world_size: int,
    log: Path,
    stop_after: str | None = None,
    *,
    ends_others: bool = False,
    taken: socket.socket | None = None,
    receives: int = signal.SIGTERM,
    prepare: Callable[[int], None] | None = None,
) -> list[int]:
    """`train.py` with these words on `world_size` processes; the exit codes, in the order of the ranks. What they print
    goes to `log`; once it has the text `stop_after`, the last process is sent what it `receives`. With `ends_others`
    the rest are sent SIGTERM when the main process has failed, as launchers do: they wait seconds for that. They are to
    meet at a free port, or at the one that is `taken`; then they are sent it when they are waiting for an answer there.
    The runs of a list are forked. Each process is prepared with its rank."""
    context, port = _context(), taken.getsockname()[1] if taken else _free_port()
    processes = [
        context.Process(target=_command, args=(words, rank, world_size, port, str(log), prepare))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while stop_after and time.monotonic() < deadline:
        if log.exists() and stop_after in log.read_text():
            os.kill(processes[-1].pid, receives)
            stop_after = None
        time.sleep(0.005)
    for process in processes:
        if ends_others and processes[0].exitcode:
            _end(process, taken)
        process.join(timeout=TIMEOUT.total_seconds())
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _end(process: multiprocessing.process.BaseProcess, taken: socket.socket | None) -> None:
    if taken and process.is_alive():
        taken.settimeout(TIMEOUT.total_seconds())
        # Open until the process has ended.
        with taken.accept()[0]:
            process.terminate()
            process.join(timeout=10)
        process.kill()
    process.terminate()


def _command(
    words: list[str], rank: int, world_size: int, port: int, log: str, prepare: Callable[[int], None] | None
) -> None:
    import train

    _check_server()
    if prepare:
        prepare(rank)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    # The runs of a list are interpreters of their own, which take seconds to import everything.
    subprocess.Popen = _forked_trainer
    sys.exit(train.main(words))


def _forked_trainer(command: list[str], env: Mapping[str, str]) -> Forked:
    """In the place of `subprocess.Popen`, for `train.py`."""
    import train

    assert Path(command[1]).name == "train.py", command

    def run() -> int:
        os.environ.clear()
        os.environ.update(env)
        return train.main(command[2:])

    return Forked(run)


class Forked:
    """A process forked from this one, with the methods of `subprocess.Popen`.

    Args:
        action: what it does; returns its exit code.
    """

    def __init__(self, action: Callable[[], int]):
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _free_port() -> int:
    """One that nobody takes until the processes do: not of those that the system gives to whoever asks for any."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, first)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
