"""``pcpo-fast compare``: several configurations over several seeds, and which of them learns faster."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from pcpo_fast.comparison.analysis import Comparison, ComparisonSettings
    from pcpo_fast.comparison.comparison_file import ComparisonFile
    from pcpo_fast.comparison.scheduling import Failure, HowToRun
    from pcpo_fast.comparison.tuning import Search
    from pcpo_fast.comparison.variants import ComparisonPlan, PlannedRun

PRIMARIES = ("heldout_area", "heldout_final", "reward_over_epochs", "reward_final")

EXAMPLES = """examples:
  pcpo-fast compare --variant "native: algorithm=dancegrpo" --variant "pcpo:" --seeds 5 --output runs/compare
  pcpo-fast compare --config configs/tiny_flux.yaml --output runs/objectives --jobs 2 --target 0.85 \\
      --variant "clip: credit.objective=clip" --variant "hinge: credit.objective=hinge" train.epochs=100
  pcpo-fast compare --output runs/two-files --variant "native: native.yaml" --variant "pcpo: pcpo.yaml"
  pcpo-fast compare --file comparison.yaml                       all of this in a file
  pcpo-fast compare --output runs/compare                        go on with what is there
  pcpo-fast compare --output runs/compare --report-only          the report alone, of the runs that are finished
  pcpo-fast compare --output runs/flux ... --launcher "deepspeed --num_gpus 8"
  pcpo-fast compare --output report --runs "native=runs/n*" --runs "pcpo=runs/p0,runs/p1"      runs made elsewhere

Every run is an ordinary run directory OUTPUT/NAME/seed_S. The command may be interrupted or killed at any time: called
again it goes on. It writes comparison.md, comparison.json and figures/ into OUTPUT. docs/comparing.md explains them."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "compare",
        help="run configurations over seeds and compare them",
        description="Run several configurations over several seeds, and report which of them learns faster.",
        epilog=EXAMPLES,
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument("--config", metavar="FILE", help="YAML configuration of all variants that name none of their own")
    what.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="'NAME: [FILE] key=value ...'",
        help="a variant: its name, then its own configuration file or settings or both; repeat for each",
    )
    what.add_argument("--seeds", metavar="N|LIST", help="number of seeds, or a list such as 3,7,11 (default 3)")
    what.add_argument("--output", metavar="FOLDER", help="folder of the comparison")
    what.add_argument("--file", metavar="FILE", help="YAML file with output, config, variants, seeds, ...")
    what.add_argument(
        "--runs", action="append", default=[], metavar="NAME=RUN,RUN", help="compare run directories that are there"
    )
    running = parser.add_argument_group("how it is run")
    running.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default 1)")
    running.add_argument("--threads", type=int, metavar="N", help="CPU threads of each (default: divided among them)")
    running.add_argument(
        "--launcher", metavar="COMMAND", help="starts a run on several GPUs; {slot} and {port} differ between jobs"
    )
    running.add_argument("--minutes", type=float, metavar="M", help="begin no run after M minutes; call again to go on")
    running.add_argument("--report-only", action="store_true", help="train nothing; report what is finished")
    report = parser.add_argument_group("what is reported")
    report.add_argument("--baseline", metavar="NAME", help="what the others are compared with (default: the first)")
    report.add_argument("--target", type=float, metavar="R", help="reward whose reaching is timed (default: see docs)")
    report.add_argument(
        "--metric", choices=("training", "heldout"), help="the reward that is meant by --target (default training)"
    )
    report.add_argument(
        "--primary", metavar="MEASURE", choices=PRIMARIES, help=f"the measure that decides: {', '.join(PRIMARIES)}"
    )
    report.add_argument("--at-epoch", type=int, metavar="E", help="also compare the rewards after E epochs")
    report.add_argument("--smoothing", type=int, metavar="K", help="epochs of the trailing mean (default 5)")
    report.add_argument("--include-unfinished", action="store_true", help="use unfinished runs as far as they are")
    report.add_argument("--json", action="store_true", help="print comparison.json at the end")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.subkey=value", help="settings of all variants (a variant's own win)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing, and report."""
    from rich.console import Console

    from pcpo_fast.errors import UserError

    for name in ("jobs", "threads", "smoothing", "at_epoch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {value}")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise UserError(f"--minutes: must be above 0, got {arguments.minutes:g}")
    console = Console(stderr=arguments.json)  # with --json, stdout is for the program that reads it
    if arguments.runs:
        return _compare_existing(arguments, console)
    file = _file(arguments)
    plan, settings = _plan(arguments, file), _settings(arguments, file)
    names = [variant.name for variant in plan.variants]
    if settings.baseline is not None and settings.baseline not in names:
        raise UserError(f"--baseline: must be one of {', '.join(names)}, got {settings.baseline}")
    from pcpo_fast.comparison.scheduling import HowToRun, Interrupted
    from pcpo_fast.comparison.variants import planned_runs

    until = math.inf if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    how = None if arguments.report_only else HowToRun(arguments.jobs, arguments.threads, arguments.launcher, until)
    try:
        if plan.tuning is not None:
            search, code = _search(plan, settings, how, console)
            if search.waiting:
                return code
            from pcpo_fast.comparison.tuning import tuned, tuning_notes

            runs = planned_runs(tuned(plan, search), twins=True)
            settings = replace(settings, notes=tuning_notes(plan, search))
        else:
            runs = planned_runs(plan)
        code = 0 if how is None else _train(plan, settings, runs, how, console)
    except Interrupted as interrupt:
        print(f"{interrupt}: `pcpo-fast compare --output {plan.output}` goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    try:
        result = _read(runs, settings)
    except UserError as error:
        if code == 0 and time.monotonic() < until:
            raise
        print(f"error: {error}", file=sys.stderr)  # after those that failed, of which one may be a fault of ours
        return code
    return _report(arguments, result, plan.output, console, code)


EXIT_INTERRUPTED = 130


def _search(
    plan: "ComparisonPlan", settings: "ComparisonSettings", how: "HowToRun | None", console: "Console"
) -> "tuple[Search, int]":
    """Tune the variants as far as the time allows, and write what was found; `how`: None trains nothing."""
    from pcpo_fast.comparison.comparison_file import write_plan_file
    from pcpo_fast.comparison.scheduling import run_all
    from pcpo_fast.comparison.tuning import look, write_search

    search, code = look(plan, settings), 0
    _check_primary(search.waiting, settings)
    if how is not None:
        write_plan_file(plan, settings)
    while search.waiting and code == 0 and how is not None and time.monotonic() < how.until:
        console.print(f"tuning: {len(search.waiting)} runs before the next choice", highlight=False)
        code = _failed(run_all(search.waiting, 0, plan.output, how, console), len(search.waiting))
        search = look(plan, settings)
    paths = write_search(plan, settings, search)
    state = f"not over, {len(search.waiting)} runs are left before the next choice" if search.waiting else "over"
    console.print(f"tuning: {state} ({paths[1]}, {paths[0].name})", markup=False, highlight=False, soft_wrap=True)
    return search, code


def _train(
    plan: "ComparisonPlan",
    settings: "ComparisonSettings",
    runs: "Sequence[PlannedRun]",
    how: "HowToRun",
    console: "Console",
) -> int:
    from pcpo_fast.comparison.comparison_file import write_plan_file
    from pcpo_fast.comparison.scheduling import check_folders, run_all

    left = check_folders(runs)
    _check_primary(runs, settings)
    write_plan_file(plan, settings)
    return _failed(run_all(left, len(runs) - len(left), plan.output, how, console), len(runs))


def _check_primary(runs: "Sequence[PlannedRun]", settings: "ComparisonSettings") -> None:
    from pcpo_fast.errors import UserError

    blind = [run.name for run in runs if run.config.prompts.heldout is None]
    if blind and str(settings.primary).startswith("heldout"):
        raise UserError(f"primary: {settings.primary} needs held-out prompts, and {blind[0]} has no prompts.heldout")


def _failed(failures: "Sequence[Failure]", count: int) -> int:
    """Name the runs that failed; returns the exit code."""
    if failures:
        named = ", ".join(f"{failure.run.name} (log: {failure.run.log})" for failure in failures)
        print(f"error: {len(failures)} of {count} runs failed: {named}", file=sys.stderr)
    return 0 if not failures else 2 if all(failure.code == 2 for failure in failures) else 1


def _read(runs: "Sequence[PlannedRun]", settings: "ComparisonSettings") -> "Comparison":
    from pcpo_fast.comparison.analysis import Missing, compare
    from pcpo_fast.comparison.reading import RunCurves, read_run

    found: dict[str, list[RunCurves]] = {run.variant: [] for run in runs}
    missing: list[Missing] = []
    for run in runs:
        if (run.folder / "metrics.jsonl").is_file():
            found[run.variant].append(read_run(run.folder))
        else:
            missing.append(Missing(run.variant, run.seed, "has not been trained"))
    return compare(found, settings, missing)


def _compare_existing(arguments: argparse.Namespace, console: "Console") -> int:
    from pcpo_fast.comparison import compare_runs
    from pcpo_fast.comparison.variants import check_name
    from pcpo_fast.errors import UserError

    for name in ("config", "variant", "seeds", "file", "launcher", "overrides"):
        if getattr(arguments, name):
            given = "key=value" if name == "overrides" else f"--{name}"
            raise UserError(f"--runs compares runs that are there, so it does not go with {given}")
    if arguments.output is None:
        raise UserError("--output: say where the comparison is written to, for example --output runs/comparison")
    groups: dict[str, list[Path]] = {}
    for text in arguments.runs:
        name, separator, folders = text.partition("=")
        if not (separator and name and folders):
            raise UserError(f"--runs {text!r}: is written NAME=RUN,RUN, for example native=runs/n0,runs/n1")
        check_name(name)
        groups.setdefault(name, []).extend(path for part in folders.split(",") for path in _folders(part.strip(), text))
    return _report(arguments, compare_runs(groups, _settings(arguments, _empty())), Path(arguments.output), console, 0)


def _folders(pattern: str, text: str) -> list[Path]:
    import glob

    from pcpo_fast.errors import UserError

    if not any(sign in pattern for sign in "*?["):
        return [Path(pattern)]
    found = [Path(name) for name in sorted(glob.glob(pattern)) if Path(name, "metrics.jsonl").is_file()]
    if not found:
        raise UserError(f"--runs {text!r}: no run directory is called {pattern}")
    return found


def _report(arguments: argparse.Namespace, result: "Comparison", folder: Path, console: "Console", code: int) -> int:
    import json

    from pcpo_fast.comparison.record import comparison_record, notes
    from pcpo_fast.comparison.tables import decision_table, main_table, missing_lines
    from pcpo_fast.comparison.writing import write_comparison

    paths = write_comparison(result, folder)
    if arguments.json:
        print(json.dumps(comparison_record(result), indent=1, allow_nan=False))
    if not console.is_terminal:
        console.width = 240  # a table in a file or pipe is not cut into narrow columns
    console.print(main_table(result).rich())
    if result.decisions:
        console.print(decision_table(result).rich())
    lines = [f"not in these numbers: {line}" for line in missing_lines(result)]
    if result.settings.target is None and result.reading.target is not None:
        lines.append(f"target: {result.target_source}")
    lines += notes(result)
    lines.append(f"Report: {paths[1]}, {paths[0].name} and {len(paths) - 2} figures in {folder / 'figures'}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return code


def _empty() -> "ComparisonFile":
    from pcpo_fast.comparison.comparison_file import ComparisonFile

    return ComparisonFile()


def _file(arguments: argparse.Namespace) -> "ComparisonFile":
    """The file that was named, or the one that an earlier call left in the output folder, or nothing."""
    from pcpo_fast.comparison.comparison_file import FILE, read_plan_file

    if arguments.file is not None:
        return read_plan_file(Path(arguments.file))
    if arguments.output is not None and not arguments.variant and (Path(arguments.output) / FILE).is_file():
        return read_plan_file(Path(arguments.output) / FILE)
    return _empty()


def _plan(arguments: argparse.Namespace, file: "ComparisonFile") -> "ComparisonPlan":
    """The comparison as file and command line say; the command line wins."""
    from pcpo_fast.comparison.comparison_file import seeds_of, tuning_of, variants_of
    from pcpo_fast.comparison.variants import ComparisonPlan, parse_seeds, parse_variant, settings_from
    from pcpo_fast.config.presets import DEFAULT_CONFIG
    from pcpo_fast.errors import UserError

    output = arguments.output or file.output
    if output is None:
        raise UserError("--output: say where the runs go, for example --output runs/compare")
    variants = tuple(map(parse_variant, arguments.variant)) or variants_of(file)
    if not variants:
        raise UserError(
            f"there is nothing to compare: name variants with --variant 'NAME: key=value', or a --file; {output} holds "
            "no comparison to go on with"
        )
    seeds = seeds_of(file) if arguments.seeds is None else parse_seeds(arguments.seeds)
    config = arguments.config or file.config
    if config is None and any(variant.config is None for variant in variants):
        config = DEFAULT_CONFIG
        if not Path(config).is_file():
            raise UserError(f"there is no {config} here; run from the project's folder, or name a file with --config")
    shared = (*settings_from(file.settings), *arguments.overrides)
    return ComparisonPlan(Path(output), config, shared, variants, seeds, tuning_of(file, seeds))


def _settings(arguments: argparse.Namespace, file: "ComparisonFile") -> "ComparisonSettings":
    from pcpo_fast.comparison.analysis import ComparisonSettings
    from pcpo_fast.comparison.measures import Costs

    def chosen(name: str) -> object:
        given = getattr(arguments, name)
        return getattr(file, name) if given is None else given

    names = ("target", "metric", "baseline", "at_epoch", "smoothing", "primary")
    settings = ComparisonSettings(
        **{name: chosen(name) for name in names},  # type: ignore[arg-type]
        include_unfinished=arguments.include_unfinished,
        costs=Costs(**file.costs.model_dump()),
    )
    if file.tuning is not None and settings.primary is None:
        return replace(settings, primary="heldout_area")
    return settings
