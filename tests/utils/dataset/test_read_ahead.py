"""Tasks are done ahead by other threads: as many as may be, when they are told to, and no more."""

import threading
from functools import partial
from itertools import count

from utils.dataset.read_ahead import STEPS_AHEAD, ReadAhead


def test_what_is_told_to_go_on_takes_up_no_task_when_the_next_result_is_taken() -> None:
    begun = []

    def tasks():
        for number in count():
            begun.append(number)
            yield partial(int, number)

    ahead = ReadAhead(tasks())
    assert next(ahead) == 0 and len(begun) == 1 + STEPS_AHEAD
    for number in (1, 2, 3):
        ahead.go_on()
        ahead.go_on()
        assert len(begun) == number + 1 + STEPS_AHEAD
        assert next(ahead) == number
        assert len(begun) == number + 1 + STEPS_AHEAD
    ahead.close()


def test_it_ends_with_its_tasks() -> None:
    before = set(threading.enumerate())
    ahead = ReadAhead(partial(int, number) for number in range(4))
    assert list(ahead) == [0, 1, 2, 3]
    ahead.go_on()
    assert list(ahead) == []
    ahead.close()
    assert not set(threading.enumerate()) - before
