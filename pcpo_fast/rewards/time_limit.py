"""A limit on how long a call may take."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


class TookTooLong(Exception):
    """The call was given up."""


class TimeLimit:
    """Calls functions that may take a limited time each.

    Nothing can stop a Python call from outside: one that takes too long is left to itself in a thread that the end of
    the program does not wait for. The next call begins when that one is over, within its own time, so that a function
    never runs twice at once.

    Args:
        seconds: for each call; None: any time, in the caller's own thread.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._left: threading.Thread | None = None

    def call(self, function: Callable[[], Any]) -> Any:
        """The function's result or exception.

        Raises:
            TookTooLong: it did not return in time.
        """
        if self.seconds is None:
            return function()
        end = time.monotonic() + self.seconds
        if self._left is not None:
            self._left.join(self.seconds)
            if self._left.is_alive():
                raise TookTooLong
        outcome: Future[Any] = Future()
        place = _place()

        def run() -> None:
            # Gradient mode, device and stream are each thread's own.
            with torch.no_grad(), place:
                try:
                    outcome.set_result(function())
                except BaseException as error:
                    outcome.set_exception(error)

        self._left = threading.Thread(target=run, daemon=True, name="reward")
        self._left.start()
        self._left.join(max(0.0, end - time.monotonic()))
        if not outcome.done():
            raise TookTooLong
        self._left = None
        return outcome.result()


def _place() -> AbstractContextManager[None]:
    """The caller's device and stream, to enter in another thread."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return nullcontext()
    device, stream = torch.cuda.current_device(), torch.cuda.current_stream()

    @contextmanager
    def there() -> Iterator[None]:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield

    return there()
