"""What comes next is computed by other threads, a little ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from utils.errors import UserError

WORKERS = 2
STEPS_AHEAD = 2

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """The tasks' results in order, computed by a few threads that work a few tasks ahead.

    They get their next task when a result is taken, or with `go_on` before. An error in a task is raised at its turn.
    Close it to end the threads.
    """

    def __init__(self, tasks: Iterable[Callable[[], Item]]) -> None:
        self._tasks = _failing_in_turn(tasks)
        self._pending: deque[Future[Item]] = deque()
        self._pool = ThreadPoolExecutor(WORKERS)

    def go_on(self) -> None:
        """Hands out as many tasks as there may be. Python runs one thread at a time: called before something that does
        not run in Python, such as a backward pass, this keeps their work from what comes after it."""
        while len(self._pending) <= STEPS_AHEAD and (task := next(self._tasks, None)):
            self._pending.append(self._pool.submit(task))

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        self.go_on()
        if not self._pending:
            raise StopIteration
        return self._pending.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _failing_in_turn(tasks: Iterable[Callable[[], Item]]) -> Iterator[Callable[[], Item]]:
    """The tasks; if getting the next one fails, a task that fails with the same error."""
    try:
        yield from tasks
    except UserError as error:
        failure = error

        def fail() -> Item:
            raise failure

        yield fail
