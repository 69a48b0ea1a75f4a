"""An evaluation in words: the tables on the terminal, and evaluation.md."""

from collections.abc import Sequence
from functools import partial

from pcpo_fast.evaluation.result import Evaluation
from pcpo_fast.reporting.tables import Grid, bullets, estimate_text, number_text

_ARROWS = {"higher": "↑", "lower": "↓"}


def evaluation_tables(result: Evaluation) -> list[Grid]:
    """All numbers; then, where there is something to compare, differences to the baseline and distances at one reward.

    The first has a row for each candidate and a column for each reward and metric. Differences are of rewards, on the
    same prompts and noise.
    """
    header = ["checkpoint", *(f"{column.name} ↑" for column in result.rewards)]
    header += [f"{column.label} {_ARROWS[column.better]}" for column in result.columns]
    rows: list[tuple[str, ...]] = []
    for name in result.names:
        estimates = [column.estimate(name) for column in result.rewards]
        estimates += [column.estimates[name] for column in result.columns]
        rows.append((name, *map(estimate_text, estimates)))
    tables = [Grid(f"{images_text(result)} [95 % interval over prompts]", tuple(header), tuple(rows))]
    if len(result.names) > 1 and result.rewards:
        rows = []
        for name in result.names[1:]:
            cells = []
            for column in result.rewards:
                difference = column.difference(name, result.baseline)
                mark = "" if not difference.excludes_zero else " better" if difference.value > 0 else " worse"
                cells.append(estimate_text(difference, partial(number_text, signed=True)) + mark)
            rows.append((name, *cells))
        names = ("checkpoint", *(column.name for column in result.rewards))
        tables.append(Grid(f"Rewards minus those of {result.baseline}, in pairs", names, tuple(rows)))
    if result.matched:
        labels = {column.key: column.label for column in result.columns}
        rows = [
            (
                f"{labels[found.distance]} at {found.reward} = {number_text(found.level)}",
                *map(number_text, found.at.values()),
            )
            for found in result.matched
        ]
        tables.append(Grid("At equal reward", ("", *result.matched[0].at), tuple(rows)))
    return tables


def images_text(result: Evaluation) -> str:
    """How many images the numbers are of."""
    return f"{len(result.prompts)} prompts x {result.count} images, seed {result.seed}"


def evaluation_markdown(result: Evaluation, figures: Sequence[str]) -> str:
    """The document, with pictures by their relative names."""
    main, *others = evaluation_tables(result)
    parts = ["# Evaluation", f"{main.title}."]
    if result.reference is not None:
        parts.append(f"Distances are to {result.reference}.")
    parts.append(main.markdown())
    parts += [table.section() for table in others]
    parts += [f"![{name}]({name})" for name in figures]
    if result.notes:
        parts += ["## What to know", bullets(result.notes)]
    return "\n\n".join(parts) + "\n"
