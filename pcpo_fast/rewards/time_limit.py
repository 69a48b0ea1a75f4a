"""Calling functions with a time limit."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


class TookTooLong(Exception):
    """The call did not return in time."""


class TimeLimit:
    """Calls functions with a time limit.

    A Python call cannot be stopped from outside: one that takes too long continues in a daemon thread. The next call
    waits for it, within its own time limit, so that a function never runs concurrently with itself.

    Args:
        seconds: time limit of each call; None: no limit, and calls run in the caller's thread.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._left: threading.Thread | None = None

    def call(self, function: Callable[[], Any], at_most: float = math.inf) -> Any:
        """Call the function; returns its result or raises its exception.

        Args:
            function: the function.
            at_most: seconds to which the time limit is lowered for this call.

        Raises:
            TookTooLong: it did not return in time.
        """
        seconds = min(math.inf if self.seconds is None else self.seconds, at_most)
        end = time.monotonic() + seconds
        if self._left is not None:
            self._left.join(None if seconds == math.inf else seconds)
            if self._left.is_alive():
                raise TookTooLong
        if seconds == math.inf:
            return function()
        outcome: Future[Any] = Future()
        place = _place()

        def run() -> None:
            # Gradient mode, device and stream are per thread.
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
    """A context manager that sets the caller's device and stream in another thread."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return nullcontext()
    device, stream = torch.cuda.current_device(), torch.cuda.current_stream()

    @contextmanager
    def there() -> Iterator[None]:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield

    return there()
