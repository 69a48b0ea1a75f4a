"""``compare``: several configurations over several seeds."""

import glob
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from pcpo_fast.comparison import compare_runs, scheduling, write_comparison
from pcpo_fast.comparison.analysis import Comparison, ComparisonSettings, Missing
from pcpo_fast.comparison.analysis import compare as compare_curves
from pcpo_fast.comparison.comparison_file import (
    FILE,
    ComparisonFile,
    read_plan_file,
    seeds_of,
    tuning_of,
    variants_of,
    write_plan_file,
)
from pcpo_fast.comparison.lock import only_one
from pcpo_fast.comparison.measures import Metric, Primary
from pcpo_fast.comparison.reading import read_run
from pcpo_fast.comparison.run_sizes import check_run_sizes, with_common_sizes
from pcpo_fast.comparison.scheduling import Failure, HowToRun, check_folders
from pcpo_fast.comparison.small_records import write_small_records
from pcpo_fast.comparison.tuning import Search, look, tuned, tuning_notes, write_search
from pcpo_fast.comparison.variants import (
    TUNING,
    ComparisonPlan,
    PlannedRun,
    Variant,
    check_name,
    planned_runs,
    settings_from,
)
from pcpo_fast.config.arguments import check_choice, check_idle, check_least
from pcpo_fast.config.presets import DEFAULT_CONFIG
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import EXIT_USER_ERROR, UserError
from pcpo_fast.interface.configuration import File, Settings, settings_texts
from pcpo_fast.reporting.metrics_file import find_metrics
from pcpo_fast.reporting.progress import say


@dataclass(frozen=True)
class Compared:
    """A comparison and its files.

    Attributes:
        result: numbers per seed, means, differences from the baseline, and verdicts.
        report: path of comparison.md.
        record: path of comparison.json.
        page: path of comparison.html.
        figures: paths of the figures.
    """

    result: Comparison
    report: Path
    record: Path
    page: Path
    figures: tuple[Path, ...]


class RunsFailed(UserError):
    """Some runs of a comparison ended with an error.

    Attributes:
        exit_code: 2 if all errors are user errors, otherwise 1.
        compared: the comparison of the other runs; None if there is nothing to compare.
        reason: why there is nothing to compare, unless it has been printed.
    """

    def __init__(self, failures: Sequence[Failure], runs: int, compared: Compared | None, reason: str = "") -> None:
        named = ", ".join(f"{failure.run.name} (log: {failure.run.log})" for failure in failures)
        super().__init__(f"{len(failures)} of {counted(runs, 'run')} failed: {named}")
        self.exit_code = EXIT_USER_ERROR if all(failure.code == EXIT_USER_ERROR for failure in failures) else 1
        self.compared, self.reason = compared, reason


class NotFinished(UserError):
    """The time ran out before there was anything to compare; the same call continues.

    Attributes:
        reason: what is missing; empty if it has been printed.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(
            f"there is nothing to compare yet: {reason or 'tuning has not finished'}; the same call resumes"
        )
        self.reason = reason


def compare(
    variants: Mapping[str, Settings | None] | Sequence[Variant] = (),
    *,
    config: File | None = None,
    settings: Settings = (),
    seeds: int | Sequence[int] | None = None,
    output: File | None = None,
    file: File | None = None,
    runs: Mapping[str, File | Iterable[File]] | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    launcher: str | None = None,
    minutes: float | None = None,
    report_only: bool = False,
    records: File | None = None,
    baseline: str | None = None,
    target: float | None = None,
    metric: str | None = None,
    primary: str | None = None,
    at_epoch: int | None = None,
    smoothing: int | None = None,
    include_unfinished: bool = False,
    console: Console | None = None,
) -> Compared:
    """Run the missing runs of a comparison, each in its own process, and write the report.

    Args:
        variants: settings by name of the variant, in which ``config`` is the variant's own YAML file; empty: the
            variants of ``file``, or of the comparison that already is in ``output``.
        config: YAML file of all variants without their own; None: the demo's.
        settings: settings of all variants; a variant's own take precedence.
        seeds: number of seeds, or a list; None: 3.
        output: folder of the comparison.
        file: YAML file with all of this; arguments take precedence.
        runs: instead of running anything: run directories (or patterns such as ``runs/n*``) by name of the variant.
        jobs: number of runs at the same time; None: 1.
        threads: CPU threads per run; None: all, divided among the runs.
        launcher: command that starts a run on several GPUs.
        minutes: start no run after this many minutes; call again to continue.
        report_only: train nothing; report on the finished runs.
        records: folder for small records of the finished runs, with which the comparison can continue elsewhere.
        baseline: the variant that the others are compared with; None: the first.
        target: reward to reach; the time to it is measured; None: see docs/comparing.md.
        metric: the reward that ``target`` refers to, "training" (the default) or "heldout".
        primary: the measure that decides (docs/comparing.md); once there are runs, only a report can have another one.
        at_epoch: also compare the rewards after this many epochs.
        smoothing: epochs of the trailing mean; None: 5.
        include_unfinished: also use unfinished runs, as far as they have got.
        console: where progress is shown; None: stdout.

    Raises:
        UserError: an argument or configuration is invalid, or there is nothing to compare; :class:`RunsFailed` after
            the report if runs failed; :class:`NotFinished` if the time ran out.
        pcpo_fast.comparison.scheduling.Interrupted: stopped by a signal; calling again continues.
    """
    check_least(1, jobs=jobs, threads=threads, smoothing=smoothing, at_epoch=at_epoch)
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes: must be above 0, got {minutes:g}")
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    check_choice(get_args(Metric), metric=metric)
    check_choice(get_args(Primary), primary=primary)
    running = {"jobs": jobs, "threads": threads, "launcher": launcher, "minutes": minutes}
    texts = settings_texts(settings)
    if runs is not None:
        check_idle(
            "--runs compares existing runs",
            {"config": config, "variant": variants, "seeds": seeds, "file": file, **running}
            | {"records": records, "report-only": report_only, "key=value": texts},
        )
    elif report_only:
        check_idle("--report-only trains nothing", running)

    found = ComparisonFile()
    if runs is None and file is not None:
        found = read_plan_file(Path(file))
    elif runs is None and output is not None and not variants and (Path(output) / FILE).is_file():
        found = read_plan_file(Path(output) / FILE)  # of an earlier call
    chosen: dict[str, Any] = {"baseline": baseline, "metric": metric, "target": target}
    chosen |= {"at_epoch": at_epoch, "smoothing": smoothing, "primary": primary}
    chosen = {name: getattr(found, name) if value is None else value for name, value in chosen.items()}
    if found.tuning is not None and chosen["primary"] is None:
        chosen["primary"] = "heldout_area"
    reported = ComparisonSettings(**chosen, include_unfinished=include_unfinished, costs=found.costs)
    if runs is not None:
        if output is None:
            raise UserError(
                "--output: missing; give the folder of the comparison, for example --output runs/comparison"
            )
        return _written(compare_runs(_folders_of(runs), reported), Path(output))

    plan = _plan(found, variants, config, texts, seeds, output)
    names = [variant.name for variant in plan.variants]
    if reported.baseline is not None and reported.baseline not in names:
        raise UserError(f"--baseline: must be one of {', '.join(names)}, got {reported.baseline}")
    console = Console() if console is None else console
    how = None if report_only else HowToRun(jobs or 1, threads, launcher, until)
    reported = replace(reported, primary_before=_primary_before(plan.output, reported, how))
    search = None if plan.tuning is None else look(plan, reported)
    following = _following(plan, reported, search, how)
    with nullcontext() if how is None else only_one(plan.output) as lock:  # nothing is written before
        if how is not None:
            write_plan_file(plan, reported)
        try:
            return _run_and_report(plan, reported, search, following, how, lock, console)
        finally:
            if records is not None:
                new = write_small_records(plan.output, Path(records))
                say(console, f"records: {counted(len(new), 'finished run')} added to {os.fspath(records)}")


def _primary_before(folder: Path, reported: ComparisonSettings, how: HowToRun | None) -> Primary | None:
    """The primary measure that was named before there were runs.

    Raises:
        UserError: it is to be another one for further runs, after which nothing would record it.
    """
    if not any(any(folder.glob(f"{above}/seed_*/metrics.jsonl*")) for above in ("*", f"{TUNING}/*/*")):
        return reported.primary
    before = read_plan_file(folder / FILE).primary if (folder / FILE).is_file() else None
    if how is not None and reported.primary != before:
        known = f"as it was before there were runs in {folder}"
        if not (folder / FILE).is_file():
            known = f"since {folder} has runs but no {FILE}, which says what was named before them (copy it too)"
        raise UserError(
            f"--primary: must stay {before or 'unset'}, {known}, got {reported.primary or 'none'}; "
            "a report may use another one (--report-only), and says so"
        )
    return before


@dataclass(frozen=True)
class _Following:
    """The runs that come next.

    Attributes:
        planned: those that the search waits for, or else those of the comparison itself.
        left: those among them that have not finished; empty if nothing is trained.
    """

    planned: Sequence[PlannedRun]
    left: Sequence[PlannedRun]


def _following(
    plan: ComparisonPlan, reported: ComparisonSettings, search: Search | None, how: HowToRun | None
) -> _Following:
    """The runs that come next, checked once if they are to be trained.

    Raises:
        UserError: one of them cannot be trained.
    """
    if search is not None and search.waiting:
        found = _Following(search.waiting, search.waiting)  # whose folders the search has checked
    else:
        planned = planned_runs(plan) if search is None else planned_runs(tuned(plan, search), twins=True)
        found = _Following(planned, [] if how is None else check_folders(planned))
    if how is not None:
        _check(found.planned, reported)
    return found


def _run_and_report(
    plan: ComparisonPlan,
    reported: ComparisonSettings,
    search: Search | None,
    following: _Following,
    how: HowToRun | None,
    lock: int | None,
    console: Console,
) -> Compared:
    """Run what is left, unless `how` is None, and report; raises as :func:`compare`."""
    names = [variant.name for variant in plan.variants]
    if search is not None:
        waited, search = bool(search.waiting), _searched(plan, reported, search, how, lock, console)
        following = _following(plan, reported, search, how) if waited else following
        reported = replace(reported, notes=(*tuning_notes(plan, search), "All trials are in tuning.md."))
    planned, failures = following.planned, list[Failure]()
    if how is not None:
        done = len(planned) - len(following.left)
        failures = scheduling.run_all(_sized(following.left, how), done, plan.output, how, console, lock)
    try:
        trained = [run for run in planned if find_metrics(run.folder)]
        missing = [Missing(run.variant, run.seed, "has not been trained") for run in planned if run not in trained]
        curves = {name: [read_run(run.folder) for run in trained if run.variant == name] for name in names}
        compared = _written(compare_curves(curves, reported, missing), plan.output)
    except UserError as error:
        if failures:
            raise RunsFailed(failures, len(planned), None, str(error)) from None
        if how is None or time.monotonic() < how.until:
            raise
        raise NotFinished(str(error)) from None
    if failures:
        raise RunsFailed(failures, len(planned), compared)
    return compared


def _plan(
    file: ComparisonFile,
    variants: Mapping[str, Settings | None] | Sequence[Variant],
    config: File | None,
    settings: Sequence[str],
    seeds: int | Sequence[int] | None,
    output: File | None,
) -> ComparisonPlan:
    """The comparison from file and arguments; the arguments take precedence."""
    folder = output or file.output
    if folder is None:
        raise UserError("--output: missing; give the folder of the runs, for example --output runs/compare")
    if isinstance(variants, Mapping):
        variants = [_variant(name, own) for name, own in variants.items()]
    named = tuple(variants) or variants_of(file)
    if not named:
        raise UserError(
            f"there is nothing to compare: give variants with --variant 'NAME: key=value' or a --file; {folder} "
            "has no comparison to continue"
        )
    if config is not None and all(variant.config is not None for variant in named):
        raise UserError("--config: has no effect, because every variant has its own file: remove it")
    if seeds is not None:
        file = file.model_copy(update={"seeds": seeds if isinstance(seeds, int) else list(seeds)})
    path = os.fspath(config) if config is not None else file.config
    if path is None and any(variant.config is None for variant in named):
        path = DEFAULT_CONFIG
    shared, chosen = (*settings_from(file.settings), *settings), seeds_of(file)
    return ComparisonPlan(Path(folder), path, shared, named, chosen, tuning_of(file, chosen))


def _variant(name: str, own: Settings | None) -> Variant:
    config = None
    if isinstance(own, Mapping):
        config, own = own.get("config"), {key: value for key, value in own.items() if key != "config"}
    return Variant(name, None if config is None else os.fspath(config), tuple(settings_texts(own or ())))


def _folders_of(runs: Mapping[str, File | Iterable[File]]) -> dict[str, list[Path]]:
    """The run directories of each variant, patterns resolved."""
    groups: dict[str, list[Path]] = {}
    for name, folders in runs.items():
        check_name(name)
        groups[name] = []
        for folder in [folders] if isinstance(folders, str | os.PathLike) else folders:
            pattern = os.fspath(folder)
            if not any(sign in pattern for sign in "*?["):
                groups[name].append(Path(pattern))
                continue
            found = [Path(one) for one in sorted(glob.glob(pattern)) if find_metrics(Path(one))]
            if not found:
                raise UserError(f"--runs {f'{name}={pattern}'!r}: no run directory matches {pattern}")
            groups[name] += found
    return groups


def _searched(
    plan: ComparisonPlan,
    settings: ComparisonSettings,
    search: Search,
    how: HowToRun | None,
    lock: int | None,
    console: Console,
) -> Search:
    """Tune the variants as far as the time allows, and write the results; with ``how`` None nothing is trained.

    Raises:
        RunsFailed: runs failed before the tuning was finished.
        NotFinished: the tuning is not finished.
    """
    failures: list[Failure] = []
    count = 0
    while search.waiting and not failures and how is not None and time.monotonic() < how.until:
        count = len(search.waiting)
        say(console, f"tuning: {counted(count, 'run')} until the next choice")
        failures = scheduling.run_all(_sized(search.waiting, how), 0, plan.output, how, console, lock)
        search = look(plan, settings)
    paths = write_search(plan, settings, search)
    left = counted(len(search.waiting), "run")
    state = f"not finished, {left} left until the next choice" if search.waiting else "finished"
    say(console, f"tuning: {state} ({paths[1]}, {paths[0].name})")
    if search.waiting:
        raise RunsFailed(failures, count, None) if failures else NotFinished()
    return search


def _sized(runs: Sequence[PlannedRun], how: HowToRun) -> list[PlannedRun]:
    """Runs with common sizes; behind a launcher, how many ranks a run has is not known here."""
    from pcpo_fast.planning.sizes import gpu_memory

    return list(runs) if how.launcher is not None else with_common_sizes(runs, gpu_memory())


def _check(runs: Sequence[PlannedRun], settings: ComparisonSettings) -> None:
    """Check that the runs can be started, and measure what the comparison needs."""
    check_run_sizes(runs)
    blind = [run.name for run in runs if run.config.prompts.heldout is None]
    if blind and str(settings.primary).startswith("heldout"):
        raise UserError(f"primary: {settings.primary} needs held-out prompts, but {blind[0]} has no prompts.heldout")
    for run in runs:
        own = next((reward.name for reward in run.config.rewards if reward.name.startswith("__main__:")), None)
        if own is not None:
            raise UserError(
                f"variant {run.variant}: every run is a separate process, which cannot import {own}: put the reward "
                "into a file and refer to it as module:function"
            )


def _written(result: Comparison, folder: Path) -> Compared:
    record, report, page, *figures = write_comparison(result, folder)
    return Compared(result, report, record, page, tuple(figures))
