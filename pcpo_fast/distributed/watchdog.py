"""A thread that detects a hung run and reports which rank the others are waiting for.

A collective waits silently for a missing rank, and its timeout error does not name that rank. Every rank therefore
writes its progress to the store through which the processes met, and reads that of the others.
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

from pcpo_fast.config.wording import counted

if TYPE_CHECKING:  # the progress display imports this module, and should not load torch for it
    import torch.distributed as dist

EXIT_STALLED = 4
"""Exit code of a process that ends because the run hangs or another rank has failed."""

GAVE_UP = "gave up"
"""Key in the store: the rank that has failed, and its error message."""


@dataclass(frozen=True)
class Beat:
    """A rank's latest heartbeat.

    Attributes:
        rank, host: of the process.
        count: number of :func:`note` calls so far.
        what: text of the latest one: what the rank is doing.
        standing: seconds since that call.
        at: time of writing, seconds since 1970.
    """

    rank: int
    host: str
    count: int
    what: str
    standing: float
    at: float


def explain(beats: Sequence[Beat], missing: Sequence[int], now: float, silent_after: float) -> str:
    """Which rank the others are waiting for, according to their heartbeats.

    Args:
        beats: of the ranks that have written one.
        missing: ranks that have never written one.
        now: seconds since 1970.
        silent_after: seconds after which a rank without a new heartbeat counts as dead.
    """
    lost = [f"rank {rank} has sent no heartbeat" for rank in missing]
    silent = [beat for beat in beats if now - beat.at > silent_after]
    lost += [
        f"rank {beat.rank} on {beat.host} has sent no heartbeat for {now - beat.at:.0f} s (last: {beat.what})"
        for beat in silent
    ]
    if lost:
        return "; ".join(lost)
    least = min(beat.count for beat in beats)
    behind = [beat for beat in beats if beat.count == least]
    if len(behind) == len(beats):
        return (
            f"all {counted(len(beats), 'rank')} are alive and at the same point ({behind[0].what}), so none is behind"
        )
    late = [f"rank {b.rank} on {b.host} ({b.what}, for {b.standing:.0f} s)" for b in behind]
    furthest = max(beats, key=lambda beat: beat.count)
    return f"the others wait for {', '.join(late)}; the furthest is rank {furthest.rank} ({furthest.what})"


class Watchdog:
    """Writes this rank's heartbeats, and ends the process with a message after a period without progress.

    Args:
        store: through which the ranks met; used only by the watching thread.
        rank, world_size: of this process.
        timeout: longest period without progress.
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
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; for work that needs no other rank."""
        self._stop.set()
        self._thread.join()

    def note(self, what: str) -> None:
        """Record progress; ``what`` names what comes next."""
        self.count, self.what, self.since = self.count + 1, what, time.monotonic()

    def beat(self) -> None:
        """Write this rank's heartbeat."""
        standing = time.monotonic() - self.since
        mine = Beat(self.rank, self.host, self.count, self.what, standing, time.time())
        self.store.set(f"beat/{self.rank}", json.dumps(asdict(mine)))

    def message(self) -> str:
        """The error message for a hung run."""
        beats, missing = [], []
        for rank in range(self.world_size):
            key = f"beat/{rank}"
            if self.store.check([key]):
                beats.append(Beat(**json.loads(self.store.get(key))))
            else:
                missing.append(rank)
        reason = explain(beats, missing, time.time(), 3 * self.interval + 5)
        return (
            f"no progress for {self.timeout:.0f} s (distributed.timeout) at rank {self.rank} on "
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
                    stalled, message = rank != self.rank, f"another rank has failed: {said}"
            except RuntimeError as error:  # the process that hosts the store is gone, and usually the run with it
                reason = str(error).splitlines()[0]
                message = f"rank {self.rank} on {self.host} cannot reach the process of rank 0: {reason}"
                stalled = time.monotonic() - self.since > min(self.timeout, 6 * self.interval)
            if stalled:
                self.give_up(message)
                return


def _leave(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(EXIT_STALLED)  # the main thread is blocked in a collective, which only the end of the process interrupts


_current: Watchdog | None = None


def set_watchdog(watchdog: Watchdog | None) -> None:
    """Start the process's watchdog, and stop an earlier one; None only stops it."""
    global _current
    if _current is not None:
        _current.stop()
    _current = watchdog
    if watchdog is not None:
        watchdog.start()


def note(what: str) -> None:
    """Record progress with the process's watchdog, if it has one; ``what`` names what comes next."""
    if _current is not None:
        _current.note(what)
