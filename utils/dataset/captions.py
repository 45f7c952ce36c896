"""From a caption as written to the texts that a sample is trained with. All draws are pure functions of their names.

A caption may be a list of tags separated by `cache_shuffle_delimiter`. Some tags are kept: they stay where they are,
are never dropped, and keep their capitals. These are the first `keep_tokens` tags; or, in a caption that contains
`keep_tokens_separator`, all tags before the first separator and all behind the second one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from utils.diffusion import seeds
from utils.settings.dataset_schema import DirectorySettings

VERSIONS_IN_ORDER = 8
"""Number of versions of a caption whose tags are dropped or change their capitals but keep their order, or that has
wildcards (`cache_shuffle_num` = 0): with a single version, a dropped tag would never be learned."""

_CAPITALS: tuple[Callable[[str], str], ...] = (
    str.lower,
    str.capitalize,
    lambda tag: " ".join(word.capitalize() for word in tag.split(" ")),
    str.upper,
)


def caption_variants(
    captions: Sequence[str], directory: DirectorySettings, seed: int, identity: str
) -> tuple[str, ...]:
    """All the texts that one sample may be trained with, without duplicates, in a stable order.

    If there are several captions, all of them are used, or the first one with `multiple_captions` = "first". Each has
    `cache_shuffle_num` versions; if that is 0, it has one version, or `VERSIONS_IN_ORDER` if tags are dropped or
    change their capitals, or if it has wildcards that are read.

    Args:
        identity: a unique name of the sample.
    """
    if directory.multiple_captions == "first":
        captions = captions[:1]

    def versions(caption: str) -> int:
        varies = _changes_tags(directory) or (directory.enable_wildcard and ("\n" in caption or choice_in(caption)))
        return directory.cache_shuffle_num or (VERSIONS_IN_ORDER if varies else 1)

    return tuple(
        dict.fromkeys(
            caption_variant(caption, directory, seed, identity, index)
            for caption in captions
            for index in range(versions(caption))
        )
    )


def caption_variant(caption: str, directory: DirectorySettings, seed: int, identity: str, index: int) -> str:
    """Version number `index`, from 0 on without end, of one caption.

    Its wildcards are replaced, and its tags are dropped, shuffled and capitalised, in this order; then the trigger
    word, the prefix and the suffix are added, which stay as they are. A tag that contains the trigger word is not
    dropped and keeps its capitals.
    """
    draws = _Draws(seed, identity, index)
    caption = _without_wildcards(caption, draws) if directory.enable_wildcard else caption
    caption = _with_other_tags(caption, directory, draws)
    trigger = directory.trigger_word
    if trigger and not _contains(caption, trigger):
        caption = f"{trigger}, {caption}" if caption else trigger
    return f"{directory.caption_prefix}{caption}{directory.caption_suffix}"


def choice_in(caption: str) -> str:
    """The first choice {a|b} in a caption; "" if it has none."""
    found = _CHOICE.search(_escaped(caption))
    return found[0] if found else ""


def _without_wildcards(caption: str, draws: _Draws) -> str:
    """The caption with one line of several, and one text of each {a|b|c}, innermost first; {{a}} is {a} itself."""
    lines = [line.strip() for line in caption.split("\n") if line.strip()]
    if len(lines) > 1:
        caption = lines[draws.option(len(lines), "line")]
    text, number = _escaped(caption), 0
    while choice := _BRACES.search(text):
        options = choice[1].split("|")
        text = text[: choice.start()] + options[draws.option(len(options), number)] + text[choice.end() :]
        number += 1
    return text.replace(_OPEN, "{").replace(_CLOSE, "}")


def _escaped(caption: str) -> str:
    # In pairs alone: two braces may also close one choice within another.
    return _LITERAL.sub(f"{_OPEN}\\1{_CLOSE}", caption)


def _changes_tags(directory: DirectorySettings) -> bool:
    return directory.tag_dropout > 0 or directory.shuffle_capitalization > 0


class _Draws(NamedTuple):
    seed: int
    identity: str
    index: int

    def uniform(self, *name: object) -> float:
        return seeds.uniform(self.seed, "captions", self.identity, self.index, *name)

    def option(self, count: int, *name: object) -> int:
        """One of `count` options. Of `VERSIONS_IN_ORDER` versions in succession each has its own part of them, so that
        as many options are all drawn."""
        block, place = divmod(self.index, VERSIONS_IN_ORDER)
        parts = seeds.permutation(VERSIONS_IN_ORDER, self.seed, "wildcards", self.identity, block, *name)
        return int((parts[place] + self.uniform("wildcard", *name)) / VERSIONS_IN_ORDER * count)

    def permutation(self, count: int) -> list[int]:
        return seeds.permutation(count, self.seed, "captions", self.identity, self.index)


class _Tags(NamedTuple):
    before: list[str]
    free: list[str]
    behind: list[str]


def _with_other_tags(caption: str, directory: DirectorySettings, draws: _Draws) -> str:
    shuffles, changes = directory.cache_shuffle_num > 0, _changes_tags(directory)
    separator = directory.keep_tokens_separator
    if not shuffles and not changes and not (separator and separator in caption):
        return caption
    tags = _tags(caption, directory)
    free = list(enumerate(tags.free))
    if changes:
        free = [(number, tag) for number, tag in free if not _is_dropped(number, tag, directory, draws)]
    if shuffles:
        free = [free[locator] for locator in draws.permutation(len(free))]
    if changes:
        free = [(number, _capitalised(number, tag, directory, draws)) for number, tag in free]
    return directory.cache_shuffle_delimiter.join([*tags.before, *(tag for _, tag in free), *tags.behind])


def _is_dropped(number: int, tag: str, directory: DirectorySettings, draws: _Draws) -> bool:
    probability = directory.tag_dropout
    return (
        probability > 0 and draws.uniform("drop", number) < probability and not _contains(tag, directory.trigger_word)
    )


def _capitalised(number: int, tag: str, directory: DirectorySettings, draws: _Draws) -> str:
    probability = directory.shuffle_capitalization
    if probability == 0 or draws.uniform("capitals", number) >= probability or _contains(tag, directory.trigger_word):
        return tag
    return _CAPITALS[int(draws.uniform("style", number) * len(_CAPITALS))](tag)


def _contains(text: str, trigger: str | None) -> bool:
    """Whether the trigger word is in the text as a word of its own: "art" is not in "party"."""
    # ASCII only: in scripts without spaces, a word has letters on both sides.
    return bool(trigger) and bool(re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.ASCII))


def _tags(caption: str, directory: DirectorySettings) -> _Tags:
    separator = directory.keep_tokens_separator
    if separator and separator in caption:
        parts = [_split(part, directory) for part in caption.split(separator, 2)]
        return _Tags(parts[0], parts[1], parts[2] if len(parts) == 3 else [])
    tags = _split(caption, directory)
    return _Tags(tags[: directory.keep_tokens], tags[directory.keep_tokens :], [])


def _split(text: str, directory: DirectorySettings) -> list[str]:
    """The tags of a text, stripped, without empty ones."""
    # "a,b" is two tags by ", " as well.
    delimiter = directory.cache_shuffle_delimiter.strip() or directory.cache_shuffle_delimiter
    pieces = text.split(delimiter)
    if directory.weighted_tags:
        pieces = _joined_in_brackets(pieces, delimiter)
    return [piece.strip() for piece in pieces if piece.strip()]


def _joined_in_brackets(pieces: list[str], delimiter: str) -> list[str]:
    """The pieces, where pieces inside one pair of brackets are joined again: "(a, b:1.2)" is one tag."""
    joined: list[str] = []
    depth = 0
    for piece in pieces:
        if depth > 0:
            joined[-1] += delimiter + piece
        else:
            joined.append(piece)
        for mark in _BRACKETS.findall(piece):
            depth = max(0, depth + (1 if mark in "([" else -1 if mark in ")]" else 0))
    return joined


def weighted(text: str) -> list[tuple[str, float]]:
    r"""The pieces of a text with their weights, as A1111 and ComfyUI read them; at least one piece.

    `(word)` weighs 1.1 times as much as the text around it, `[word]` 1 / 1.1 times, `(word:1.3)` 1.3 times; brackets
    may be nested. An opening bracket that is never closed reaches to the end; an unmatched closing one is text. `\(`,
    `\)`, `\[`, `\]` and `\\` are the characters themselves.
    """
    pieces: list[tuple[str, float]] = []
    # Each kind of bracket is closed by its own kind, regardless of the other.
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    for token in _TOKEN.finditer(text):
        mark = token.group()
        if mark in opened:
            opened[mark].append(len(pieces))
        elif token["weight"] and opened["("]:
            weigh(opened["("].pop(), float(token["weight"]))
        elif mark in _CLOSING and opened[_CLOSING[mark]]:
            weigh(opened[_CLOSING[mark]].pop(), _FACTORS[_CLOSING[mark]])
        else:
            pieces.append((token["escaped"] or mark, 1.0))
    for bracket, starts in opened.items():
        for start in starts:
            weigh(start, _FACTORS[bracket])
    merged = [("".join(text for text, _ in group), weight) for weight, group in groupby(pieces, lambda piece: piece[1])]
    return merged or [("", 1.0)]


def without_weights(text: str) -> str:
    """A text without the marks that `weighted` reads as weights."""
    return "".join(piece for piece, _ in weighted(text))


_BRACES = re.compile(r"\{([^{}]*)\}")
_LITERAL = re.compile(r"\{\{([^{}]*)\}\}")
_CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}")
# Characters that Unicode leaves to programs.
_OPEN, _CLOSE = "\ue000", "\ue001"
_FACTORS = {"(": 1.1, "[": 1 / 1.1}
_CLOSING = {")": "(", "]": "["}
_BRACKETS = re.compile(r"\\.|[()\[\]]", re.DOTALL)
_TOKEN = re.compile(
    r"\\(?P<escaped>[\\()\[\]])"
    r"|[()\[\]]"
    # A number with more digits could be infinite.
    r"|:\s*(?P<weight>[+-]?(?:\d{1,6}(?:\.\d*)?|\.\d+))\s*\)"
    r"|[^\\()\[\]:]+|.",
    re.DOTALL,
)
