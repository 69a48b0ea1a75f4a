"""How far the runs of a comparison are, read from their metrics: live on a terminal, plain lines elsewhere."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from pcpo_fast.config.wording import counted
from pcpo_fast.reporting.progress import bar_table, duration, say
from pcpo_fast.reporting.tables import fixed_text

if TYPE_CHECKING:
    from pcpo_fast.comparison.variants import PlannedRun

_TAIL = 1 << 16  # bytes at the end of metrics.jsonl that hold some whole lines


class RunProgress:
    """Epochs and reward of a run in progress."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.epochs = 0
        self.reward: float | None = None
        self._seen: tuple[int, int] | None = None

    def update(self) -> None:
        """Look at the end of its metrics, if they have changed."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                seen = (status.st_ino, status.st_size)
                if seen == self._seen:
                    return
                self._seen = seen
                file.seek(max(0, status.st_size - _TAIL))
                lines = file.read().split(b"\n")
        except OSError:
            return
        for line in reversed(lines):
            try:
                record = json.loads(line)
            except ValueError:  # half a line, at either end
                continue
            if isinstance(record, dict) and record.get("kind") == "epoch":
                reward = record.get("reward/mean")
                self.epochs = int(record["epoch"]) + 1
                self.reward = reward if isinstance(reward, float) else None
                return
        self.epochs = 0


class Running(Protocol):
    """What is shown of a run in progress."""

    @property
    def run(self) -> "PlannedRun": ...

    @property
    def progress(self) -> RunProgress: ...


class ComparisonProgress:
    """Finished runs, the epochs of those in progress, and the time left.

    On a terminal a live display at the bottom of the screen; elsewhere plain lines when a run begins or ends, and one
    every `plain_interval` seconds. There is no thread behind it: `tick` draws.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        epochs_left: int,
        *,
        plain_interval: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done, self.failed = total, 0, 0
        self._console, self._clock, self._interval = console, clock, plain_interval
        self._left = epochs_left  # of the runs that have not begun
        self._start = self._last_line = clock()
        self._ended_epochs = 0  # of this call
        self._first: dict[Path, int] = {}
        self._running: Sequence[Running] = ()
        self._live: Live | None = None

    def __enter__(self) -> "ComparisonProgress":
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._render)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._running = ()
            self._live.stop()
            self._live = None

    def message(self, text: str) -> None:
        """A line that stays."""
        say(self._console, text)

    def began(self, job: Running) -> None:
        """A run has been started."""
        job.progress.update()
        self._first[job.run.folder] = job.progress.epochs
        self._left -= _epochs_left(job)
        self.message(f"{job.run.name}: training (log: {job.run.log})")

    def ended(self, job: Running, problem: str | None = None) -> None:
        """A run has ended; `problem` says what went wrong."""
        job.progress.update()
        self._running = [other for other in self._running if other is not job]
        self._ended_epochs += max(0, job.progress.epochs - self._first[job.run.folder])
        if problem is not None:
            self.failed += 1
            self.message(f"{job.run.name}: failed: {problem} (log: {job.run.log})")
            return
        self.done += 1
        reward = "" if job.progress.reward is None else f", reward {fixed_text(job.progress.reward)}"
        self.message(f"{job.run.name}: finished{reward} ({self._counts()})")

    def tick(self, running: Sequence[Running]) -> None:
        """Poll the runs in progress and show them."""
        for job in running:
            job.progress.update()
            # The trainer takes back the epochs after the last checkpoint.
            self._first[job.run.folder] = min(self._first[job.run.folder], job.progress.epochs)
        self._running = running
        if self._live is not None:
            self._live.refresh()
        elif self._clock() - self._last_line >= self._interval:
            self._last_line = self._clock()
            parts = [f"{job.run.name}: epoch {job.progress.epochs}/{job.run.config.train.epochs}" for job in running]
            self.message("; ".join([self._counts(), *parts]))

    def seconds_left(self) -> float | None:
        """From the epochs of this call; None before the first is over."""
        at_work = sum(job.progress.epochs - self._first[job.run.folder] for job in self._running)
        epochs = self._ended_epochs + at_work
        if epochs <= 0:
            return None
        left = max(0, self._left) + sum(map(_epochs_left, self._running))
        return left * (self._clock() - self._start) / epochs

    def _counts(self) -> str:
        text = f"{self.done} of {counted(self.total, 'run')} done"
        if self.failed:
            text += f", {self.failed} failed"
        left = self.seconds_left()
        if left is not None and left >= 1 and self.done + self.failed < self.total:
            text += f", about {duration(left)} left"
        return text

    def _render(self) -> RenderableType:
        table = bar_table()
        table.add_row(
            Text("all runs", style="bold"),
            ProgressBar(total=self.total, completed=self.done + self.failed, complete_style="cyan"),
            Text(self._counts()),
        )
        for job in self._running:
            epochs = job.run.config.train.epochs
            reward = "" if job.progress.reward is None else f"  reward {fixed_text(job.progress.reward)}"
            table.add_row(
                Text(job.run.name),
                ProgressBar(total=max(1, epochs), completed=job.progress.epochs, complete_style="green"),
                Text(f"epoch {job.progress.epochs}/{epochs}{reward}"),
            )
        return table


def _epochs_left(job: Running) -> int:
    return max(0, job.run.config.train.epochs - job.progress.epochs)
