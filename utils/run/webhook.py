"""Tells a server that the user names how a run does: JSON by POST, at each evaluation, at the end, and at a failure."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib import request

logger = logging.getLogger(__name__)

SECONDS = 10.0
"""So long one message may take, and so long the end of a run waits for those that are left."""


class Webhook:
    """Posts from a thread of its own, in order. What fails is told once in the log, without the address, which is a
    secret; training goes on.

    Args:
        address: None for nobody.
        folder: of the run; None before it has one.
    """

    def __init__(self, address: str | None = None, folder: Path | None = None, seconds: float = SECONDS):
        self._address, self._folder, self._seconds = address, folder, seconds
        self._waiting: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._has_failed = False

    def post(self, event: str, **content: Any) -> None:
        """Sends an event soon: {"event", "run", "folder", "time"} and the content."""
        if not self._address:
            return
        if self._thread is None:
            # One that hangs must not keep the process.
            self._thread = threading.Thread(target=self._send_all, daemon=True)
            self._thread.start()
        run = {"run": self._folder.name, "folder": str(self._folder)} if self._folder else {"run": "", "folder": ""}
        self._waiting.put({"event": event, **run, "time": time.time(), **content})

    def finish(self) -> None:
        """Waits for what is on its way, for some seconds at most."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(self._seconds)
            self._thread = None

    def _send_all(self) -> None:
        while (message := self._waiting.get()) is not None:
            try:
                self._send(message)
            except Exception as error:
                if not self._has_failed:
                    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
                    logger.warning(
                        "[monitoring] webhook did not take '%s', and the run goes on: %s", message["event"], reason
                    )
                self._has_failed = True

    def _send(self, message: dict[str, Any]) -> None:
        headers = {"Content-Type": "application/json", "User-Agent": "penstock"}
        asked = request.Request(self._address, json.dumps(message).encode(), headers, method="POST")
        with request.urlopen(asked, timeout=self._seconds) as answer:
            answer.read(1)
