"""What a run has said that one wants to read later: its plan, its warnings, and of what its data consists."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError, without_controls
from utils.json_files import read_json
from utils.run.durable import replace_text

NOTES = "notes.json"
NOTE = "note"
"""A record of the log with this attribute is kept under that name, as in `logger.info(plan, extra={NOTE: "plan"})`."""
KINDS = {"texts": dict[str, str], "warnings": list[list[Any]], "data": list[dict[str, Any]]}
MOST_WARNINGS = 200
LONGEST = 2000
"""Letters of a warning."""


class Notes(logging.Handler):
    """Keeps the warnings and errors of the log, each once, and the texts that are marked as notes.

    Attributes:
        texts: by name.
        warnings: text -> (time of the first one in seconds since 1970, level).
        how: the run stands: "going on", "done", "stopped" or "failed"; "" if that is not known.
        data: what the page tells of each dataset; see `described` in `models/assembly/described.py`.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: dict[str, str] = {}
        self.warnings: dict[str, tuple[float, str]] = {}
        self.data: Sequence[Mapping[str, Any]] = ()
        self.left_out = 0
        self.how = ""

    def emit(self, record: logging.LogRecord) -> None:
        if name := getattr(record, NOTE, None):
            self.texts[name] = record.getMessage()
        elif record.levelno >= logging.WARNING:
            self._warn(record.getMessage(), record.created, record.levelname)

    def add(self, text: str) -> None:
        """Adds an error that is not in the log."""
        self._warn(text, time.time(), "ERROR")

    def _warn(self, text: str, when: float, level: str) -> None:
        text = without_controls(text)[:LONGEST]
        if text in self.warnings:
            return
        if len(self.warnings) == MOST_WARNINGS:
            self.left_out += 1
            return
        self.warnings[text] = (when, level)

    def save(self, folder: Path) -> None:
        """Writes all of it into the run's folder.

        Raises:
            OSError: it cannot be written.
        """
        warnings = [[text, when, level] for text, (when, level) in self.warnings.items()]
        content = {"texts": self.texts, "warnings": warnings, "left_out": self.left_out, "data": list(self.data)}
        content["how"] = self.how
        replace_text(folder / NOTES, json.dumps(content, indent=1))

    def go_on(self, folder: Path) -> None:
        """Adds what the run said before it was stopped, if its folder knows that; it comes first."""
        if not (folder / NOTES).exists():
            return
        before, own = notes_in(folder), self.warnings
        self.warnings, self.left_out = before.warnings, before.left_out
        for text, (when, level) in own.items():
            self._warn(text, when, level)
        self.texts = {**before.texts, **self.texts}


def notes_in(folder: Path) -> Notes:
    """The notes of a run's folder; none, with a warning that says so, if they cannot be read."""
    notes, path = Notes(), folder / NOTES
    if not path.exists():
        return notes
    try:
        content = read_json(path, kinds=KINDS)
        notes.texts, notes.data = content["texts"], content["data"]
        notes.warnings = {str(text): (float(when), str(level)) for text, when, level in content["warnings"]}
        notes.left_out, notes.how = int(content["left_out"]), str(content.get("how", ""))
    except (UserError, KeyError, ValueError, TypeError) as error:
        notes = Notes()
        notes.warnings[f"{path} cannot be read: {error}"] = (time.time(), "WARNING")
    return notes


def kept_notes() -> Notes:
    """Those of this process's log; see `reporting.start_logging`."""
    return next((handler for handler in logging.getLogger().handlers if isinstance(handler, Notes)), None) or Notes()
