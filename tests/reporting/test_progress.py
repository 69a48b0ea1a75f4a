"""pcpo_fast.reporting.progress: what people see, on a terminal and elsewhere."""

import io
import re

import pytest
from rich.console import Console

from pcpo_fast.reporting.progress import TrainingProgress, duration, sparkline

METRICS = {"reward/mean": 0.7123, "policy/clip_fraction": 0.051, "throughput/images_per_second": 107.2, "other": 1.0}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(console: Console, epochs: int = 20, start: int = 0, seconds: float = 0.5) -> TrainingProgress:
    clock = Clock()
    with TrainingProgress(epochs, start, console=console, clock=clock) as progress:
        progress.evaluation({"heldout/reward/mean": 0.64})
        for epoch in range(start, epochs):
            for phase in ("rollout", "reward", "update"):
                progress.phase(phase)
            clock.now += seconds
            progress.epoch(METRICS | {"reward/mean": 0.6 + 0.005 * epoch})
            if epoch == start + 2:
                progress.message("checkpoint [bold]written[/bold]")
    return progress


def test_a_pipe_gets_plain_lines_every_few_seconds() -> None:
    stream = io.StringIO()
    run(Console(file=stream, width=40))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "epoch 1/20  reward 0.600  held-out 0.640  clipped 5.1%  images/s 107  10 s left"
    assert lines[-1] == "epoch 20/20  reward 0.695  held-out 0.640  clipped 5.1%  images/s 107"
    assert lines[1] == "checkpoint [bold]written[/bold]"
    shown = [int(match[1]) for line in lines if (match := re.match(r"epoch (\d+)/", line))]
    assert shown == [1, 5, 9, 13, 17, 20]
    assert stream.getvalue().isascii() and "\x1b" not in stream.getvalue()


def test_slow_epochs_get_a_line_each() -> None:
    stream = io.StringIO()
    run(Console(file=stream), epochs=5, start=2, seconds=60.0)
    assert [line.split()[1] for line in stream.getvalue().splitlines() if line.startswith("epoch")] == [
        "3/5",
        "4/5",
        "5/5",
    ]
    assert "2 min 00 s left" in stream.getvalue()


def test_a_terminal_gets_a_live_display() -> None:
    stream = io.StringIO()
    run(Console(file=stream, force_terminal=True, width=110, color_system=None))
    text = stream.getvalue()
    last = text[text.rindex("epoch 20/20") :]
    assert "reward 0.695 +0.095" in last and "held-out 0.640" in last and "clipped 5.1%" in last
    assert "█" in last and "images/s 107" in last
    assert "checkpoint [bold]written[/bold]" in text
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor comes back


@pytest.mark.parametrize("width", [20, 50, 110])
def test_the_display_keeps_three_lines_on_any_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    progress = run(console)
    progress.phase("rollout")
    lines = console.render_lines(progress._render(), pad=False)
    assert len(lines) == 3
    assert all(sum(segment.cell_length for segment in line) <= width for line in lines)


def test_the_display_ends_when_training_fails() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with pytest.raises(RuntimeError, match="boom"), TrainingProgress(3, console=console) as progress:
        progress.epoch(METRICS)
        raise RuntimeError("boom")
    assert "\x1b[?25h" in stream.getvalue()
    assert not console._live_stack


def test_other_ranks_show_nothing() -> None:
    stream = io.StringIO()
    for terminal in (False, True):
        console = Console(file=stream, force_terminal=terminal)
        with TrainingProgress(3, enabled=False, console=console) as progress:
            progress.phase("rollout")
            progress.evaluation(METRICS)
            progress.epoch(METRICS)
            progress.message("hello")
    assert stream.getvalue() == ""


def test_time_left_follows_the_recent_epochs() -> None:
    clock = Clock()
    with TrainingProgress(100, console=Console(file=io.StringIO()), clock=clock) as progress:
        assert progress.seconds_left() is None
        for seconds in [100.0] + [2.0] * 12:  # a slow first epoch (compilation) is forgotten
            clock.now += seconds
            progress.epoch({})
        assert progress.seconds_left() == pytest.approx(87 * 2.0)
        clock.now += 1.5  # an epoch under way counts
        assert progress.seconds_left() == pytest.approx(87 * 2.0 - 1.5)
        clock.now += 500
        assert progress.seconds_left() == pytest.approx(86 * 2.0)


def test_missing_and_broken_numbers_do_no_harm() -> None:
    for terminal in (False, True):
        stream = io.StringIO()
        with TrainingProgress(0, console=Console(file=stream, force_terminal=terminal)) as progress:
            progress.epoch({})
            progress.epoch({"reward/mean": float("nan")})
            progress.epoch({"reward/mean": float("inf")})
            progress.epoch({"reward/mean": 1e38})
        assert "nan" in stream.getvalue() or terminal
        assert "1.00e+38" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (18420, "5 h 07 min"),
        (183600, "2 d 3 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, 0.5]) == "▁█▅"
    assert sparkline([3.0, 3.0]) == "▁▁"
