"""How far a long piece of work has come: a bar on a terminal, a line now and then elsewhere, all on stderr."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pcpo_fast.distributed.watchdog import note
from pcpo_fast.reporting.progress import duration


class StepProgress:
    """Counts steps of equal length.

    Args:
        total: how many there will be.
        what: what is done, for people.
        console: default: stderr, so that answers on stdout stay clean.
        plain_interval: seconds between lines where there is no terminal; work that is over before says nothing.
        clock: for tests.
    """

    def __init__(
        self,
        total: int,
        what: str,
        *,
        console: Console | None = None,
        plain_interval: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.what, self.done = total, what, 0
        self._console = Console(stderr=True) if console is None else console
        self._interval, self._clock = plain_interval, clock
        self._begin = self._last = clock()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "StepProgress":
        self._begin = self._last = self._clock()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(self.what, total=self.total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def describe(self, what: str) -> None:
        """Say what is done now."""
        self.what = what
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def advance(self) -> None:
        """One step is over; ranks that wait for this one learn that it works."""
        self.done += 1
        note(self.what)
        if self._bar is not None:
            self._bar.advance(self._task)
            return
        now = self._clock()
        if now - self._last >= self._interval and self.done < self.total:
            self._last = now
            left = (now - self._begin) / self.done * (self.total - self.done)
            text = f"{self.what}: {self.done} of {self.total} steps, {duration(left)} left"
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
