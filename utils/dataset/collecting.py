"""A run's data on all ranks: each file is looked at once a machine, and not again while nothing changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from utils.dataset.buckets import MediaFacts
from utils.dataset.collection import Collection, Source, collect, write_list
from utils.dataset.found_before import FoundBefore
from utils.dataset.handing_over import made_once
from utils.dataset.manifest import Scan
from utils.errors import Problem, UserError
from utils.ranks import Ranks, gather, sign_of_life


def collect_together(
    ranks: Ranks, sources: Sequence[Source], facts: MediaFacts, how: Scan, **choices: Any
) -> list[Collection]:
    """`collect` on all ranks: the main rank reads the files. One rank of every other machine reads what the main rank
    has stored in the index, and the ranks of one machine take what the first of them has found.

    Raises:
        UserError: on every rank, if the main rank found a problem, or if another rank found other files.
    """
    found, problems = None, []

    def raise_if_stopping() -> None:
        # The first look at a large dataset takes hours.
        sign_of_life(ranks, "collection")
        how.raise_if_stopping()

    if ranks.is_main:
        try:
            found = _collected(
                sources, facts, replace(how, progress=True, raise_if_stopping=raise_if_stopping), choices
            )
        except UserError as error:
            problems = [[problem.file, problem.where, problem.message] for problem in error.problems]
    shared = gather(ranks, "collection", problems, raise_if_stopping=how.raise_if_stopping)[0]
    if shared:
        raise UserError(Problem(*problem) for problem in shared)

    def make() -> list[Collection]:
        return found or _collected(sources, facts, replace(how, verify=False), choices, listing=False)

    collections = made_once(ranks, "collection", make, how.raise_if_stopping)
    _check_same(ranks, collections, how)
    return collections


def _collected(
    sources: Sequence[Source], facts: MediaFacts, how: Scan, choices: dict[str, Any], *, listing: bool = True
) -> list[Collection]:
    """`collect`, or what it found when the folders were as they are now."""
    before = FoundBefore.look(sources, facts, how, choices)
    found = None if before is None or how.verify else before.recalled()
    if found is None:
        found = collect(sources, facts, how, listing=listing, **choices)
        return found if before is None else before.remember(found)
    if listing:
        write_list(found, how.index.parent)
    return found


def _check_same(ranks: Ranks, collections: Sequence[Collection], how: Scan) -> None:
    names = "\n".join(sample.id for collection in collections for sample in collection.samples)
    seen = gather(
        ranks,
        "samples",
        hashlib.blake2b(names.encode(), digest_size=16).hexdigest(),
        raise_if_stopping=how.raise_if_stopping,
    )
    others = [rank for rank, digest in enumerate(seen) if digest != seen[0]]
    if others:
        raise UserError.of(
            f"the ranks {others} see other files than rank 0; do all machines see the same folders, and does nothing "
            "write into them?",
            str(collections[0].source.file),
        )
