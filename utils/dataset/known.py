"""What is known of a cache without asking it for every item."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.dataset import references
from utils.dataset.encoders import Encoder, wanted_by
from utils.dataset.samples import Sample
from utils.dataset.tensor_store import TensorStore


@dataclass(frozen=True)
class Known:
    """What is known of the items of an encoder without computing their keys."""

    encoder: Encoder
    identity: str
    cache_dir: Path
    owner: Path

    @classmethod
    def of(
        cls, encoder: Encoder, further: Sequence[Sample], identity: str, cache_dir: Path, owner: Path
    ) -> Known | None:
        """What is known of samples with this identity and a few further ones; None if they have none.

        Args:
            owner: the run's settings file, on whose behalf the items are wanted.
        """
        if not identity:
            return None
        parts = [identity, encoder.name, encoder.fingerprint, *encoder.reads, *sorted(wanted_by(encoder, further))]
        return cls(encoder, hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest(), cache_dir, owner)

    def number(self) -> int | None:
        """How many items there are, if the cache has all of them; None if that is not known."""
        with TensorStore(self.cache_dir / self.encoder.name) as store:
            return references.complete(self.cache_dir, store, self.owner, self.identity)

    def note(self, number: int) -> None:
        """Notes that the cache has all of them."""
        with TensorStore(self.cache_dir / self.encoder.name) as store:
            references.note_complete(self.cache_dir, store, self.owner, self.identity, number)
