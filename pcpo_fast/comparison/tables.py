"""A comparison in words: the table on the terminal, and comparison.md."""

from collections.abc import Sequence

from pcpo_fast.comparison.analysis import Comparison, VariantResult
from pcpo_fast.comparison.measures import EPOCHS_TO_TARGET, Measure, timed
from pcpo_fast.comparison.record import notes, variant_differences
from pcpo_fast.reporting.statistics import RESAMPLES, Estimate
from pcpo_fast.reporting.tables import Grid, estimate_text

_NONE = "–"
_BOUNDS = {"": "", "at least": "≥ ", "at most": "≤ ", "restricted": "about "}
_MAIN = {
    "reward_final": "reward, end",
    "reward_at_epoch": "reward, epoch {at_epoch}",
    "heldout_final": "held-out, end",
    "heldout_at_epoch": "held-out, epoch {at_epoch}",
}


def main_table(result: Comparison) -> Grid:
    """One row per variant: what it reached, how fast, and the verdict on the difference to the baseline."""
    shown = [measure for measure in result.measures if measure.key in _MAIN]
    header = ["variant", "seeds"]
    timed_at_all = result.reading.target is not None
    if timed_at_all:
        header += ["epochs to target", "reached", f"speed-up over {result.baseline}", "verdict"]
    header += [_MAIN[measure.key].format(at_epoch=result.reading.at_epoch) for measure in shown]
    rows = []
    for variant in result.variants:
        row = [variant.name, str(len(variant.runs))]
        if timed_at_all:
            row += [
                epochs_text(variant),
                _reached(variant),
                speed_up_text(variant),
                _verdict(variant, EPOCHS_TO_TARGET),
            ]
        row += [_estimate(variant.means.get(measure.key), measure) for measure in shown]
        rows.append(tuple(row))
    title = "Means over seeds [95 % interval]"
    if timed_at_all:
        title += f", target {_target(result)}"
    return Grid(title, tuple(header), tuple(rows))


def difference_table(variant: VariantResult, result: Comparison) -> Grid:
    """One row per measure: both means, the difference with its interval, the seeds that agree, the verdict."""
    baseline = result.variant(result.baseline)
    header = ("measure", result.baseline, variant.name, "difference [95 % interval]", "seeds", "verdict")
    rows = []
    for measure in result.measures:
        against = variant.against.get(measure.key)
        if against is None:
            continue
        means = (_mean(side, measure) for side in (baseline, variant))
        row = (_label(measure, result), *means, _estimate(against.difference, measure, signed=True))
        rows.append((*row, _signs(variant, measure), against.verdict))
    return Grid(f"{variant.name} minus {result.baseline}", header, tuple(rows))


def decision_table(result: Comparison) -> Grid:
    """The primary measure: one row per variant but the baseline."""
    measure, baseline = result.settings.primary_measure, result.variant(result.baseline)
    names = (f"{result.baseline}", "variant mean", "difference [95 % t-interval]", "seeds", "p", "p after Holm")
    rows = []
    for name, decision in result.decisions.items():
        numbers = ("–" if p is None else f"{p:.2g}" for p in (decision.p, decision.adjusted))
        means = (_mean(side, measure) for side in (baseline, result.variant(name)))
        difference = _estimate(decision.difference, measure, signed=True)
        rows.append((name, *means, difference, str(decision.difference.n), *numbers, decision.verdict))
    return Grid(f"Verdict: {_label(measure, result)}", ("variant", *names, "verdict"), tuple(rows))


def seed_table(result: Comparison) -> Grid:
    """One row per run."""
    header = ("run", "seed", "epochs", *(_label(measure, result) for measure in result.measures))
    rows = []
    for variant in result.variants:
        for index, run in enumerate(variant.runs):
            cells = [_value(variant, index, measure, result) for measure in result.measures]
            rows.append((variant.name, _NONE if run.seed is None else str(run.seed), str(run.epochs), *cells))
    return Grid("Every run", header, tuple(rows))


def settings_table(result: Comparison) -> Grid | None:
    """What differs between the variants; None where nothing does."""
    found = variant_differences(result)
    if not found:
        return None
    names = list(next(iter(found.values())))
    rows = [(f"`{key}`", *(_setting(values[name]) for name in names)) for key, values in found.items()]
    return Grid("What differs", ("setting", *names), tuple(rows))


def missing_lines(result: Comparison) -> list[str]:
    """Runs that do not count, a line each."""
    return [f"{run.variant}{'' if run.seed is None else f', seed {run.seed}'}: {run.reason}" for run in result.missing]


def comparison_markdown(result: Comparison, figures: Sequence[str] = ()) -> str:
    """comparison.md.

    Args:
        result: the comparison.
        figures: their paths, relative to the file.
    """
    reading = result.reading
    main = main_table(result)
    parts = ["# Comparison", f"{main.title}.", main.markdown()]
    missing = missing_lines(result)
    if missing:
        parts += ["**Not in these numbers:**", _bullets(missing)]
    if result.decisions:
        decided = decision_table(result)
        parts += [
            f"## {decided.title}",
            "The measure named beforehand, to which alone the correction for several variants belongs.",
            decided.markdown(),
        ]
    settings = settings_table(result)
    if settings is not None:
        parts += ["## What differs", settings.markdown()]
    for variant in result.variants:
        if variant.against:
            table = difference_table(variant, result)
            parts += [f"## {table.title}", table.markdown()]
    if figures:
        parts += ["## Figures", "\n\n".join(f"![{path}]({path})" for path in figures)]
    parts += ["## Every run", seed_table(result).markdown(), "## How to read this", _bullets(explanations(result))]
    parts.append(_bullets([f"*{_label(m, result)}*: {m.meaning}." for m in result.measures]))
    if reading.target is not None:
        parts.append(f"Target: {_target(result)}, {result.target_source}.")
    return "\n\n".join(parts) + "\n"


def explanations(result: Comparison) -> list[str]:
    """What the numbers are, and what they are not."""
    reading = result.reading
    lines = list(notes(result))
    if reading.target is not None and any(v.reached is not None and v.reached < len(v.runs) for v in result.variants):
        lines.append(
            f"≥: not every run reached the target. Those that did not count with {reading.horizon} epochs, so that "
            "the mean and its interval are lower bounds."
        )
    lines.append(
        f"Training rewards are trailing means over {reading.smoothing} epochs. Epochs count training: the reward at "
        "epoch e is that of weights trained for e epochs."
    )
    lines.append(
        f"Intervals: bootstrap over seeds ({RESAMPLES} resamples, percentiles widened for few seeds). They say how far "
        "the mean would move with other seeds, and nothing about other prompts, rewards or settings."
    )
    if any(against.paired for variant in result.variants for against in variant.against.values()):
        lines.append(
            "Differences are taken seed by seed: runs of the same seed share their prompts and their noise. The column "
            "*seeds* counts the signs."
        )
    lines.append(
        "*better*, *worse*, *higher*, *lower*: the interval of the difference excludes 0; *probably* for 3 or 4 seeds. "
        "Of many verdicts some are wrong: look at the measure that was chosen beforehand."
    )
    return lines


def epochs_text(variant: VariantResult) -> str:
    """Mean epochs to the target with its interval, marked as a lower bound where a run did not reach it."""
    estimate = variant.means.get(EPOCHS_TO_TARGET.key)
    if estimate is None:
        return _NONE
    if variant.reached == 0:  # then all values are the same bound, and an interval would look like certainty
        return _censored_mark(variant) + EPOCHS_TO_TARGET.text(estimate.value)
    return _censored_mark(variant) + _estimate(estimate, EPOCHS_TO_TARGET)


def speed_up_text(variant: VariantResult) -> str:
    """How many times faster than the baseline."""
    ratio = variant.speed_up
    if ratio is None:
        return _NONE
    interval = "" if ratio.low is None else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    return f"{_BOUNDS[variant.speed_up_bound]}{ratio.value:.2f}×{interval}"


def _censored_mark(variant: VariantResult) -> str:
    return "≥ " if variant.reached is not None and variant.reached < len(variant.runs) else ""


def _reached(variant: VariantResult) -> str:
    return _NONE if variant.reached is None else f"{variant.reached} of {len(variant.runs)}"


def _verdict(variant: VariantResult, measure: Measure) -> str:
    against = variant.against.get(measure.key)
    return _NONE if against is None else against.verdict


def _signs(variant: VariantResult, measure: Measure) -> str:
    against = variant.against[measure.key]
    if not against.paired:
        return "not paired"
    word = measure.better or ("lower" if against.lower > against.higher else "higher")
    count = against.lower if word == "lower" else against.higher
    ties = f", {against.ties} equal" if against.ties else ""
    return f"{count} of {against.difference.n} {word if measure.better is None else 'better'}{ties}"


def _mean(variant: VariantResult, measure: Measure) -> str:
    estimate = variant.means.get(measure.key)
    mark = _censored_mark(variant) if measure is EPOCHS_TO_TARGET else ""
    return _NONE if estimate is None else mark + measure.text(estimate.value)


def _estimate(estimate: Estimate | None, measure: Measure, *, signed: bool = False) -> str:
    if estimate is None:
        return _NONE
    return estimate_text(estimate, lambda value: measure.text(value, signed=signed))


def _value(variant: VariantResult, index: int, measure: Measure, result: Comparison) -> str:
    value = variant.values[measure.key][index]
    if value is None:
        return _NONE
    reached = timed(variant.runs[index], result.reading) if measure is EPOCHS_TO_TARGET else None
    return ("≥ " if reached is not None and not reached.reached else "") + measure.text(value)


def _label(measure: Measure, result: Comparison) -> str:
    return measure.label.format(at_epoch=result.reading.at_epoch)


def _target(result: Comparison) -> str:
    which = "held-out" if result.reading.metric == "heldout" else "training"
    return f"{result.reading.target:.4g} ({which} reward)"


def _setting(value: object) -> str:
    return "not set" if value is None else f"`{value}`"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
