"""A pytest plugin that prints why a test failed when it fails: a run that is ended early has told what it knew.

Used by benchmarks/gpu_suite.py as ``-p benchmarks.failures_at_once``.
"""

from collections import Counter

import pytest

SHOWN, CHARACTERS = 3, 1500
"""Tests of one reason that are shown in full, and how much of each."""
_reasons: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called for every phase of a test; with xdist in the main process, too."""
    if not report.failed:
        return
    text = report.longreprtext.strip()
    reason = text.splitlines()[-1] if text else ""
    _reasons[reason] += 1
    shown = text[-CHARACTERS:] if _reasons[reason] <= SHOWN else reason
    print(f"\nFAILED {report.nodeid} ({report.when})\n{shown}", flush=True)
