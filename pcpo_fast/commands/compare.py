"""``pcpo-fast compare``: run several configurations over several seeds and compare how fast they learn."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pcpo_fast.commands import add_settings, show_results, values_of
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import EXIT_INTERRUPTED, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from pcpo_fast.interface.comparing import Compared

EXAMPLES = """examples:
  pcpo-fast compare --variant "native: algorithm=dancegrpo" --variant "pcpo:" --seeds 5 --output runs/compare
  pcpo-fast compare --config configs/tiny_flux.yaml --output runs/objectives --jobs 2 --target 0.85 \\
      --variant "clip: credit.objective=clip" --variant "hinge: credit.objective=hinge" train.epochs=100
  pcpo-fast compare --output runs/two-files --variant "native: native.yaml" --variant "pcpo: pcpo.yaml"
  pcpo-fast compare --file comparison.yaml                       all of this in a file
  pcpo-fast compare --output runs/compare                        continue the comparison
  pcpo-fast compare --output runs/compare --report-only          only the report, on the finished runs
  pcpo-fast compare --output runs/flux ... --launcher "deepspeed --num_gpus 8"
  pcpo-fast compare --output report --runs "native=runs/n*" --runs "pcpo=runs/p0,runs/p1"      runs made elsewhere

Every run is an ordinary run directory OUTPUT/NAME/seed_S. The command can be interrupted or killed at any time;
calling it again continues. It writes comparison.html, comparison.md, comparison.json and figures/ into OUTPUT, which
docs/comparing.md explains."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "compare",
        help="run configurations over seeds and compare them",
        description="Run several configurations over several seeds, and report which of them learns faster.",
        epilog=EXAMPLES,
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument("--config", metavar="FILE", help="YAML configuration of all variants that do not name their own")
    what.add_argument(
        "--variant",
        dest="variants",
        action="append",
        default=[],
        metavar="'NAME: [FILE] key=value ...'",
        help="a variant: its name, then its own configuration file or settings or both; repeat for each",
    )
    what.add_argument("--seeds", metavar="N|LIST", help="number of seeds, or a list such as 3,7,11 (default 3)")
    what.add_argument("--output", metavar="FOLDER", help="folder of the comparison")
    what.add_argument("--file", metavar="FILE", help="YAML file with output, config, variants, seeds, ...")
    what.add_argument(
        "--runs", action="append", default=[], metavar="NAME=RUN,RUN", help="compare existing run directories"
    )
    running = parser.add_argument_group("how it is run")
    running.add_argument("--jobs", type=int, metavar="N", help="runs at the same time (default 1)")
    running.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of each run (default: all cores, divided among the jobs)"
    )
    running.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="starts a run on several GPUs; {slot} and {port} become a number and a port of its own",
    )
    running.add_argument(
        "--minutes", type=float, metavar="M", help="start no run after M minutes; call again to continue"
    )
    running.add_argument("--report-only", action="store_true", help="train nothing; report on the finished runs")
    running.add_argument(
        "--records",
        metavar="FOLDER",
        help="copy what the comparison needs from finished runs to FOLDER, to continue it elsewhere",
    )
    report = parser.add_argument_group("what is reported")
    report.add_argument("--baseline", metavar="NAME", help="what the others are compared with (default: the first)")
    report.add_argument(
        "--target", type=float, metavar="R", help="reward to reach; the time to it is measured (default: see docs)"
    )
    report.add_argument(
        "--metric", metavar="{training,heldout}", help="the reward that --target refers to (default training)"
    )
    report.add_argument(
        "--primary",
        metavar="MEASURE",
        help="the measure that decides: heldout_area, heldout_final, reward_over_epochs, reward_final",
    )
    report.add_argument("--at-epoch", type=int, metavar="E", help="also compare the rewards after E epochs")
    report.add_argument("--smoothing", type=int, metavar="K", help="epochs of the trailing mean (default 5)")
    report.add_argument(
        "--include-unfinished", action="store_true", help="also use unfinished runs, as far as they have got"
    )
    report.add_argument("--json", action="store_true", help="print comparison.json at the end")
    add_settings(parser, "settings of all variants (a variant's own take precedence)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the missing runs, and report."""
    from rich.console import Console

    from pcpo_fast.comparison.scheduling import Interrupted
    from pcpo_fast.comparison.variants import parse_seeds, parse_variant
    from pcpo_fast.interface.comparing import NotFinished, RunsFailed, compare

    console = Console(stderr=arguments.json)  # with --json, stdout carries only the JSON
    try:
        compared = compare(
            **values_of(arguments)
            | {
                "variants": tuple(map(parse_variant, arguments.variants)),
                "seeds": None if arguments.seeds is None else parse_seeds(arguments.seeds),
                "runs": _groups(arguments.runs) or None,
                "console": console,
            }
        )
    except Interrupted as interrupt:
        print(f"{interrupt}: `pcpo-fast compare --output {interrupt.folder}` continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    except RunsFailed as failed:
        print(f"error: {failed}", file=sys.stderr)
        if failed.compared is not None:
            _say(failed.compared, console, as_json=arguments.json)
        elif failed.reason:
            print(f"error: {failed.reason}", file=sys.stderr)
        return failed.exit_code
    except NotFinished as unfinished:
        if unfinished.reason:
            print(f"error: {unfinished.reason}", file=sys.stderr)
        return 0
    _say(compared, console, as_json=arguments.json)
    return 0


def _groups(texts: Sequence[str]) -> dict[str, list[str]]:
    """``NAME=RUN,RUN`` of every ``--runs``."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        name, separator, folders = text.partition("=")
        if not (separator and name and folders):
            raise UserError(f"--runs {text!r}: must have the form NAME=RUN,RUN, for example native=runs/n0,runs/n1")
        groups.setdefault(name, []).extend(part.strip() for part in folders.split(","))
    return groups


def _say(compared: "Compared", console: "Console", *, as_json: bool) -> None:
    import json

    from pcpo_fast.comparison.analysis import missing_lines
    from pcpo_fast.comparison.comparison_tables import about_decisions, decision_table, main_table
    from pcpo_fast.comparison.record import comparison_record, notes

    result = compared.result
    if as_json:
        print(json.dumps(comparison_record(result), indent=1, allow_nan=False))
    lines = [f"not included: {line}" for line in missing_lines(result.missing)]
    lines += [about_decisions(result)] if result.decisions else []
    if result.settings.target is None and result.reading.target is not None:
        lines.append(f"target: {result.target_source}")
    lines += notes(result)
    figures = f"{counted(len(compared.figures), 'figure')} in {compared.report.parent / 'figures'}"
    lines.append(f"Page: {compared.page}")
    lines.append(f"Report: {compared.report}, {compared.record.name} and {figures}")
    tables = [main_table(result), *([decision_table(result)] if result.decisions else [])]
    show_results(console, tables, lines)
