"""Tunes the learning rate and other settings of each variant on search seeds that the comparison does not use.

Every variant begins with the same learning rates, each with every combination of the settings that it searches. A
variant whose best rate is the lowest or the highest in its list gets another one beyond it, until its best rate lies
inside; the other variants then get equally many extra trials, between their best rate and its neighbours. The next
trials depend only on the results on disk, so an interrupted search continues where it stopped.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from pcpo_fast.comparison.analysis import ComparisonSettings, reading_of
from pcpo_fast.comparison.measures import Reading
from pcpo_fast.comparison.reading import read_run
from pcpo_fast.comparison.scheduling import check_folders
from pcpo_fast.comparison.variants import (
    TUNING,
    ComparisonPlan,
    PlannedRun,
    Variant,
    planned_run,
    planned_runs,
    settings_from,
    settings_mapping,
)
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.reporting.tables import Grid

JSON_FILE, MARKDOWN_FILE = "tuning.json", "tuning.md"
_LR = "optimizer.lr"


@dataclass(frozen=True)
class Trial:
    """One set of settings tried for a variant.

    Attributes:
        variant: the variant's name.
        searched: ``key=value`` for each setting searched besides the learning rate.
        lr: the learning rate.
    """

    variant: str
    searched: tuple[str, ...]
    lr: float

    @property
    def settings(self) -> tuple[str, ...]:
        """Every setting of the trial, as on the command line."""
        return (*self.searched, f"{_LR}={self.lr!r}")


@dataclass(frozen=True)
class Search:
    """The state of a search.

    Attributes:
        trials: trials of every variant, oldest first.
        waiting: runs that must finish before the search can continue.
        scores: the primary measure of each finished trial, one value per search seed.
        chosen: the best trial of every variant; empty until the search is over.
        at_edge: variants that used up their trials while their best rate was still at an end of their list.
    """

    trials: Mapping[str, tuple[Trial, ...]]
    waiting: tuple[PlannedRun, ...]
    scores: Mapping[Trial, tuple[float, ...]]
    chosen: Mapping[str, Trial]
    at_edge: tuple[str, ...]


def look(plan: ComparisonPlan, settings: ComparisonSettings) -> Search:
    """The state of a search, from the runs that have finished on disk.

    Raises:
        UserError: the plan's ``tuning`` is invalid, or a run has no value for the primary measure.
    """
    tuning = plan.tuning
    assert tuning is not None
    planned_runs(plan, twins=True)  # checks the names, and the settings of the comparison itself
    tried = {variant.name: _grid(plan, variant) for variant in plan.variants}
    largest = max(map(len, tried.values()))
    limit = 2 * largest if tuning.max_trials is None else tuning.max_trials
    if limit < largest:
        raise UserError(f"tuning.max_trials: must be at least {largest}, the trials of the largest grid, got {limit}")
    measure = settings.primary_measure
    reading: Reading | None = None
    scores: dict[Trial, tuple[float, ...]] = {}
    while True:
        # Seed by seed and rate by rate, so that the variants grow evenly.
        order = itertools.zip_longest(*tried.values())
        new = [trial for row in order for trial in row if trial is not None and trial not in scores]
        runs = {trial: trial_runs(plan, trial) for trial in new}
        waiting = check_folders([run for column in zip(*runs.values(), strict=True) for run in column])
        if waiting:
            return Search(_frozen(tried), tuple(waiting), scores, {}, ())
        curves = {trial: [read_run(run.folder) for run in runs[trial]] for trial in new}
        reading = reading or reading_of([run for group in curves.values() for run in group], settings)
        for trial, group in curves.items():
            values = [measure.of(run, reading) for run in group]
            known = [value for value in values if value is not None]
            if len(known) < len(values):
                folder = group[values.index(None)].folder
                raise UserError(f"primary: {folder} has no value of {measure.key} ({measure.meaning})")
            scores[trial] = tuple(known)
        best = {name: max(own, key=lambda trial: fmean(scores[trial])) for name, own in tried.items()}
        beyond = {name: _beyond(best[name], own, tuning.lr) for name, own in tried.items()}
        for name, own in tried.items():
            if (trial := beyond[name]) is not None and len(own) < limit:
                own.append(trial)
        most = max(map(len, tried.values()))
        for name, own in tried.items():
            while len(own) < most:
                own.append(_between(best[name], own))
        if all(trial in scores for own in tried.values() for trial in own):
            at_edge = tuple(name for name, trial in beyond.items() if trial is not None)
            return Search(_frozen(tried), (), scores, best, at_edge)


def trial_runs(plan: ComparisonPlan, trial: Trial) -> list[PlannedRun]:
    """One run per search seed, in ``OUTPUT/tuning/VARIANT/TRIAL/seed_S``."""
    assert plan.tuning is not None
    variant = next(variant for variant in plan.variants if variant.name == trial.variant)
    tried = replace(variant, settings=(*variant.settings, *trial.settings), search={})
    words = (re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_") for text in trial.settings)
    folder = plan.output / TUNING / variant.name / "_".join(words)
    return [
        replace(planned_run(plan, tried, seed, folder), variant=f"{variant.name} with {' '.join(trial.settings)}")
        for seed in plan.tuning.seeds
    ]


def tuned(plan: ComparisonPlan, search: Search) -> ComparisonPlan:
    """The comparison of the tuned variants, on the comparison's own seeds."""
    variants = (
        replace(variant, settings=(*variant.settings, *search.chosen[variant.name].settings), search={})
        for variant in plan.variants
    )
    return replace(plan, variants=tuple(variants), tuning=None)


def tuning_notes(plan: ComparisonPlan, search: Search) -> tuple[str, ...]:
    """What readers of the comparison should know about the search, one sentence each."""
    assert plan.tuning is not None
    seeds = ", ".join(map(str, plan.tuning.seeds))
    count = len(next(iter(search.trials.values())))
    first = (
        f"The settings of each variant were chosen from {counted(count, 'trial')}, with seeds that the comparison "
        f"does not use ({seeds})."
    )
    edges = (
        f"The best learning rate of {name} lies at the end of its list: a better one may lie beyond "
        f"(tuning.max_trials allows {counted(count, 'trial')})."
        for name in search.at_edge
    )
    return (first, *edges)


def write_search(plan: ComparisonPlan, settings: ComparisonSettings, search: Search) -> list[Path]:
    """Write tuning.json and tuning.md into the comparison's folder; returns their paths."""
    assert plan.tuning is not None
    measure = settings.primary_measure
    record = {
        "format": 1,
        "primary": measure.key,
        "seeds": plan.tuning.seeds,
        "waiting_runs": len(search.waiting),
        "variants": {
            name: {
                "chosen": search.chosen[name].settings if name in search.chosen else None,
                "at_edge": name in search.at_edge,
                "trials": [{"settings": trial.settings, "values": search.scores.get(trial)} for trial in own],
            }
            for name, own in search.trials.items()
        },
    }
    header = ("variant", "settings", "mean", *(f"seed {seed}" for seed in plan.tuning.seeds))
    rows = []
    for name, own in search.trials.items():
        for trial in sorted(own, key=lambda trial: (trial.searched, trial.lr)):
            values = search.scores.get(trial)
            mark = " (chosen)" if search.chosen.get(name) == trial else ""
            cells = (
                ["–"] * (1 + len(plan.tuning.seeds)) if values is None else map(measure.text, (fmean(values), *values))
            )
            rows.append((name + mark, " ".join(trial.settings), *cells))
    parts = ["# Tuning", f"Chosen by: {measure.label} ({measure.meaning})."]
    if search.waiting:
        parts.append(f"The search is not over: {counted(len(search.waiting), 'run')} must finish before it continues.")
    parts += [Grid("", header, tuple(rows)).markdown()]
    parts += [f"- {note}" for note in tuning_notes(plan, search) if search.chosen]
    paths = [plan.output / JSON_FILE, plan.output / MARKDOWN_FILE]
    write_atomically(paths[0], json.dumps(record, indent=1, allow_nan=False) + "\n")
    write_atomically(paths[1], "\n\n".join(parts) + "\n")
    return paths


def _grid(plan: ComparisonPlan, variant: Variant) -> list[Trial]:
    """The first trials: every combination of the searched settings with every rate."""
    assert plan.tuning is not None
    searched = [_LR, *variant.search]
    fixed = [key for key in settings_mapping((*plan.settings, *variant.settings)) if key in searched]
    if fixed or searched.count(_LR) > 1:
        key = fixed[0] if fixed else _LR
        where = "tuning.lr" if key == _LR else f"variants.{variant.name}.search"
        raise UserError(f"variant {variant.name}: {key} is searched ({where}), so nothing else may set it")
    columns = [[settings_from({key: value})[0] for value in values] for key, values in variant.search.items()]
    return [Trial(variant.name, chosen, lr) for chosen in itertools.product(*columns) for lr in plan.tuning.lr]


def _beyond(best: Trial, own: Sequence[Trial], rates: Sequence[float]) -> Trial | None:
    """The next rate beyond the best one, by the list's own ratio; None if the best is not at an end."""
    alike = sorted(trial.lr for trial in own if trial.searched == best.searched)
    if best.lr == alike[0]:
        return replace(best, lr=_rounded(best.lr * rates[0] / rates[1]))
    if best.lr == alike[-1]:
        return replace(best, lr=_rounded(best.lr * rates[-1] / rates[-2]))
    return None


def _between(best: Trial, own: Sequence[Trial]) -> Trial:
    """The geometric middle of the wider gap beside the best rate."""
    alike = sorted(trial.lr for trial in own if trial.searched == best.searched)
    place = alike.index(best.lr)
    gaps = list(itertools.pairwise(alike[max(0, place - 1) : place + 2]))
    low, high = max(gaps, key=lambda gap: gap[1] / gap[0])
    return replace(best, lr=_rounded(math.sqrt(low * high)))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def _frozen(tried: Mapping[str, list[Trial]]) -> dict[str, tuple[Trial, ...]]:
    return {name: tuple(own) for name, own in tried.items()}
