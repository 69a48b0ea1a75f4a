"""Records of a training run and how people look at them: metrics, live display, grids, figures, the report."""

from pcpo_fast.reporting.grids import before_after, image_grid
from pcpo_fast.reporting.progress import TrainingProgress
from pcpo_fast.reporting.records import RunRecorder, read_metrics
from pcpo_fast.reporting.report import write_report
from pcpo_fast.reporting.summary import summarize, write_summary

__all__ = [
    "RunRecorder",
    "TrainingProgress",
    "before_after",
    "image_grid",
    "read_metrics",
    "summarize",
    "write_report",
    "write_summary",
]
