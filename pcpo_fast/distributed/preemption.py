"""Graceful shutdown on SIGTERM, which Slurm and cloud providers send before preemption, and SIGINT (Ctrl-C).

The first signal requests a stop. Ranks agree on it at the same point, before a forward of the model or between epochs.
If the weights are still those of the previous epoch, they abandon the epoch there; in the middle of an update they
continue to the end of the epoch, if the grace period allows. A second signal, or the end of the grace period, ends the
process immediately, even one blocked in a collective: a separate thread watches for both.
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
"""Exit code of a run shut down gracefully by SIGTERM (``EX_TEMPFAIL``: try again), for schedulers that requeue it."""

ECHO = 2.0
"""Seconds within which further signals count as the first: a launcher forwards a signal that the terminal also sent."""


class Stopped(BaseException):
    """The run stops because of a signal; raised on every rank at the same point.

    Like :class:`KeyboardInterrupt`, it is not caught by ``except Exception``.

    Attributes:
        exit_code: :data:`EXIT_PREEMPTED` after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.exit_code = EXIT_PREEMPTED if number == signal.SIGTERM else 128 + number


class StopRequest:
    """Context manager that handles stop signals; all ranks must enter it together.

    Args:
        grace: seconds from the first signal to the end of the process.
        patience: timeout of the collective in :meth:`poll`.
        announce: called once with a message when the first signal arrives; from another thread.

    Attributes:
        whole: whether the weights are those at the end of an epoch, so that stopping loses no update.
        reserve: seconds of the grace period reserved for writing a checkpoint.
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
            # A group of its own, because collectives of the training's group may be running in the background.
            self._group = dist.new_group(backend="gloo", timeout=self.patience)
        if threading.current_thread() is threading.main_thread():  # Python sets signal handlers there only
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
        """Stop here if a signal has arrived. Collective: all ranks must call it equally often.

        Raises:
            Stopped: some rank received a signal, and :attr:`whole` is set or the grace period is nearly over.
            UserError: another rank has died.
        """
        number = self._number
        over = number != 0 and time.monotonic() > self._since + self.grace - self.reserve
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
        """A long block without side effects that a signal interrupts immediately, if there is only one rank."""
        self._interruptible = world_size() == 1
        try:
            if self._interruptible and self._number:
                raise Stopped(self._number)
            yield
        finally:
            self._interruptible = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._number:
            self._number, self._since = number, time.monotonic()
        if self._interruptible:
            self._interruptible = False
            raise Stopped(self._number)

    def _watch(self) -> None:
        """Read signal numbers as they arrive, independently of the main thread, and enforce the grace period."""
        reader, first, end, code = self._reader, 0.0, None, 0
        echo = ECHO if "MASTER_ADDR" in os.environ else 0.0
        with reader:
            while True:
                ready, _, _ = select.select([reader], [], [], None if end is None else max(0.0, end - time.monotonic()))
                if not ready:
                    _leave(f"the grace of {self.grace:g} s (checkpoint.grace) is over", code)
                data = reader.recv(64)
                if not data:
                    return
                for number in (number for number in data if number in SIGNALS):
                    if end is None:
                        first, end = time.monotonic(), time.monotonic() + self.grace
                        code = Stopped(number).exit_code
                        self.announce(
                            f"{signal.Signals(number).name}: the run stops gracefully, within {self.grace:g} s "
                            "(checkpoint.grace); a second signal stops it immediately"
                        )
                    elif time.monotonic() - first >= echo:
                        _leave("a second signal", 128 + number)


def _leave(why: str, code: int) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        how = "the same command resumes the run from its newest checkpoint, or starts it again if there is none"
        os.write(2, f"stopped immediately: {why}; {how}\n".encode())
    os._exit(code)


class Polled(nn.Module):
    """Wraps a module and calls ``poll`` before every forward."""

    def __init__(self, module: nn.Module, poll: Callable[[], None]) -> None:
        super().__init__()
        self._inner = (module,)  # in a tuple, so that it is not registered a second time
        self._poll = poll

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Poll, then call the module."""
        self._poll()
        return self._inner[0](*inputs, **named)
