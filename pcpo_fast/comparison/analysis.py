"""Analysis of runs: measures per seed, means over seeds, differences to the baseline, and a verdict on each."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pcpo_fast.comparison.curves import last_value
from pcpo_fast.comparison.decisions import VERY_FEW, Decision, decide
from pcpo_fast.comparison.measures import (
    EPOCHS_TO_TARGET,
    MEASURES,
    Costs,
    Measure,
    Metric,
    Primary,
    Reading,
    compute_spent,
    judge_measure,
    seconds_spent,
    smoothed_reward,
    timed,
)
from pcpo_fast.comparison.reading import RunCurves
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.reporting.series import Series
from pcpo_fast.reporting.statistics import Estimate, mean, mean_difference, ratio_of_means
from pcpo_fast.reporting.tables import fixed_text

WAY_TO_THE_END = 0.9
"""Default target: this fraction of the baseline's increase from the starting to the final reward."""

FEW = 5
"""Below this many seeds a verdict is hedged; below :data:`VERY_FEW` there is none."""

Bound = Literal["", "at least", "at most", "restricted"]


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of the analysis.

    Attributes:
        target: reward for the time to target; None: :data:`WAY_TO_THE_END` of the baseline's increase.
        metric: which reward: "training" (trailing mean over the rollouts) or "heldout" (between evaluations).
        baseline: the variant that the others are compared with; None: the first.
        at_epoch: also compare the rewards after this many epochs.
        smoothing: epochs of the trailing mean.
        include_unfinished: also use unfinished runs, and only as many epochs of every run as the shortest has.
        primary: the measure that decides; None: there is none.
        primary_before: the primary measure that was recorded before there were any runs; None: none was.
        costs: compute costs of decodes and reward calls.
        notes: further caveats for the reader.
    """

    target: float | None = None
    metric: Metric = "training"
    baseline: str | None = None
    at_epoch: int | None = None
    smoothing: int = 5
    include_unfinished: bool = False
    primary: Primary | None = None
    primary_before: Primary | None = None
    costs: Costs = field(default_factory=Costs)
    notes: tuple[str, ...] = ()

    @property
    def primary_measure(self) -> Measure:
        """The measure that `primary` names, which must be set."""
        return MEASURES[str(self.primary)]


@dataclass(frozen=True)
class Missing:
    """A run that is excluded from the comparison, and why."""

    variant: str
    seed: int | None
    reason: str


def missing_lines(missing: Sequence[Missing]) -> list[str]:
    """One line for each variant and reason, with all of its seeds."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for run in missing:
        seeds.setdefault((run.variant, run.reason), []).extend([] if run.seed is None else [str(run.seed)])
    lines = []
    for (variant, reason), own in seeds.items():
        which = f", seed{'s' * (len(own) > 1)} {', '.join(own)}" if own else ""
        lines.append(f"{variant}{which}: {reason}")
    return lines


@dataclass(frozen=True)
class Against:
    """One measure of a variant against the baseline.

    Attributes:
        means: of the variant and of the baseline, over the runs that the difference is of.
        difference: mean of the variant minus mean of the baseline.
        paired: whether runs were paired by seed.
        higher, lower, ties: number of seeds by the sign of their difference; all 0 if runs are not paired.
        verdict: "better", "worse" (or "higher", "lower" if neither direction is better), with "probably" for three or
            four seeds; "no clear difference"; or "too few seeds".
    """

    means: tuple[float, float]
    difference: Estimate
    paired: bool
    higher: int
    lower: int
    ties: int
    verdict: str


@dataclass(frozen=True)
class VariantResult:
    """Results of a variant.

    Attributes:
        runs: the runs that are included.
        values: a number per run and measure; None if the run has none.
        means: mean over seeds by measure, for measures with at least one number.
        reached: number of runs whose reward reached the target; None without a target.
        against: differences to the baseline by measure; empty for the baseline itself.
        speed_up: the baseline's epochs to target divided by the variant's.
        speed_up_bound: in which direction `speed_up` is only a bound, because a run never reached the target.
    """

    name: str
    runs: tuple[RunCurves, ...]
    values: Mapping[str, tuple[float | None, ...]]
    means: Mapping[str, Estimate]
    reached: int | None
    against: Mapping[str, Against]
    speed_up: Estimate | None
    speed_up_bound: Bound


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        settings: as given.
        reading: how the runs were read, including the resolved target and horizon.
        target_source: where the target comes from, or why there is none, for the reader.
        baseline: its name.
        variants: in the order given.
        missing: excluded runs.
        all_measures: all measures that were computed.
        decisions: the primary measure of every variant but the baseline; empty where there is none.
    """

    settings: ComparisonSettings
    reading: Reading
    target_source: str
    baseline: str
    variants: tuple[VariantResult, ...]
    missing: tuple[Missing, ...]
    all_measures: tuple[Measure, ...]
    decisions: Mapping[str, Decision]

    @property
    def measures(self) -> list[Measure]:
        """The measures for which at least one run has a number."""
        return [
            measure for measure in self.all_measures if any(measure.key in variant.means for variant in self.variants)
        ]

    def variant(self, name: str) -> VariantResult:
        """A variant by its name."""
        return next(variant for variant in self.variants if variant.name == name)


def compare(
    runs: Mapping[str, Sequence[RunCurves]], settings: ComparisonSettings, missing: Sequence[Missing] = ()
) -> Comparison:
    """Compare variants, each of one or several runs, on the seeds that all of them have.

    Args:
        runs: run directories as read, by the name of their variant.
        settings: what can be chosen.
        missing: runs that should exist but do not.

    Raises:
        UserError: there is nothing to compare, or a setting does not match the runs.
    """
    baseline = next(iter(runs), "") if settings.baseline is None else settings.baseline
    if baseline not in runs:
        raise UserError(f"--baseline: must be one of {', '.join(runs)}, got {baseline}")
    chosen: dict[str, list[RunCurves]] = {name: [] for name in runs}
    absent = list(missing)
    for name, run in ((name, run) for name, group in runs.items() for run in group):
        if run.epochs > 0 and (run.finished or settings.include_unfinished):
            chosen[name].append(run)
        else:
            planned = run.epochs if run.config is None else run.config.train.epochs
            trained = ("" if run.config is None else f"{run.epochs} of ") + counted(planned, "epoch")
            absent.append(Missing(name, run.seed, f"{run.folder} is not finished ({trained})"))
    if not any(chosen.values()):
        lines = missing_lines(absent)
        reasons = "; ".join([*lines[:3], *([f"and {len(lines) - 3} more"] if len(lines) > 3 else [])])
        raise UserError(f"there is no finished run to compare ({reasons or 'none was given'})")
    chosen, left_out = _on_common_seeds(chosen)
    absent += left_out
    everything = [run for group in chosen.values() for run in group]
    reading = reading_of(everything, settings)
    target, source = _target(chosen, baseline, reading, settings)
    reading = replace(reading, target=target)
    judges = dict.fromkeys(name for run in everything for name in run.judges)
    named = (replace(one, label=one.label.format(at_epoch=reading.at_epoch)) for one in MEASURES.values())
    measures = (*named, *map(judge_measure, judges))
    values = {
        name: {measure.key: tuple(measure.of(run, reading) for run in group) for measure in measures}
        for name, group in chosen.items()
    }
    results = tuple(_result(name, baseline, chosen, values, reading, measures) for name in chosen)
    sides = {
        name: _sides(chosen[name], values[name][key], chosen[baseline], values[baseline][key])
        for name in chosen
        if (key := settings.primary) is not None and name != baseline
    }
    decisions = decide({name: both for name, both in sides.items() if all(both[0])})
    return Comparison(settings, reading, source, baseline, results, tuple(absent), measures, decisions)


def _on_common_seeds(chosen: Mapping[str, list[RunCurves]]) -> tuple[dict[str, list[RunCurves]], list[Missing]]:
    """The runs whose seed every variant with runs has, and the others.

    All runs count where seeds do not make pairs: without common seeds, or with one that only a few of many runs share.
    A variant with a single run allows no verdict, and takes none from two others with more: it leaves them their seeds.
    """
    groups = {name: [run.seed for run in group] for name, group in chosen.items() if group}
    distinct = all(None not in seeds and len(set(seeds)) == len(seeds) for seeds in groups.values())
    several = {name: seeds for name, seeds in groups.items() if len(seeds) > 1}
    groups = several if len(several) > 1 else groups
    common = set.intersection(*map(set, groups.values())) - {None}
    if not distinct or not common or (len(common) == 1 and min(map(len, groups.values())) > 1):
        return dict(chosen), []
    left_out = []
    for name, run in ((own, run) for own in groups for run in chosen[own] if run.seed not in common):
        lacking = [other for other, seeds in groups.items() if run.seed not in seeds]
        have = "has" if len(lacking) == 1 else "have"
        left_out.append(Missing(name, run.seed, f"left out, because {' and '.join(lacking)} {have} no run to match"))
    kept = {name: [run for run in chosen[name] if run.seed in common] for name in groups}
    return {name: kept.get(name, group) for name, group in chosen.items()}, left_out


def verdict(difference: Estimate, better: Literal["higher", "lower"] | None) -> str:
    """The verdict on an interval: see :attr:`Against.verdict`."""
    if difference.n < VERY_FEW:
        return "too few seeds"
    if not difference.excludes_zero:
        return "no clear difference"
    direction = "higher" if difference.value > 0 else "lower"
    word = direction if better is None else "better" if direction == better else "worse"
    return word if difference.n >= FEW else f"probably {word}"


def reading_of(runs: Sequence[RunCurves], settings: ComparisonSettings) -> Reading:
    """How the runs are read: up to the epoch that all of them have, and without a target.

    Raises:
        UserError: a setting does not match the runs.
    """
    horizon = min(run.epochs for run in runs)
    if settings.at_epoch is not None and settings.at_epoch > horizon:
        raise UserError(
            f"--at-epoch: must be at most {horizon}, the epochs of the shortest run, got {settings.at_epoch}"
        )
    if settings.metric == "heldout" and not any(run.heldout for run in runs):
        raise UserError("--metric heldout: the runs have no held-out evaluations (prompts.heldout); allowed: training")
    spent = [compute_spent(run, settings.costs) for run in runs]
    seconds = [seconds_spent(run) for run in runs]
    return Reading(
        horizon,
        None,
        settings.metric,
        settings.smoothing,
        settings.at_epoch,
        settings.costs,
        compute=min((known[-1] for known in spent if known), default=None),
        seconds=min((known[-1] for known in seconds if known), default=None),
        kl=min((known for run in runs if (known := last_value(run.kl, horizon)) is not None), default=None),
    )


def _target(
    chosen: Mapping[str, Sequence[RunCurves]], baseline: str, reading: Reading, settings: ComparisonSettings
) -> tuple[float | None, str]:
    if settings.target is not None:
        return settings.target, "as given"

    def curve(run: RunCurves) -> Series:
        return run.heldout if reading.metric == "heldout" else smoothed_reward(run, reading)

    starts = [curve(run).values[0] for group in chosen.values() for run in group if curve(run)]
    ends = [last_value(curve(run), reading.horizon) for run in chosen[baseline]]
    final = [end for end in ends if end is not None]
    if not final or not starts:
        return None, f"none: no run of the baseline {baseline} has a final reward"
    start, end = statistics.fmean(starts), statistics.fmean(final)
    if end <= start:
        return None, f"none: the reward of the baseline {baseline} does not rise ({start:.4g} to {end:.4g})"
    share = f"{WAY_TO_THE_END:.0%}".replace("%", " %")
    return (
        start + WAY_TO_THE_END * (end - start),
        f"{share} of the way from the mean start of all runs ({fixed_text(start, 4)}) to the mean end of {baseline} "
        f"({fixed_text(end, 4)})",
    )


def _result(
    name: str,
    baseline: str,
    chosen: Mapping[str, Sequence[RunCurves]],
    values: Mapping[str, Mapping[str, tuple[float | None, ...]]],
    reading: Reading,
    measures: Sequence[Measure],
) -> VariantResult:
    known = {key: [value for value in column if value is not None] for key, column in values[name].items()}
    times = {key: [timed(run, reading) for run in chosen[key]] for key in (name, baseline)}
    reached = {key: [time.reached for time in column if time is not None] for key, column in times.items()}
    against, speed_up = {}, None
    for measure in measures if name != baseline else ():
        columns = values[name][measure.key], values[baseline][measure.key]
        (own, other), paired = _sides(chosen[name], columns[0], chosen[baseline], columns[1])
        if not own or not other:
            continue
        difference = mean_difference(own, other, paired=paired)
        signs = [_sign(x, y) for x, y in zip(own, other, strict=True)] if paired else []
        counts = (signs.count(1), signs.count(-1), signs.count(0))
        means = (statistics.fmean(own), statistics.fmean(other))
        against[measure.key] = Against(means, difference, paired, *counts, verdict(difference, measure.better))
        if measure == EPOCHS_TO_TARGET:
            speed_up = ratio_of_means(other, own, paired=paired)
    bounds: dict[tuple[bool, bool], Bound] = {
        (True, True): "",
        (True, False): "at most",
        (False, True): "at least",
        (False, False): "restricted",
    }
    return VariantResult(
        name=name,
        runs=tuple(chosen[name]),
        values=values[name],
        means={key: mean(column) for key, column in known.items() if column},
        reached=sum(reached[name]) if reached[name] else None,
        against=against,
        speed_up=speed_up,
        speed_up_bound=bounds[all(reached[baseline]), all(reached[name])],
    )


def _sides(
    runs: Sequence[RunCurves],
    values: Sequence[float | None],
    baseline_runs: Sequence[RunCurves],
    baseline_values: Sequence[float | None],
) -> tuple[tuple[list[float], list[float]], bool]:
    """The values of both sides, and whether they are pairs: of the same seeds, or of the one that a side has."""
    own, other = (
        [(run.seed, value) for run, value in zip(group, column, strict=True) if value is not None]
        for group, column in ((runs, values), (baseline_runs, baseline_values))
    )
    seeds, others = ([run.seed for run in group] for group in (runs, baseline_runs))
    distinct = None not in (*seeds, *others) and len(set(seeds)) == len(seeds) and len(set(others)) == len(others)
    by_seed = [{seed: value for seed, value in side if seed is not None} for side in (own, other)]
    alike = distinct and (set(seeds) == set(others) or min(len(seeds), len(others)) == 1)
    common = sorted(by_seed[0].keys() & by_seed[1].keys()) if alike else []
    if len(common) > 1 or (common and min(len(own), len(other)) == 1):
        return ([by_seed[0][seed] for seed in common], [by_seed[1][seed] for seed in common]), True
    return ([value for _, value in own], [value for _, value in other]), False


def _sign(x: float, y: float) -> int:
    """Values that differ only by rounding are a tie."""
    return 0 if math.isclose(x, y, rel_tol=1e-12, abs_tol=1e-15) else 1 if x > y else -1
