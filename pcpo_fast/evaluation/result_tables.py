"""An evaluation in words: the table on the terminal, and evaluation.md."""

from collections.abc import Sequence

from pcpo_fast.comparison.tables import Grid
from pcpo_fast.evaluation.result import Evaluation
from pcpo_fast.reporting.statistics import Estimate

_ARROWS = {"higher": "↑", "lower": "↓"}


def main_table(result: Evaluation) -> Grid:
    """A row for each candidate, a column for each reward and metric."""
    header = ["checkpoint", *(f"{column.name} ↑" for column in result.rewards)]
    header += [f"{column.label} {_ARROWS[column.better]}" for column in result.columns]
    rows = []
    for name in result.names:
        cells = [estimate_text(column.estimate(name)) for column in result.rewards]
        cells += [estimate_text(column.estimates[name]) for column in result.columns]
        rows.append((name, *cells))
    return Grid(f"{images_text(result)} [95 % interval over prompts]", tuple(header), tuple(rows))


def difference_table(result: Evaluation) -> Grid | None:
    """Rewards minus those of the baseline on the same prompts and noise; None where there is nothing to compare."""
    if len(result.names) < 2 or not result.rewards:
        return None
    rows = []
    for name in result.names[1:]:
        cells = []
        for column in result.rewards:
            difference = column.difference(name, result.baseline)
            mark = "" if not difference.excludes_zero else " better" if difference.value > 0 else " worse"
            cells.append(estimate_text(difference, signed=True) + mark)
        rows.append((name, *cells))
    header = ("checkpoint", *(column.name for column in result.rewards))
    return Grid(f"Rewards minus those of {result.baseline}, in pairs", header, tuple(rows))


def matched_table(result: Evaluation) -> Grid | None:
    """Distances at equal reward; None where runs cannot be compared so."""
    if not result.matched:
        return None
    labels = {column.key: column.label for column in result.columns}
    names = list(result.matched[0].at)
    rows = [
        (f"{labels[found.distance]} at {found.reward} = {number(found.level)}", *(number(found.at[n]) for n in names))
        for found in result.matched
    ]
    return Grid("At equal reward", ("", *names), tuple(rows))


def images_text(result: Evaluation) -> str:
    """How many images the numbers are of."""
    return f"{len(result.prompts)} prompts x {result.count} images, seed {result.seed}"


def evaluation_markdown(result: Evaluation, figures: Sequence[str]) -> str:
    """The document, with pictures by their relative names."""
    main = main_table(result)
    parts = ["# Evaluation", f"{main.title}."]
    if result.reference is not None:
        parts.append(f"Distances are to {result.reference}.")
    parts.append(main.markdown())
    for table in (difference_table(result), matched_table(result)):
        if table is not None:
            parts += [f"## {table.title}", table.markdown()]
    parts += [f"![{name}]({name})" for name in figures]
    if result.notes:
        parts += ["## What to know", "\n".join(f"- {note}" for note in result.notes)]
    return "\n\n".join(parts) + "\n"


def estimate_text(estimate: Estimate, *, signed: bool = False) -> str:
    """A value and its interval."""
    text = number(estimate.value, signed=signed)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{number(estimate.low, signed=signed)}, {number(estimate.high, signed=signed)}]"


def number(value: float, *, signed: bool = False) -> str:
    """Four significant digits where they matter, never an exponent for ordinary sizes."""
    sign = "+" if signed else ""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3 if abs(value) >= 1 else 4
        return f"{value:{sign}.{digits}f}"
    return f"{value:{sign}.2e}"
