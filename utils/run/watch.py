"""A watch over the ranks of a run: one that fails, dies or hangs ends the others soon, and they say which, and why.

A rank that waits inside of a collective for another one hears nothing: no signal, no exception, until the collective's
time is up, and then its message names neither the rank nor the reason. So each rank has a thread that tells the run's
key-value store every second where the rank is, and looks whether its neighbours on the same machine are alive. The main
rank judges, and the others read its verdict. Who does not leave by itself after a verdict is ended.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from utils.errors import UserError
from utils.machine import machine
from utils.ranks import Ranks
from utils.run.attempts import reason_of

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""How long the ranks have after a verdict to leave by themselves, with what they have to say."""
SILENCE = timedelta(minutes=5)
"""How long a rank may give no sign of life: its machine, or the way to it, is gone."""
SHOWN_FILES, SHOWN_RANKS = 8, 16
LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))
LOSS = re.compile("gloo|nccl|Connection (reset|closed|refused)", re.IGNORECASE)
GONE = "its process has ended without a word: killed, perhaps by the system for the memory that it took"
GO_ON = "--resume_from_checkpoint goes on from the newest checkpoint"


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        what: it does, as text.
        files: of the samples that it works on.
        stands: seconds since it came further; 0 where it may take any time.
        call: its innermost call.
        failed: the error that it has met.
        left: whether it has ended as it should.
        process, machine: the number of its process, and where that is one.
        beat: a number that changes with every sign of life.
    """

    what: str = ""
    files: Sequence[str] = ()
    stands: float = 0.0
    call: str = ""
    failed: str | None = None
    left: bool = False
    process: int = 0
    machine: str = ""
    beat: int = 0


@dataclass(frozen=True)
class Work:
    """What a rank works on.

    Attributes:
        files: those of its samples.
        progress: changes whenever the work comes further, which it must do within the watch's minutes; None where it
            may take any time.
    """

    what: str
    files: Callable[[], Sequence[str]] = tuple
    progress: Callable[[], Any] | None = None


class Watch:
    """Watches over the ranks of a run from `begin` to `close`; before, and with one rank, there is nothing to watch.

    Args:
        end: ends this process at once, with the exit code.
        beat: seconds between two signs of life, and `grace` those between a verdict and the end.

    Attributes:
        tell_end: called with the verdict before it ends this process.
    """

    def __init__(
        self,
        *,
        end: Callable[[int], None] = os._exit,
        beat: float = BEAT_SECONDS,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._end, self._beat, self._grace = end, beat, grace
        self._place, self._work = Place(), Work("preparing data or weights")
        self._since, self._last = time.monotonic(), None
        self._closed, self._told, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._waiting = self._main_is_lost = False
        self._seen: dict[int, tuple[int, float]] = {}
        self._known: dict[int, Place] = {}
        self._main: Place | None = None
        self._thread: threading.Thread | None = None
        self._verdict: str | None = None
        self.tell_end: Callable[[str], None] = lambda verdict: None

    def begin(self, ranks: Ranks, minutes: float) -> None:
        """Begins with the connected ranks.

        Args:
            minutes: how long a step may come no further, beyond which the run ends.
        """
        self.ranks, self.minutes = ranks, minutes
        if ranks.world_size == 1:
            return
        self._place = replace(self._place, process=os.getpid(), machine=machine())
        self._main_thread = threading.get_ident()
        # A connection of its own: the other one is held while somebody waits for a key.
        self._store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store().clone())
        self._tell()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @property
    def doing(self) -> str:
        """What this rank does, as text."""
        return self._work.what

    def at(self, work: Work) -> None:
        """Notes what this rank does from now on."""
        with self._lock:
            self._work, self._since, self._last = work, time.monotonic(), None

    def failed(self, error: BaseException) -> None:
        """Tells the other ranks that this one has met an error, with which it leaves. Of one that is for the user it
        tells the beginning, since this rank tells all of it."""
        if isinstance(error, UserError):
            self._note(failed=reason_of(error).split("\n")[0].removesuffix("."))
            return
        reason = " ".join(str(error).split())
        self._note(failed=f"{type(error).__name__}: {reason}".removesuffix(": "))

    def linger(self) -> None:
        """Lets the other ranks read what this one has told, if the store may end with this process."""
        if self._thread is not None and self.ranks.is_main:
            time.sleep(2 * self._beat)

    def explains(self, error: BaseException) -> bool:
        """Whether a collective failed because another rank is lost, and the watch has told of that rank."""
        if self._thread is None or not _is_loss(error):
            return False
        self._waiting = True
        self._told.wait(self._grace)
        return self._told.is_set()

    def verdict_behind(self, error: BaseException) -> str | None:
        """The verdict that `explains` an error, if one does."""
        return self._verdict if self.explains(error) else None

    def close(self) -> None:
        """Ends the watch over this rank, which leaves as it should."""
        self._closed.set()
        self._note(left=True)

    def _note(self, **changes: Any) -> None:
        if self._thread is not None and self._place.failed is None:
            with self._lock:
                self._place = replace(self._place, **changes)
            self._tell()

    def _run(self) -> None:
        while not self._closed.wait(self._beat):
            try:
                self._tell(raises=True)
                self._look_at_neighbours()
                verdict = self._judged() if self.ranks.is_main else self._read_verdict()
            except dist.DistError:
                self._main_is_lost = True
                verdict = f"rank 0, at whose store the ranks meet, is gone. {_where(self._main)}"
            if verdict:
                self._leave(verdict)
                return

    def _tell(self, *, raises: bool = False) -> None:
        """Gives a sign of life, with where this rank is."""
        with self._lock:
            self._place = place = self._updated()
            try:
                self._store.set(str(self.ranks.rank), json.dumps(asdict(place)))
            except dist.DistError:
                if raises:
                    raise

    def _updated(self) -> Place:
        """Where this rank is now."""
        now, work, stands = time.monotonic(), self._work, 0.0
        if work.progress is not None:
            progress = work.progress()
            if progress != self._last:
                self._since, self._last = now, progress
            stands = round(now - self._since, 1)
        return replace(
            self._place,
            what=work.what,
            files=tuple(work.files())[: SHOWN_FILES + 1],
            stands=stands,
            call=_innermost_call(self._main_thread),
            beat=self._place.beat + 1,
        )

    def _read_verdict(self) -> str | None:
        """The main rank's verdict, or one on the main rank itself, whose store may be its launcher's and outlive it."""
        if self._store.check(["verdict"]):
            return self._store.get("verdict").decode()
        if not self._store.check(["0"]):
            return None
        self._main = self._read(0)
        verdict = self._verdict_on({0: self._main})
        self._main_is_lost = verdict is not None
        return verdict

    def _read(self, rank: int) -> Place:
        return Place(**json.loads(self._store.get(str(rank))))

    def _look_at_neighbours(self) -> None:
        """Tells of a process on this machine that is gone, which nobody else can see at once."""
        for rank in range(self.ranks.world_size):
            if rank not in self._known and self._store.check([str(rank)]):
                self._known[rank] = self._read(rank)
            known = self._known.get(rank)
            if known and known.machine == self._place.machine and not _lives(known.process):
                last = self._read(rank)
                if not last.left and last.failed is None:
                    self._store.set(str(rank), json.dumps(asdict(replace(last, failed=GONE))))

    def _judged(self) -> str | None:
        """The verdict on the run, which the others read too; None as long as all is well."""
        keys = [str(rank) for rank in range(self.ranks.world_size)]
        present = [rank for rank, key in enumerate(keys) if self._store.check([key])]
        places = dict(zip(present, map(self._read, present), strict=True))
        verdict = self._verdict_on(places)
        if verdict:
            self._store.set("verdict", verdict)
        return verdict

    def _verdict_on(self, places: Mapping[int, Place]) -> str | None:
        now = time.monotonic()
        for rank, place in places.items():
            if self._seen.get(rank, (None, 0))[0] != place.beat:
                self._seen[rank] = (place.beat, now)
        for rank, place in places.items():
            if place.failed is not None:
                return f"{self._name(rank)}: {place.failed}. {_where(place)}"
        for rank, place in places.items():
            silent = now - self._seen[rank][1]
            if not place.left and silent > SILENCE.total_seconds():
                return f"{self._name(rank)} has given no sign of life for {silent / 60:.0f} minutes. {_where(place)}"
        return self._hanging(places)

    def _hanging(self, places: Mapping[int, Place]) -> str | None:
        """All ranks come to a stand when one does: the first to do so stands longest. One that is silent cannot say
        that it stands."""
        if not any(place.stands > 60 * self.minutes for place in places.values()):
            return None
        now = time.monotonic()
        silent = {rank: max(0.0, now - self._seen[rank][1] - 2 * self._beat) for rank in places}
        stands = {rank: place.stands + silent[rank] for rank, place in places.items()}
        first, *_ = in_turn = sorted(places, key=lambda rank: (-silent[rank], -stands[rank]))
        told = [
            f"  {self._name(rank)}: {stands[rank]:.0f} s in {places[rank].call or 'an unknown call'}, "
            f"{places[rank].what}{', without a sign of life' if silent[rank] else ''}"
            for rank in in_turn[:SHOWN_RANKS]
        ]
        return "\n".join(
            [
                f"the step comes no further for {self.minutes:g} minutes (hang_timeout). {self._name(first)} stands "
                f"longest. {_where(places[first])}",
                *told,
            ]
        )

    def _name(self, rank: int) -> str:
        data_ranks = self.ranks.data_ranks
        return f"rank {rank} (stage {rank // data_ranks}, data rank {rank % data_ranks})"

    def _leave(self, verdict: str) -> None:
        """Ends this process, unless it leaves by itself in time; or tells those that wait for the verdict."""
        deadline = time.monotonic() + self._grace
        while time.monotonic() < deadline and not self._waiting:
            if self._closed.wait(min(self._beat, self._grace)):
                return
        self._say(verdict)
        self._verdict = verdict
        self._told.set()
        if not self._waiting:
            self.tell_end(verdict)
            self._end(1)

    def _say(self, verdict: str) -> None:
        # Where the main rank is gone, one on each machine tells.
        if self.ranks.is_main or (self.ranks.local_rank <= 1 and self._main_is_lost):
            sys.stderr.write(f"\nerror: {verdict}\nThe other ranks wait for it in vain and end here; {GO_ON}\n")
        sys.stdout.flush()
        sys.stderr.flush()


def _where(place: Place | None) -> str:
    """Where a rank was."""
    if place is None:
        return "Where it was is not known"
    files = [*place.files[:SHOWN_FILES], *(["..."] if len(place.files) > SHOWN_FILES else [])]
    return f"It was at: {place.what}" + (f" ({', '.join(files)})" if files else "")


def _innermost_call(thread: int) -> str:
    """The innermost call of a thread that is not a library's."""
    frame = sys._current_frames().get(thread)
    while frame and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}" if frame else ""


def _is_loss(error: BaseException) -> bool:
    """Whether an error is what a collective says when another rank is not there any more."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(LOSS.search(str(error))))


def _lives(process: int) -> bool:
    """Whether a process of this machine is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
