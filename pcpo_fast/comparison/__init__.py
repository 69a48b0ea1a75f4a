"""Comparison of configurations over several seeds, with confidence intervals.

From Python, for existing run directories::

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
    """Compare run directories, grouped by the name of their variant; runs of the same seed are paired.

    Raises:
        UserError: a folder contains no run, no run is finished, or a setting does not match the runs.
    """
    return compare(
        {name: [read_run(folder) for folder in folders] for name, folders in runs.items()},
        settings or ComparisonSettings(),
    )
