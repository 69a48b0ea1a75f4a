"""comparison.json: every number of a comparison, and where it came from."""

import platform
from dataclasses import asdict
from statistics import median_high
from typing import Any

import pcpo_fast
from pcpo_fast.comparison.analysis import Comparison, VariantResult
from pcpo_fast.comparison.differences import consequences, differences
from pcpo_fast.comparison.measures import timed
from pcpo_fast.config.wording import counted
from pcpo_fast.config.yaml_text import value_text
from pcpo_fast.reporting.series import Series
from pcpo_fast.reporting.statistics import LEVEL, RESAMPLES, attainable
from pcpo_fast.runs.input_record import read_differently
from pcpo_fast.runs.provenance import library_versions

FORMAT = 1


def comparison_record(result: Comparison) -> dict[str, Any]:
    """The comparison as JSON values, without NaN."""
    reading = result.reading
    return {
        "format": FORMAT,
        "versions": {"pcpo_fast": pcpo_fast.__version__, "python": platform.python_version()} | library_versions(),
        "settings": {
            "baseline": result.baseline,
            "metric": reading.metric,
            "target": reading.target,
            "target_source": result.target_source,
            "horizon_epochs": reading.horizon,
            "at_epoch": reading.at_epoch,
            "smoothing_epochs": reading.smoothing,
            "primary": result.settings.primary,
            "primary_before": result.settings.primary_before,
            "costs": reading.costs.model_dump(),
            "compute": reading.compute,
            "include_unfinished": result.settings.include_unfinished,
            "interval_level": LEVEL,
            "bootstrap_resamples": RESAMPLES,
        },
        "measures": {
            measure.key: {"label": measure.label, "better": measure.better, "meaning": measure.meaning}
            for measure in result.measures
        },
        "decisions": {name: asdict(decision) for name, decision in result.decisions.items()},
        "differences": variant_differences(result),
        "variants": {
            variant.name: {
                "runs": [_run(variant, index, result) for index in range(len(variant.runs))],
                "reached_target": variant.reached,
                "means": {key: asdict(estimate) for key, estimate in variant.means.items()},
                "against_baseline": {key: asdict(against) for key, against in variant.against.items()},
                "speed_up": variant.speed_up and asdict(variant.speed_up) | {"bound": variant.speed_up_bound},
            }
            for variant in result.variants
        },
        "missing": [asdict(run) for run in result.missing],
        "notes": notes(result),
    }


def variant_differences(result: Comparison) -> dict[str, dict[str, Any]]:
    """Settings that differ between the variants, read from their first runs: {key: {variant: value}}."""
    return differences({v.name: v.runs[0].config for v in result.variants if v.runs and v.runs[0].config is not None})


def notes(result: Comparison) -> list[str]:
    """Caveats for readers of the numbers."""
    found = list(result.settings.notes)
    runs = [run for variant in result.variants for run in variant.runs]
    if len({run.epochs for run in runs}) > 1:
        longest = max(run.epochs for run in runs)
        found.append(
            f"The runs differ in length, and are compared over {counted(result.reading.horizon, 'epoch')} from the "
            f"start (the longest has {longest})."
        )
    if (primary := result.settings.primary) is not None:
        undecided = [v.name for v in result.variants if v.name not in (result.baseline, *result.decisions)]
        found += [f"{name}: no verdict, because it or {result.baseline} has no {primary}." for name in undecided]
    if result.reading.target is None:
        found.append(f"Epochs to target are left out: {result.target_source}.")
    found += consequences(variant_differences(result))
    for variant in result.variants:
        configs = {str(index): run.config for index, run in enumerate(variant.runs) if run.config is not None}
        varying = [
            f"{key} ({', '.join(dict.fromkeys(map(value_text, values.values())))})"
            for key, values in differences(configs).items()
        ]
        if varying:
            found.append(f"{variant.name}: its runs have different settings: {'; '.join(varying)}.")
    changed = read_differently([run.folder for run in runs])
    if changed:
        found.append(f"The runs did not read the same files: the content of {', '.join(changed)} changed between them.")
    for variant in result.variants:
        skipped = sum(sum(run.skipped.values()) for run in variant.runs)
        if skipped:
            found.append(f"{variant.name}: skipped {counted(skipped, 'update')} because a gradient was not finite.")
        if variant.runs and len({run.seed for run in variant.runs}) < len(variant.runs) and variant.runs[0].config:
            found.append(f"{variant.name}: several runs have the same seed, so they are not independent.")
    found += [f"{run.problem}; its seed and settings are unknown." for run in runs if run.problem]
    return found + _about_intervals(result)


def _about_intervals(result: Comparison) -> list[str]:
    compared = [variant for variant in result.variants if variant.runs]
    found = []
    apart = any(not against.paired for variant in compared for against in variant.against.values())
    if apart:
        found.append(
            "Some runs are not paired by seed: their means may be of different seeds, and their differences have "
            "wider intervals."
        )
    alone = [variant.name for variant in compared if len(variant.runs) == 1]
    count = min((len(variant.runs) for variant in compared if len(variant.runs) > 1), default=0)
    if alone:
        found.append("A variant with one seed has no interval: how much seeds differ is unknown.")
    if alone and count and not apart:
        found.append(
            f"Only one seed has been run of {' and '.join(alone)}, and the other means are of more: look at the "
            "differences, which are of the seeds that both sides have."
        )
    if 0 < count < 5:
        found.append(
            f"With {counted(count, 'seed')} an interval covers the true mean at most {attainable(count):.0%} of the "
            "time, whatever its nominal level: do not rely on it.".replace("%", " %")
        )
    return found


def _run(variant: VariantResult, index: int, result: Comparison) -> dict[str, Any]:
    run = variant.runs[index]
    reached = timed(run, result.reading)
    return {
        "seed": run.seed,
        "folder": run.folder.name if run.folder.is_absolute() else str(run.folder),
        "epochs": run.epochs,
        "finished": run.finished,
        "reached_target": None if reached is None else reached.reached,
        "values": {measure.key: variant.values[measure.key][index] for measure in result.measures},
        "skipped_updates": sum(run.skipped.values()),
        "seconds_per_epoch": round(median_high(run.seconds.values), 4) if run.seconds else None,
        "curves": {"reward": _curve(run.reward), "heldout_reward": _curve(run.heldout)},
    }


def _curve(curve: Series) -> dict[str, list[float]]:
    return {"epochs": list(curve.epochs), "values": [float(f"{value:.7g}") for value in curve.values]}
