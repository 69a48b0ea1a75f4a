"""An evaluation as text: tables for the terminal, and evaluation.md."""

from collections.abc import Sequence
from functools import partial

from pcpo_fast.config.wording import counted
from pcpo_fast.evaluation.metrics import MetricColumn
from pcpo_fast.evaluation.result import Evaluation, RewardColumn
from pcpo_fast.reporting.tables import Grid, bullets, estimate_text, number_text


def evaluation_tables(result: Evaluation) -> list[Grid]:
    """The table of all numbers and, with several candidates, differences of rewards and diversities, and distances at
    equal reward.

    The first table has a row for each candidate and a column for each reward and metric. Differences are paired by
    prompt.
    """
    header = ["checkpoint", *(reward.heading for reward in result.rewards)]
    header += [column.heading for column in result.columns]
    rows: list[tuple[str, ...]] = []
    for name in result.names:
        estimates = [column.estimate(name) for column in result.rewards]
        estimates += [column.estimates[name] for column in result.columns]
        rows.append((name, *map(estimate_text, estimates)))
    tables = [Grid(f"{images_text(result)} [95 % interval over prompts]", tuple(header), tuple(rows))]
    compared: list[RewardColumn | MetricColumn] = [
        *result.rewards,
        *(column for column in result.columns if column.by_prompt),
    ]
    if len(result.names) > 1 and compared:
        rows = []
        for name in result.names[1:]:
            cells = []
            for one in compared:
                difference = one.difference(name, result.baseline)
                mark = "" if not difference.excludes_zero else " better" if difference.value > 0 else " worse"
                cells.append(estimate_text(difference, partial(number_text, signed=True)) + mark)
            rows.append((name, *cells))
        labels = (one.name if isinstance(one, RewardColumn) else one.label for one in compared)
        tables.append(
            Grid(f"Differences from {result.baseline}, paired by prompt", ("checkpoint", *labels), tuple(rows))
        )
    if result.matched:
        distances = {column.key: column.label for column in result.columns}
        rows = [
            (
                f"{distances[found.distance]} at {found.reward} = {number_text(found.level)}",
                *map(number_text, found.at.values()),
            )
            for found in result.matched
        ]
        tables.append(Grid("At equal reward", ("", *result.matched[0].at), tuple(rows)))
    return tables


def images_text(result: Evaluation) -> str:
    """Number of images, as text."""
    return f"{counted(len(result.prompts), 'prompt')} x {counted(result.count, 'image')}, seed {result.seed}"


def evaluation_markdown(result: Evaluation, figures: Sequence[str]) -> str:
    """The text of evaluation.md; ``figures`` are file names relative to it."""
    main, *others = evaluation_tables(result)
    parts = ["# Evaluation", f"{main.title}."]
    if result.reference is not None:
        parts.append(f"Distances are to {result.reference}.")
    parts.append(main.markdown())
    parts += [table.section() for table in others]
    parts += [f"![{name}]({name})" for name in figures]
    if result.notes:
        parts += ["## Notes", bullets(result.notes)]
    return "\n\n".join(parts) + "\n"
