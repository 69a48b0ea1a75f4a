"""Which of several configurations learns faster: runs over seeds, compared with intervals.

From Python, for run directories that are there already::

    from pcpo_fast.comparison import ComparisonSettings, compare_runs, write_comparison

    runs = {"native": ["runs/n0", "runs/n1"], "pcpo": ["runs/p0", "runs/p1"]}
    result = compare_runs(runs, ComparisonSettings(target=0.8))
    result.variant("pcpo").speed_up
    write_comparison(result, "runs/comparison")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pcpo_fast.comparison.analysis import Comparison, ComparisonSettings, compare
from pcpo_fast.comparison.reading import read_run
from pcpo_fast.comparison.writing import write_comparison

__all__ = ["Comparison", "ComparisonSettings", "compare_runs", "write_comparison"]


def compare_runs(runs: Mapping[str, Sequence[Path | str]], settings: ComparisonSettings | None = None) -> Comparison:
    """Compare run directories, by the name of their variant; runs of the same seed are compared with each other.

    Raises:
        UserError: a folder holds no run, no run is finished, or a setting does not fit the runs.
    """
    return compare(
        {name: [read_run(folder) for folder in folders] for name, folders in runs.items()},
        settings or ComparisonSettings(),
    )
