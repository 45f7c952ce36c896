"""What happens to a run before it has a folder and a page: a failure is told to its webhook."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Self

from utils.ranks import Ranks
from utils.run.attempts import reason_of
from utils.run.signals import StopRequested, StopRequests
from utils.run.webhook import Webhook

logger = logging.getLogger(__name__)


class Beginning:
    """From the settings to the first step. An error that ends the run within this context is told to the webhook,
    unless the beginning is over: then the run tells of itself.

    Args:
        address: of the webhook; None for nobody.
        config: the run's file.
        stop: has the watch over the other ranks; one that is lost ends this process without an error.
        started: when the process began.
    """

    def __init__(self, address: str | None, config: Path, ranks: Ranks, stop: StopRequests, started: float):
        self._webhook, self._config, self._watch = Webhook(address if ranks.is_main else None), config, stop.watch
        # The other ranks wait seconds for this one, not for a server.
        stop.farewells.append(self._webhook.finish)
        self._is_over, self._started = False, started

    def __enter__(self) -> Self:
        self._watch.tell_end = self._tell_at_once
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, StopRequested) and not self._is_over:
            self._tell(self._watch.verdict_behind(error) or reason_of(error))

    def over(self) -> None:
        """The run has begun."""
        self._is_over = True
        logger.info("ready after %.1f s", time.monotonic() - self._started)

    def _tell(self, reason: str) -> None:
        self._webhook.post("failure", reason=reason, config=str(self._config))

    def _tell_at_once(self, reason: str) -> None:
        self._tell(reason)
        self._webhook.finish()
