"""A thread that notices when a run stands still, and says which rank the others wait for.

A collective waits in silence for a rank that does not come, and when its time is up it can only say that it is.
Every rank therefore writes into the store that the processes met at how far it is, and reads what the others wrote.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what shows progress says how far it is, and need not load torch for it
    import torch.distributed as dist

EXIT_STALLED = 4
"""Exit code of a process that gives up because the run stands still, or another rank has given up."""

GAVE_UP = "gave up"
"""Key in the store: the rank that has given up, and what it says."""


@dataclass(frozen=True)
class Beat:
    """What a rank last wrote.

    Attributes:
        rank, host: whose it is.
        count: how many notes the rank had made.
        what: the last of them: what it does.
        standing: seconds since that note.
        at: time of writing, seconds since 1970.
    """

    rank: int
    host: str
    count: int
    what: str
    standing: float
    at: float


def explain(beats: Sequence[Beat], missing: Sequence[int], now: float, silent_after: float) -> str:
    """Which rank the others wait for, as far as their beats tell.

    Args:
        beats: of the ranks that have written one.
        missing: ranks that never have.
        now: seconds since 1970.
        silent_after: a beat that is older is of a process that has stopped.
    """
    lost = [f"rank {rank} has never given a sign" for rank in missing]
    silent = [beat for beat in beats if now - beat.at > silent_after]
    lost += [
        f"rank {beat.rank} on {beat.host} has given no sign for {now - beat.at:.0f} s (last: {beat.what})"
        for beat in silent
    ]
    if lost:
        return "; ".join(lost)
    least = min(beat.count for beat in beats)
    behind = [beat for beat in beats if beat.count == least]
    if len(behind) == len(beats):
        return f"all {len(beats)} ranks are at the same point ({behind[0].what}) and alive, so none of them is late"
    late = [f"rank {b.rank} on {b.host} ({b.what}, for {b.standing:.0f} s)" for b in behind]
    furthest = max(beats, key=lambda beat: beat.count)
    return f"the others wait for {', '.join(late)}; the furthest is rank {furthest.rank} ({furthest.what})"


class Watchdog:
    """Writes this rank's beats, and ends the process with a message where nothing has moved for too long.

    Args:
        store: where the ranks met; used by the watching thread alone.
        rank, world_size: of this process.
        timeout: how long nothing may move.
        give_up: called with the message; the default prints it and ends the process.
    """

    def __init__(
        self,
        store: "dist.Store",
        rank: int,
        world_size: int,
        timeout: timedelta,
        give_up: Callable[[str], None] | None = None,
    ) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.timeout = timeout.total_seconds()
        self.interval = min(10.0, self.timeout / 4)
        self.give_up = _leave if give_up is None else give_up
        self.host = socket.gethostname()
        self.count, self.what, self.since = 0, "start", time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching: what follows needs no other rank."""
        self._stop.set()
        self._thread.join()

    def note(self, what: str) -> None:
        """Something has been done, and ``what`` comes next."""
        self.count, self.what, self.since = self.count + 1, what, time.monotonic()

    def beat(self) -> None:
        """Write how far this rank is."""
        standing = time.monotonic() - self.since
        mine = Beat(self.rank, self.host, self.count, self.what, standing, time.time())
        self.store.set(f"beat/{self.rank}", json.dumps(asdict(mine)))

    def message(self) -> str:
        """What is said when the run stands still."""
        beats, missing = [], []
        for rank in range(self.world_size):
            key = f"beat/{rank}"
            if self.store.check([key]):
                beats.append(Beat(**json.loads(self.store.get(key))))
            else:
                missing.append(rank)
        reason = explain(beats, missing, time.time(), 3 * self.interval + 5)
        return (
            f"the run has stood still for {self.timeout:.0f} s (distributed.timeout) at rank {self.rank} on "
            f"{self.host} ({self.what}): {reason}"
        )

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            stalled = time.monotonic() - self.since > self.timeout
            try:
                self.beat()
                message = self.message() if stalled else ""
                if self.store.check([GAVE_UP]):
                    rank, said = json.loads(self.store.get(GAVE_UP))
                    stalled, message = rank != self.rank, f"another rank has given up: {said}"
            except RuntimeError as error:  # the store's process is gone, and usually the run with it
                reason = str(error).splitlines()[0]
                message = f"rank {self.rank} on {self.host} cannot reach the process of rank 0: {reason}"
                stalled = time.monotonic() - self.since > min(self.timeout, 6 * self.interval)
            if stalled:
                self.give_up(message)
                return


def _leave(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(EXIT_STALLED)  # the main thread sits in a collective, which nothing but the process's end breaks off


_current: Watchdog | None = None


def set_watchdog(watchdog: Watchdog | None) -> None:
    """Make a watchdog the process's own, in place of an earlier one; None: none."""
    global _current
    if _current is not None:
        _current.stop()
    _current = watchdog
    if watchdog is not None:
        watchdog.start()


def note(what: str) -> None:
    """Tell the process's watchdog, if it has one, that something has been done and what comes next."""
    if _current is not None:
        _current.note(what)
