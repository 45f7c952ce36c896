"""Finds what the modules of a package declare, so that adding a file is enough."""

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def kinds_in(package: str, folders: Iterable[str], without: Iterable[str]) -> tuple[Any, ...]:
    """The members of `KINDS` in all modules of a package, ordered by the names of the modules.

    Args:
        package: name of the package, such as "optimizers".
        folders: its `__path__`.
        without: names of the modules without `KINDS`.
    """
    return _kinds_in(package, tuple(folders), frozenset(without))


@cache
def _kinds_in(package: str, folders: tuple[str, ...], without: frozenset[str]) -> tuple[Any, ...]:
    names = sorted(module.name for module in iter_modules(folders) if module.name not in without)
    return tuple(kind for name in names for kind in import_module(f"{package}.{name}").KINDS)
