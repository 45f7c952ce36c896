"""Names of files that belong together, in whatever form of Unicode they are written."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping


def normal(name: str) -> str:
    """The one form of a name: an accent may be a character of its own, as macOS writes it, or part of its letter."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class ByName:
    """Files by name. One that is written in another form of Unicode is found too, after one of exactly this form."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = files
        self._by_form = {normal(name): file for name, file in files.items() if not name.isascii()}

    def get(self, name: str | None) -> str | None:
        found = self._files.get(name)
        return found if found or name is None or name.isascii() else self._by_form.get(normal(name))
