"""A device that is pretended, whose copies are done as late as they may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch


class Late:
    """`Transfers` that copies when somebody waits for it, and not before. A mark is a number."""

    pending: dict[int, Callable[[], None]] = {}
    numbers: Iterator[int] = count()

    def buffer(self, size: int) -> torch.Tensor:
        return torch.full((size,), 255, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: int | None) -> int:
        return self.fill(target, lambda memory: memory.copy_(source), *after)

    def fill(self, target: torch.Tensor, write: Callable[[torch.Tensor], Any], *after: int | None) -> int:
        def run() -> None:
            for mark in after:
                self.finish(mark)
            write(target)

        mark = next(self.numbers)
        self.pending[mark] = run
        return mark

    def computed(self) -> None:
        pass

    def wait(self, mark: int | None) -> None:
        self.finish(mark)

    def finish(self, mark: int | None) -> None:
        run = self.pending.pop(mark, None)
        if run:
            run()
