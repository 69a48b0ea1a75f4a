"""report.html during a run: written now and then at almost no cost; a failure to write it does not stop the run."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pcpo_fast.errors import reason_of
from pcpo_fast.reporting.report import write_report

LEAST_SECONDS = 60.0
SHARE = 0.01
"""Largest share of the time that is spent on writing reports."""


class LiveReport:
    """Rewrites the report of a run in progress; the page refreshes itself.

    Args:
        folder: the run directory.
        message: shows a line to the user.
        warnings: of the run so far, which the page lists; read at every writing.
        enabled: False on all ranks but the first, and where it was turned off.
        clock: serves tests.
    """

    def __init__(
        self,
        folder: Path,
        message: Callable[[str], None],
        warnings: Sequence[str],
        enabled: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.message, self.warnings, self.enabled = folder, message, warnings, enabled
        self._clock = clock
        self._next = clock() + LEAST_SECONDS

    def look(self) -> None:
        """Write the report if it is due: a minute after the last, or later if it takes more than `SHARE` of the time.

        If it cannot be written, the user is told once, and it is not tried again.
        """
        begin = self._clock()
        if not self.enabled or begin < self._next:
            return
        try:
            write_report(self.folder, warnings=self.warnings, running=True)
        except Exception as error:  # the run matters more than its picture
            self.enabled = False
            self.message(f"warning: report.html will not be updated during the run: {reason_of(error)}")
        end = self._clock()
        self._next = end + max(LEAST_SECONDS, (end - begin) / SHARE)
