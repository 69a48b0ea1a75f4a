"""Check a run against an acceptance band."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pcpo_fast.config.shipped import find, root
from pcpo_fast.config.wording import counted
from pcpo_fast.config.yaml_text import read_yaml
from pcpo_fast.errors import UserError
from pcpo_fast.reporting.metrics_file import Record, read_metrics
from pcpo_fast.reporting.series import Series, epochs_trained, series
from pcpo_fast.reproduction.bands import Band, Reaches, Within, read_band, shipped_bands

Verdict = Literal["inside", "outside", "undecided"]


class PointResult(NamedTuple):
    """Result for one point of a band; undecided if the run has not trained long enough or did not measure it."""

    verdict: Verdict
    says: str


def check_run(run: Path, band_file: Path | None = None, recipes: Path | None = None) -> dict[str, Any]:
    """Check a run against its band; returns a JSON-compatible dictionary.

    Args:
        run: a run directory, finished or not.
        band_file: the band; None: the first shipped one whose settings match the run's.
        recipes: folder of the bands to choose from; None: the shipped one.

    Raises:
        UserError: the run or the band cannot be read, or no band applies to the run's configuration.
    """
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run} is not a run directory (no metrics.jsonl in it)")
    records = read_metrics(run / "metrics.jsonl")
    config = read_yaml(run / "config.yaml")[0]
    if band_file is None:
        band_file, band = _matching(config, root() / "examples" if recipes is None else recipes, run)
    else:
        band = read_band(find(band_file))
        different = band.unmet_settings(config)
        if different:
            raise UserError(f"{run}: {band_file} is for another configuration: {different[0]}")
    results = [check_point(point, records) for point in band.points]
    return {
        "run": str(run),
        "band": str(band_file),
        "name": band.name,
        "source": band.source,
        "verified": band.verified,
        "verdict": overall([result.verdict for result in results]),
        "points": [
            {**point.model_dump(), "verdict": result.verdict, "says": result.says}
            for point, result in zip(band.points, results, strict=True)
        ],
    }


def overall(verdicts: list[Verdict]) -> Verdict:
    """Outside if any point is outside; otherwise undecided if any is undecided."""
    return min(verdicts, key=("outside", "undecided", "inside").index)


def check_point(point: Within | Reaches, records: list[Record]) -> PointResult:
    """Check one point of a band against a run's records."""
    curve = series(records, point.metric)
    trained = epochs_trained(records)
    return _within(point, curve, trained) if isinstance(point, Within) else _reaches(point, curve, trained)


def _within(point: Within, curve: Series, trained: int) -> PointResult:
    found = curve.by_epoch().get(point.epochs)
    wanted = f"{point.metric} after {counted(point.epochs, 'epoch')}: {point.low:.4g} to {point.high:.4g}"
    if found is None:
        if trained < point.epochs:
            return PointResult("undecided", f"{wanted}; the run has trained {counted(trained, 'epoch')}")
        return PointResult("undecided", f"{wanted}; the run did not measure it then")
    inside = point.low <= found <= point.high
    return PointResult("inside" if inside else "outside", f"{wanted}; the run has {found:.4g}")


def _reaches(point: Reaches, curve: Series, trained: int) -> PointResult:
    wanted = f"{point.metric} reaches {point.value:.4g} by epoch {point.by_epochs}"
    if point.average > 1:
        wanted += f" (mean of {counted(point.average, 'epoch')})"
    best = None
    for end in range(point.average, len(curve.values) + 1):
        mean = sum(curve.values[end - point.average : end]) / point.average
        epoch = curve.epochs[end - 1]
        if epoch <= point.by_epochs:
            best = mean if best is None else max(best, mean)
            if mean >= point.value:
                return PointResult("inside", f"{wanted}; the run reached it at epoch {epoch:g}")
    if trained <= point.by_epochs:
        return PointResult("undecided", f"{wanted}; the run has trained {counted(trained, 'epoch')}")
    reached = "the run has no values by then" if best is None else f"the run's best is {best:.4g}"
    return PointResult("outside", f"{wanted}; {reached}")


def _matching(config: dict[str, Any], recipes: Path, run: Path) -> tuple[Path, Band]:
    bands = shipped_bands(recipes)
    if not bands:
        raise UserError(f"{recipes} has no */band.json; give a band with --band FILE")
    for path, band in bands.items():
        if not band.unmet_settings(config):
            return path, band
    closest, band = min(bands.items(), key=lambda item: len(item[1].unmet_settings(config)) / len(item[1].settings))
    raise UserError(
        f"{run}: no shipped band matches its configuration, which differs from the closest, {closest}, in: "
        f"{'; '.join(band.unmet_settings(config)[:3])}"
    )
