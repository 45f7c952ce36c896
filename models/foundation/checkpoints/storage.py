"""In which form each parameter of a denoiser is kept in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch


@dataclass(frozen=True)
class Storage:
    """A plain tensor of one type. Linears that keep their weight in fewer bits are modules of another class, which take
    the place of those that no rule names (see `utils.quantised`).

    Attributes:
        dtype: the type of the parameter.
    """

    dtype: torch.dtype

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        """Values as a file or an initialisation gives them, in the form in which the parameter keeps them."""
        return values.to(self.dtype)


@dataclass(frozen=True)
class StorageRules:
    """Which parameter is kept in which form.

    Attributes:
        default: the form of all parameters that no rule names.
        rules: (glob pattern of a parameter's name, its form); the first that matches counts.
    """

    default: Storage
    rules: tuple[tuple[str, Storage], ...] = ()

    @classmethod
    def with_high_precision(cls, dtype: torch.dtype, parts: Iterable[str]) -> StorageRules:
        """`dtype` for all parameters except those that have one of `parts` in their name, which stay float32."""
        return cls(Storage(dtype), tuple((f"*{part}*", Storage(torch.float32)) for part in parts))

    def of(self, name: str) -> Storage:
        """The form of the parameter of this name."""
        return next((storage for pattern, storage in self.rules if fnmatchcase(name, pattern)), self.default)

    def is_named(self, name: str) -> bool:
        """Whether a rule names the parameter."""
        return any(fnmatchcase(name, pattern) for pattern, _ in self.rules)
