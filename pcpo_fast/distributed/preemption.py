"""Ending a run in order when the machine is wanted back: SIGTERM, which Slurm and clouds send, and SIGINT (Ctrl-C).

The first signal asks. Ranks agree on it before a forward of the model, or between epochs, all at the same one, and
leave the epoch where its weights are still those of the epoch before; in the middle of an update they go on to the end
of the epoch, if the grace allows. A second signal, or the end of the grace, ends the process at once: also one that
waits for another rank within a collective, since a thread watches that needs nothing of the main one.
"""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pcpo_fast.distributed.collectives import is_distributed, lost_rank, world_size

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_PREEMPTED = 75
"""Exit code of a run that SIGTERM ended in order (``EX_TEMPFAIL``: try again): put it back into the queue."""

ECHO = 2.0
"""Seconds in which further signals count as the first one: a launcher passes on what the terminal has sent already."""


class Stopped(BaseException):
    """The run leaves because a signal asked for it; raised on every rank at the same point.

    No ``except Exception`` holds it up, as with :class:`KeyboardInterrupt`.

    Attributes:
        exit_code: :data:`EXIT_PREEMPTED` after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.exit_code = EXIT_PREEMPTED if number == signal.SIGTERM else 128 + number


class StopRequest:
    """Listens for signals while it is entered; all ranks must enter it together.

    Args:
        grace: seconds from the first signal to the end of the process.
        patience: how long ranks wait for each other in :meth:`poll`.
        announce: called once, with a sentence, when the first signal is there; from another thread.

    Attributes:
        whole: whether the weights are those of a whole number of epochs, so that leaving loses nothing.
        reserve: seconds of the grace that writing a checkpoint takes.
    """

    def __init__(self, grace: float, patience: timedelta, announce: Callable[[str], None]) -> None:
        self.grace, self.patience, self.announce = grace, patience, announce
        self.whole, self.reserve = True, 0.0
        self._number, self._since = 0, 0.0
        self._interruptible = False
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> "StopRequest":
        if is_distributed():
            # Apart from the group of the training, whose collectives may be under way in the background.
            self._group = dist.new_group(backend="gloo", timeout=self.patience)
        if threading.current_thread() is threading.main_thread():  # elsewhere Python cannot listen
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._former_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
            threading.Thread(target=self._watch, name="stop signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._before:
            signal.set_wakeup_fd(self._former_fd)
            self._writer.close()  # ends the thread
            self._before = {}

    def poll(self) -> None:
        """A point where the run may end; all ranks must reach the same points in the same order.

        Raises:
            Stopped: a rank was asked to stop, and nothing is lost by it, or the grace is nearly over.
            UserError: another rank has died.
        """
        number, over = self._number, self._is_nearly_over()
        if self._group is not None:
            flags = torch.tensor([number, int(over)])
            try:
                dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
            except RuntimeError as error:
                raise lost_rank(error) from error
            number, over = int(flags[0]), bool(flags[1])
        if number and (self.whole or over):
            raise Stopped(number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that may take long, changes nothing, and is left at once, unless there are several ranks."""
        self._interruptible = world_size() == 1
        try:
            if self._interruptible and self._number:
                raise Stopped(self._number)
            yield
        finally:
            self._interruptible = False

    def _is_nearly_over(self) -> bool:
        return self._number != 0 and time.monotonic() > self._since + self.grace - self.reserve

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._number:
            self._number, self._since = number, time.monotonic()
        if self._interruptible:
            self._interruptible = False
            raise Stopped(self._number)

    def _watch(self) -> None:
        """Read the signals' numbers as they come, whatever the main thread is at, and keep the time."""
        reader, first, end = self._reader, 0.0, None
        echo = ECHO if "MASTER_ADDR" in os.environ else 0.0
        with reader:
            while True:
                ready, _, _ = select.select([reader], [], [], None if end is None else max(0.0, end - time.monotonic()))
                if not ready:
                    _leave(f"the grace of {self.grace:g} s (checkpoint.grace) is over", EXIT_PREEMPTED)
                data = reader.recv(64)
                if not data:
                    return
                for number in (number for number in data if number in SIGNALS):
                    if end is None:
                        first, end = time.monotonic(), time.monotonic() + self.grace
                        self.announce(
                            f"{signal.Signals(number).name}: the run ends in order, within {self.grace:g} s "
                            "(checkpoint.grace); a second signal ends it at once"
                        )
                    elif time.monotonic() - first >= echo:
                        _leave("a second signal", 128 + number)


def _leave(why: str, code: int) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"stopped at once: {why}; the run can be resumed from its newest checkpoint\n".encode())
    os._exit(code)


class Polled(nn.Module):
    """A module that asks before every forward whether the run is to end."""

    def __init__(self, module: nn.Module, poll: Callable[[], None]) -> None:
        super().__init__()
        self._inner = (module,)  # in a tuple, so that it is not registered a second time
        self._poll = poll

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's forward."""
        self._poll()
        return self._inner[0](*inputs, **named)
