"""What the modules of a folder declare: a file that is put there is found, and nothing else need be changed."""

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def kinds_in(package: str, folders: Iterable[str], without: Iterable[str]) -> tuple[Any, ...]:
    """The members of `KINDS` of every module in a package's folders, in the order of the modules' names.

    Args:
        package: name of the package, as in "optimizers".
        folders: its `__path__`.
        without: names of the modules that declare none.
    """
    return _kinds_in(package, tuple(folders), frozenset(without))


@cache
def _kinds_in(package: str, folders: tuple[str, ...], without: frozenset[str]) -> tuple[Any, ...]:
    names = sorted(module.name for module in iter_modules(folders) if module.name not in without)
    return tuple(kind for name in names for kind in import_module(f"{package}.{name}").KINDS)
