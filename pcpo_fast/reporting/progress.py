"""Progress display: live on a terminal, plain lines elsewhere."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.watchdog import note
from pcpo_fast.reporting.tables import fixed_text

_RECENT = 10  # epochs from which the time left is estimated
_HISTORY = 40  # epochs in the sparkline
_BARS = "▁▂▃▄▅▆▇█"

# name in the metrics, short label, format
_SHOWN = (
    ("reward/mean", "reward", fixed_text),
    ("heldout/reward/mean", "held-out", fixed_text),
    ("policy/clip_fraction", "clipped", "{:.1%}".format),
    ("throughput/images_per_second", "images/s", "{:.3g}".format),
)


class TrainingProgress:
    """Shows epoch, reward, held-out reward, clip fraction, images per second, time left and the current phase.

    On a terminal this is a live display of three lines at the bottom of the screen. Anywhere else (a pipe, a file, CI)
    it prints one line of plain ASCII per epoch, at most one every `plain_interval` seconds; the first and the last
    epoch are always printed. With `enabled` False (all ranks but 0) nothing is shown.

    Training goes from `start_epoch` (above 0 for a resumed run) to `epochs`. Use it as a context manager; `console` and
    `clock` serve tests and output to other streams than stdout.
    """

    def __init__(
        self,
        epochs: int,
        start_epoch: int = 0,
        enabled: bool = True,
        *,
        console: Console | None = None,
        plain_interval: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epochs = epochs
        self.done = start_epoch
        self.enabled = enabled
        self.warnings: list[str] = []
        self._console = console if console is not None else Console()
        self._clock = clock
        self._plain_interval = plain_interval
        self._last_line = -math.inf
        self._ends: deque[float] = deque(maxlen=_RECENT + 1)
        self._rewards: deque[float] = deque(maxlen=_HISTORY)
        self._first: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._phase = ""
        self._spinner = Spinner("dots" if not self._console.options.ascii_only else "line", style="cyan")
        self._live: Live | None = None

    def __enter__(self) -> "TrainingProgress":
        self._ends.append(self._clock())
        if self.enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=8, transient=False)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._phase = "" if error is None else "stopped"
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, name: str) -> None:
        """Set the current phase: "rollout", "reward", "update", "evaluation", …"""
        self._phase = name
        note(name)

    def epoch(self, metrics: Mapping[str, float]) -> None:
        """Report a finished epoch with its metrics (any of the displayed ones may be missing)."""
        self.done += 1
        self._ends.append(self._clock())
        self._remember(metrics)
        reward = self._latest.get("reward/mean")
        if reward is not None and math.isfinite(reward):
            self._rewards.append(reward)
        if not self.enabled or self._live is not None:
            return
        now = self._clock()
        if self.done >= self.epochs or now - self._last_line >= self._plain_interval:
            self._last_line = now
            say(self._console, self._plain_line())

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Report metrics of a held-out evaluation; they are displayed until the next one."""
        self._remember(metrics)

    def message(self, text: str) -> None:
        """Print permanent lines above the live display; the text is not interpreted as markup. Warnings are kept."""
        if text.startswith("warning: "):
            self.warnings.append(text.removeprefix("warning: "))
        if self.enabled:
            say(self._console, text)

    def _remember(self, metrics: Mapping[str, float]) -> None:
        for name, _, _ in _SHOWN:
            if name in metrics:
                self._latest[name] = float(metrics[name])
                self._first.setdefault(name, self._latest[name])

    def seconds_left(self) -> float | None:
        """Estimate the time left from the last ten epochs; None before this process has finished an epoch."""
        if len(self._ends) < 2:
            return None
        per_epoch = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        since = self._clock() - self._ends[-1]
        remaining = max(0, self.epochs - self.done) * per_epoch
        return max(0.0, remaining - min(since, per_epoch)) if remaining else 0.0

    def _plain_line(self) -> str:
        parts = [f"epoch {self.done}/{self.epochs}"]
        parts += [f"{label} {form(self._latest[name])}" for name, label, form in _SHOWN if name in self._latest]
        left = self.seconds_left()
        if left is not None and self.done < self.epochs:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _render(self) -> RenderableType:
        return Group(self._bar_line(), self._number_line(), self._phase_line())

    def _bar_line(self) -> RenderableType:
        line, left = bar_table(), self.seconds_left()
        over = self.done >= self.epochs
        time_text = "" if left is None or over else f"{duration(left)} left"
        bar = ProgressBar(total=max(1, self.epochs), completed=self.done, complete_style="cyan")
        line.add_row(Text(f"epoch {self.done}/{self.epochs}", style="bold"), bar, Text(time_text))
        return line

    def _number_line(self) -> Text:
        text = Text(no_wrap=True, overflow="ellipsis")
        for name, label, form in _SHOWN:
            if name not in self._latest:
                continue
            text.append(f"{label} ", style="dim")
            text.append(form(self._latest[name]), style="bold")
            if name.endswith("reward/mean"):
                change = self._latest[name] - self._first[name]
                if abs(change) >= 0.0005:
                    text.append(f" {fixed_text(change, signed=True)}", style="green" if change > 0 else "yellow")
            text.append("   ")
        return text

    def _phase_line(self) -> RenderableType:
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(no_wrap=True, ratio=1)
        line.add_column(no_wrap=True, justify="right")
        self._spinner.update(text=Text(self._phase, style="cyan"))
        curve = ""
        if len(self._rewards) > 1 and not self._console.options.ascii_only:
            curve = sparkline(self._rewards)
        line.add_row(self._spinner if self._phase else "", Text(curve, style="cyan"))
        return line


class StepProgress:
    """Progress over steps of equal length: a bar on a terminal, occasional lines elsewhere, always on stderr.

    Args:
        total: number of steps.
        what: description of the work.
        console: stderr by default, to keep stdout for results.
        plain_interval: seconds between lines without a terminal; shorter work prints nothing.
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

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def describe(self, what: str) -> None:
        """Change the description."""
        self.what = what
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def advance(self) -> None:
        """Count one step, and tell the watchdog of waiting ranks that this rank is making progress."""
        self.done += 1
        note(self.what)
        if self._bar is not None:
            self._bar.advance(self._task)
            return
        now = self._clock()
        if now - self._last >= self._interval and self.done < self.total:
            self._last = now
            left = (now - self._begin) / self.done * (self.total - self.done)
            say(self._console, f"{self.what}: {self.done} of {counted(self.total, 'step')}, {duration(left)} left")


def say(console: Console, text: str) -> None:
    """Print a line of plain text, unchanged and unwrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def bar_table() -> Table:
    """An empty table for rows of a label, a progress bar and text."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True, justify="right")
    return table


def sparkline(values: deque[float] | list[float]) -> str:
    """A one-line curve, scaled from the lowest to the highest value."""
    low, high = min(values), max(values)
    span = high - low
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1)) if span > 0 else 0] for value in values)


def duration(seconds: float) -> str:
    """Format a duration: "8 s", "3 min 20 s", "5 h 07 min", "2 d 3 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
