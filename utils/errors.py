"""Mistakes of the user, collected so that one run of the program reports all of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

_UNPRINTABLE = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160))}
_LINES = {number: _UNPRINTABLE.pop(number) for number in map(ord, "\n\t")}


def without_controls(text: str) -> str:
    """A text whose characters that command a terminal are spelled out; line breaks and tabs stay. So are bytes of
    names that are no UTF-8, which cannot be written to files."""
    return text.translate(_UNPRINTABLE).encode(errors="backslashreplace").decode()


def printable(name: object) -> str:
    """A name from a file, as one line that commands no terminal."""
    return without_controls(str(name)).translate(_LINES)


@dataclass(frozen=True)
class Problem:
    """One mistake: the `file` it is in, `where` in it (`[optimizer] lr`), and what to do about it."""

    file: str
    where: str
    message: str


class UserError(ValueError):
    """Mistakes of the user or of their files; as a string, a screen of text for them to read."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        # Training and evaluation may share a file, and find the same in it.
        self.problems = list(dict.fromkeys(problems))
        assert self.problems, "an error without a problem"
        super().__init__(_screen(self.problems))

    @classmethod
    def of(cls, message: str, file: str = "", where: str = "") -> "UserError":
        """An error of one problem."""
        return cls([Problem(file, where, message)])


def _screen(problems: list[Problem]) -> str:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [count]
    # A file's problems may come in several passes (keys first, then rules): sort by first appearance.
    order = list(dict.fromkeys(problem.file for problem in problems))
    for file, group in groupby(sorted(problems, key=lambda p: order.index(p.file)), lambda p: p.file):
        lines += ["", file] if file else [""]
        lines += [f"  {p.where}: {p.message}" if p.where else f"  {p.message}" for p in group]
    return "\n".join(lines)
