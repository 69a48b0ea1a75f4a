"""report.html while a run goes on: rarely, at next to no cost, and without ever stopping the run."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reporting_runs import make_run

from pcpo_fast.reporting import live_report
from pcpo_fast.reporting.live_report import LiveReport
from pcpo_fast.reporting.progress import TrainingProgress
from pcpo_fast.reporting.report import write_report


@pytest.fixture
def now() -> list[float]:
    """The time, to be changed."""
    return [1000.0]


@pytest.fixture
def live(
    now: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[LiveReport, list[Any]]]:
    def made(write: Callable[..., None]) -> tuple[LiveReport, list[Any]]:
        said: list[Any] = []
        monkeypatch.setattr(live_report, "write_report", write)
        return LiveReport(tmp_path, said.append, ["w"], True, lambda: now[0]), said

    return made


def test_it_is_written_at_most_once_a_minute_and_for_at_most_a_hundredth_of_the_time(
    now: list[float], live: Any
) -> None:
    written: list[float] = []
    seconds = itertools.chain([0.1, 5.0], itertools.repeat(0.1))

    def write(folder: Path, *, warnings: Any, running: bool) -> None:
        assert warnings == ["w"] and running
        written.append(now[0])
        now[0] += next(seconds)

    report, said = live(write)
    for _ in range(800):
        now[0] += 1
        report.look()
    first, second, third = written[:3]
    assert first == 1060 and second - first == pytest.approx(60, abs=1.2)
    assert third - second >= 505  # 5 seconds are a hundredth of 500
    assert said == []


def test_a_report_that_cannot_be_written_is_said_once(now: list[float], live: Any) -> None:
    def write(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    report, said = live(write)
    for _ in range(200):
        now[0] += 1
        report.look()
    assert said == ["warning: report.html will not be updated during the run: No space left on device"]


def test_the_page_of_a_running_run_warns_and_reloads_itself_until_the_run_is_over(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=2, every=1, finished=False)
    progress = TrainingProgress(2, enabled=False)
    progress.message("Sizes: 1")
    progress.message("warning: 2 groups with <equal> rewards")
    page = write_report(folder, warnings=progress.warnings, running=True).read_text(encoding="utf-8")
    assert "<li>2 groups with &lt;equal&gt; rewards</li>" in page
    assert "location.reload()" in page and "while the run goes on" in page
    page = write_report(folder).read_text(encoding="utf-8")
    assert "location.reload()" not in page and "while the run goes on" not in page
