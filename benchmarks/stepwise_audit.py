"""What a gain is worth at each step: the slopes that audits by branches found in runs, beside their predictions.

    python benchmarks/stepwise_audit.py runs/audit_0 runs/audit_1 --json audit.json --plot audit.png

reads runs with `advantage.audit_every`. A run's slope at a step is the last one that it recorded, which is a regression
over all its audits of the step (docs/stepwise.md). Beta, the slope of the final rewards on those of the step's
predictions, is its last one, too, which is over recent epochs; their correlation is the mean over its epochs.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.reporting.metrics_file import find_metrics, read_metrics
from pcpo_fast.reporting.plots import save_figure
from pcpo_fast.reporting.series import step_series
from pcpo_fast.reporting.style import BASE, OTHERS, legend, new_figure, styled


def steps_of(folders: list[Path]) -> dict[int, dict[str, Any]]:
    """By step: ``slopes``, and how many ``audits`` there were, of each run that audited it; its ``betas`` and
    ``correlations``."""
    steps: dict[int, dict[str, Any]] = {}
    for folder in folders:
        path = find_metrics(folder)
        records = [] if path is None else read_metrics(path)
        slopes = step_series(records, "stepwise/branch_slope")
        if not slopes:
            raise UserError(f"{folder} has no audits: it must be a run with advantage.audit_every above 0")
        for step, curve in slopes.items():
            found = steps.setdefault(step, {"slopes": [], "audits": [], "betas": [], "correlations": []})
            found["slopes"].append(curve.values[-1])
            found["audits"].append(len(curve.values))
        betas, correlations = (step_series(records, f"stepwise/{name}") for name in ("beta", "correlation"))
        for step in steps:
            if step in betas:
                steps[step]["betas"].append(betas[step].values[-1])
            if step in correlations:
                steps[step]["correlations"].append(fmean(correlations[step].values))
    return dict(sorted(steps.items()))


def figure_of(steps: dict[int, dict[str, Any]]) -> Any:
    """Each run's slope as a point, their means as a line; beta and the correlation."""
    figure = new_figure(3.4)
    axes = styled(figure.subplots(), "What a gain is worth", "step (0 = noise)", "", with_legend=True)
    for step, found in steps.items():
        axes.plot([step] * len(found["slopes"]), found["slopes"], ".", color=OTHERS[2], markersize=5, alpha=0.6)
    means = {step: fmean(found["slopes"]) for step, found in steps.items()}
    axes.plot(list(means), list(means.values()), color=OTHERS[2], linewidth=1.8, label="slope from branches")
    for name, label, colour in (("betas", "beta", OTHERS[1]), ("correlations", "correlation", OTHERS[0])):
        line = {step: fmean(found[name]) for step, found in steps.items() if found[name]}
        axes.plot(list(line), list(line.values()), color=colour, linewidth=1.8, label=label)
    axes.axhline(1.0, color=BASE, linewidth=1.0, linestyle="--", label="weight of the uncalibrated gain")
    legend(axes)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    chosen = parser.parse_args(arguments)
    try:
        steps = steps_of(chosen.runs)
        if chosen.json is not None:
            write_atomically(chosen.json, json.dumps(steps, indent=1) + "\n")
        if chosen.plot is not None:
            save_figure(figure_of(steps), chosen.plot)
    except (UserError, OSError, ValueError) as error:  # a file that cannot be written, a figure that is no PNG
        parser.error(str(error))
    print("step  slope  of each run (audits)")
    for step, found in steps.items():
        each = ", ".join(
            f"{slope:.2f} ({count})" for slope, count in zip(found["slopes"], found["audits"], strict=True)
        )
        print(f"{step:4}  {fmean(found['slopes']):5.2f}  {each}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
