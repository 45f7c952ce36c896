"""What an export's files are called: as programs look for them, or by the name of the run, so that a folder with the
files of many runs can be read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from utils.adapters.in_full import beside_named, is_beside
from utils.adapters.kinds import ADAPTER_FILE, COMFYUI, COMFYUI_FILE
from utils.settings.schema import Settings

DENOISER_COMFYUI = f"model_{COMFYUI}.safetensors"
ENDING = ".safetensors"
DIGITS = 6
"""Of the number of a step or epoch in a name, so that files lie in their order."""


@dataclass(frozen=True)
class FileNames:
    """The names of the files of a run's exports.

    Attributes:
        run: its name.
        diffusers, comfyui: patterns of the names of a file in each layout; None for the usual name.
    """

    run: str | None = None
    diffusers: str | None = None
    comfyui: str | None = None

    @classmethod
    def of(cls, settings: Settings) -> FileNames:
        """As the settings say."""
        usual = ("{name}-{at}", f"{{name}}-{{at}}_{COMFYUI}") if settings.run_name else (None, None)
        return cls(settings.run_name, settings.file_name or usual[0], settings.file_name_comfyui or usual[1])

    def of_file(self, usual: str, export: str) -> str:
        """The name of a file in an export's folder.

        Args:
            usual: its name where a run has none.
            export: the name of the folder, as in "epoch3_ema".
        """
        if is_beside(usual):
            adapter = self.of_file(ADAPTER_FILE, export)
            return usual if adapter == ADAPTER_FILE else beside_named(usual, adapter)
        patterns = {ADAPTER_FILE: self.diffusers, COMFYUI_FILE: self.comfyui, DENOISER_COMFYUI: self.comfyui}
        pattern = patterns.get(usual)
        return usual if pattern is None else filled(pattern, self.run, padded(export)) + ENDING

    def title(self, export: str) -> str:
        """What programs show of an export."""
        return f"{self.run} {export}" if self.run else export


def padded(export: str) -> str:
    """The name of an export with all digits of its numbers: "step500_ema" as "step000500_ema"."""
    return re.sub(r"\d+", lambda number: number[0].zfill(DIGITS), export)


def filled(pattern: str, name: str | None, at: str) -> str:
    """A pattern with values in the place of `{name}` and `{at}`; what else is in braces stays."""
    return pattern.replace("{at}", at).replace("{name}", name or "")
