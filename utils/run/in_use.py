"""Whether a run's folder is in use: two runs that go on in one would write over each other."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from utils.dataset.cache_lock import HeldFile
from utils.errors import UserError
from utils.ranks import Ranks, gather

LOCK_NAME = "run.lock"


class RunLock:
    """What the main process of a run holds of the run's folder, within its context."""

    def __init__(self) -> None:
        self._held: HeldFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        if self._held:
            self._held.release()
            self._held = None

    def take(self, run: Path, ranks: Ranks) -> None:
        """Marks the folder as in use until the end of the context, or of this process; again does nothing. All ranks
        call it.

        Raises:
            UserError: on every rank, if another run goes on in it; names its process.
        """
        refused = None
        if ranks.is_main and not (self._held and self._held.path.parent == run):
            self._release()
            file = HeldFile(run / LOCK_NAME)
            try:
                if file.take():
                    self._held = file
                else:
                    refused = f"another run goes on in this folder: {file.holder()}; wait for it or end it"
            except OSError as error:
                refused = f"the run cannot go on in this folder: {file.path.name} is not writable ({error.strerror})"
        refused = gather(ranks, f"in use/{run}", refused)[0]
        if refused:
            raise UserError.of(refused, str(run))
