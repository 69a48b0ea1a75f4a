"""``pcpo-fast report``: write a run's report.html."""

import argparse


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "report",
        help="write report.html of a run",
        description="Write report.html from a run directory, finished or not.",
        epilog="example:\n  pcpo-fast report runs/demo",
    )
    parser.add_argument("run_directory", metavar="RUN", help="run directory")
    parser.add_argument("--json", action="store_true", help="print the path and the summary as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the report and print its path."""
    import json
    from pathlib import Path

    from pcpo_fast.errors import UserError
    from pcpo_fast.reporting.metrics_file import read_metrics
    from pcpo_fast.reporting.report import write_report
    from pcpo_fast.reporting.summary import summarize_run

    folder = Path(arguments.run_directory)
    try:
        path = write_report(folder)
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written: {error.strerror or error}") from None
    if arguments.json:
        metrics = folder / "metrics.jsonl"
        summary = summarize_run(read_metrics(metrics) if metrics.exists() else [])
        print(json.dumps({"report": str(path), "summary": summary}))
    else:
        print(f"Report: {path}")
    return 0
