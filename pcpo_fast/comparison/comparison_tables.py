"""Tables of a comparison: on the terminal, and comparison.md."""

from collections.abc import Sequence
from dataclasses import replace

from pcpo_fast.comparison.analysis import Against, Comparison, VariantResult, missing_lines
from pcpo_fast.comparison.measures import EPOCHS_TO_TARGET, MEASURES, Measure, timed
from pcpo_fast.comparison.record import notes, variant_differences
from pcpo_fast.config.wording import counted
from pcpo_fast.config.yaml_text import value_text
from pcpo_fast.reporting.statistics import RESAMPLES, Estimate
from pcpo_fast.reporting.tables import Grid, bullets, estimate_text

_NONE = "–"
_MAIN = {
    "reward_final": "reward, end",
    "reward_at_epoch": "reward, epoch {at_epoch}",
    "heldout_final": "held-out, end",
    "heldout_at_epoch": "held-out, epoch {at_epoch}",
}


def main_table(result: Comparison) -> Grid:
    """One row per variant: final reward, epochs to the target, and the verdict against the baseline."""
    header, title = ["variant", "seeds"], "Means over seeds [95 % interval]"
    timed_at_all = result.reading.target is not None
    if timed_at_all:
        header += ["epochs to target", "reached", f"speed-up over {result.baseline}", "verdict"]
        title += f", target {_target(result)}"
    shown = [measure for measure in result.measures if measure.key in _MAIN]
    header += [_MAIN[measure.key].format(at_epoch=result.reading.at_epoch) for measure in shown]
    rows = []
    for variant in result.variants:
        row = [variant.name, str(len(variant.runs))]
        if timed_at_all:
            reached = _NONE if variant.reached is None else f"{variant.reached} of {len(variant.runs)}"
            against = variant.against.get(EPOCHS_TO_TARGET.key)
            verdict = _NONE if against is None else against.verdict
            row += [epochs_text(variant), reached, _speed_up(variant), verdict]
        row += [_estimate(variant.means.get(measure.key), measure) for measure in shown]
        rows.append(tuple(row))
    return Grid(title, tuple(header), tuple(rows))


def difference_table(variant: VariantResult, result: Comparison) -> Grid:
    """One row per measure: both means, the difference with its interval, the signs by seed, and the verdict."""
    header = ("measure", result.baseline, variant.name, "difference [95 % interval]", "seeds", "verdict")
    rows = []
    for measure in result.measures:
        against = variant.against.get(measure.key)
        if against is None:
            continue
        row = (measure.label, *_means(variant, measure, result), _estimate(against.difference, measure, signed=True))
        rows.append((*row, _signs(against, measure), against.verdict))
    return Grid(f"{variant.name} minus {result.baseline}", header, tuple(rows))


def decision_table(result: Comparison) -> Grid:
    """The primary measure, with one row per variant other than the baseline."""
    measure = result.settings.primary_measure
    names = (f"{result.baseline}", "variant mean", "difference [95 % t-interval]", "seeds", "p", "p after Holm")
    rows = []
    for name, decision in result.decisions.items():
        numbers = ("–" if p is None else f"{p:.2g}" for p in (decision.p, decision.adjusted))
        means = _means(result.variant(name), measure, result)
        difference = _estimate(decision.difference, measure, signed=True)
        rows.append((name, *means, difference, str(decision.difference.n), *numbers, decision.verdict))
    return Grid(f"Verdict: {measure.label}", ("variant", *names, "verdict"), tuple(rows))


def about_decisions(result: Comparison) -> str:
    """When the primary measure was named, and what is special about its p-values."""
    primary, before = result.settings.primary, result.settings.primary_before
    when = "beforehand"
    if primary != before:
        other = "" if before is None else f" (before, it was {MEASURES[before].label})"
        when = f"when there already were runs{other}, perhaps because of what they show"
    return f"The primary measure was named {when}; only its p-values are corrected for several variants."


def seed_table(result: Comparison) -> Grid:
    """One row per run."""
    header = ("run", "seed", "epochs", *(measure.label for measure in result.measures))
    rows = []
    for variant in result.variants:
        for index, run in enumerate(variant.runs):
            reached = timed(run, result.reading)
            cells = []
            for measure in result.measures:
                value = variant.values[measure.key][index]
                bound = measure == EPOCHS_TO_TARGET and reached is not None and not reached.reached
                cells.append(_NONE if value is None else ("≥ " if bound else "") + measure.text(value))
            rows.append((variant.name, _NONE if run.seed is None else str(run.seed), str(run.epochs), *cells))
    return Grid("Every run", header, tuple(rows))


def setting_table(result: Comparison) -> Grid | None:
    """The settings in which the variants differ; None where there are none."""
    differing = variant_differences(result)
    if not differing:
        return None
    rows = tuple(
        (key, *("not set" if v is None else value_text(v) for v in values.values()))
        for key, values in differing.items()
    )
    return Grid("What differs", ("setting", *next(iter(differing.values()))), rows)


def comparison_markdown(result: Comparison, figures: Sequence[str] = ()) -> str:
    """comparison.md.

    Args:
        result: the comparison.
        figures: paths of the figures, relative to the file.
    """
    main, missing = main_table(result), missing_lines(result.missing)
    parts = ["# Comparison", f"{main.title}.", main.markdown()]
    if missing:
        parts += ["**Not in these numbers:**", bullets(missing)]
    if result.decisions:
        decided = decision_table(result)
        parts += [f"## {decided.title}", about_decisions(result), decided.markdown()]
    differing = setting_table(result)
    if differing is not None:
        rows = tuple(tuple(cell if cell == "not set" else f"`{cell}`" for cell in row) for row in differing.rows)
        parts.append(replace(differing, rows=rows).section())
    parts += [difference_table(variant, result).section() for variant in result.variants if variant.against]
    if figures:
        parts += ["## Figures", *(f"![{path}]({path})" for path in figures)]
    parts += [seed_table(result).section(), "## How to read this", bullets(explanations(result))]
    parts.append(bullets(f"*{measure.label}*: {measure.meaning}." for measure in result.measures))
    if result.reading.target is not None:
        parts.append(f"Target: {_target(result)}, {result.target_source}.")
    return "\n\n".join(parts) + "\n"


def explanations(result: Comparison) -> list[str]:
    """How to read the numbers, and what they do not show."""
    reading = result.reading
    lines = list(notes(result))
    if reading.target is not None and any(v.reached is not None and v.reached < len(v.runs) for v in result.variants):
        lines.append(
            f"≥: not every run reached the target. Those that did not count as {counted(reading.horizon, 'epoch')}, "
            "so the mean and its interval are lower bounds."
        )
    lines.append(
        f"Training rewards are trailing means over {counted(reading.smoothing, 'epoch')}. Epochs count training: the "
        "reward at epoch e is that of weights trained for e epochs."
    )
    lines.append(
        f"Intervals: bootstrap over seeds ({RESAMPLES} resamples, percentiles widened for few seeds). They show how "
        "much the mean varies with the seeds, and say nothing about other prompts, rewards or settings."
    )
    if any(against.paired for variant in result.variants for against in variant.against.values()):
        lines.append(
            "Differences are taken seed by seed: runs of the same seed share their prompts and their noise. The column "
            "*seeds* counts the signs."
        )
    lines.append(
        "*better*, *worse*, *higher*, *lower*: the interval of the difference excludes 0; *probably* for 3 or 4 seeds. "
        "Among many verdicts some will be wrong: rely on the measure that was chosen beforehand."
    )
    return lines


def epochs_text(variant: VariantResult) -> str:
    """Mean epochs to the target with its interval, marked as a lower bound if a run did not reach it."""
    if variant.reached == 0:  # then all values are the same bound, and an interval would look like certainty
        return _mean(variant, EPOCHS_TO_TARGET)
    return _bound(variant) + _estimate(variant.means.get(EPOCHS_TO_TARGET.key), EPOCHS_TO_TARGET)


def _speed_up(variant: VariantResult) -> str:
    """How many times as fast as the baseline."""
    if variant.speed_up is None:
        return _NONE
    bound = {"": "", "at least": "≥ ", "at most": "≤ ", "restricted": "about "}[variant.speed_up_bound]
    ratio = variant.speed_up
    interval = "" if ratio.low is None else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    return f"{bound}{ratio.value:.2f}×{interval}"


def _bound(variant: VariantResult) -> str:
    """The mark for epochs that are a lower bound."""
    return "≥ " if variant.reached is not None and variant.reached < len(variant.runs) else ""


def _signs(against: Against, measure: Measure) -> str:
    if not against.paired:
        return "not paired"
    word = measure.better or ("lower" if against.lower > against.higher else "higher")
    count = against.lower if word == "lower" else against.higher
    ties = f", {against.ties} equal" if against.ties else ""
    return f"{count} of {against.difference.n} {word if measure.better is None else 'better'}{ties}"


def _mean(variant: VariantResult, measure: Measure) -> str:
    estimate = variant.means.get(measure.key)
    mark = _bound(variant) if measure == EPOCHS_TO_TARGET else ""
    return _NONE if estimate is None else mark + measure.text(estimate.value)


def _means(variant: VariantResult, measure: Measure, result: Comparison) -> list[str]:
    """The baseline's mean and the variant's, over the runs that their difference is of."""
    own, other = variant.against[measure.key].means
    sides = ((result.variant(result.baseline), other), (variant, own))
    return [(_bound(side) if measure == EPOCHS_TO_TARGET else "") + measure.text(mean) for side, mean in sides]


def _estimate(estimate: Estimate | None, measure: Measure, *, signed: bool = False) -> str:
    return _NONE if estimate is None else estimate_text(estimate, lambda value: measure.text(value, signed=signed))


def _target(result: Comparison) -> str:
    which = "held-out" if result.reading.metric == "heldout" else "training"
    return f"{result.reading.target:.4g} ({which} reward)"
