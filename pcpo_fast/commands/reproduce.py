"""``pcpo-fast reproduce check RUN``: check a run against an acceptance band."""

import argparse

EXAMPLES = """examples:
  pcpo-fast train && pcpo-fast reproduce check runs/demo
  pcpo-fast reproduce check runs/flux --band examples/8x80gb_flux_full/band.json --json

Exit code 0: inside the band; 1: outside; 3: the run has not trained long enough to tell."""

EXIT_CODES = {"inside": 0, "outside": 1, "undecided": 3}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "reproduce",
        help="check a run against what was published",
        description="Check a run against an acceptance band: published numbers, or this project's committed results.",
        epilog=EXAMPLES,
    )
    parser.add_argument("action", choices=("check",), help="what to do")
    parser.add_argument("run_directory", metavar="RUN", help="a run directory, finished or not")
    parser.add_argument("--band", metavar="FILE", help="the band (default: the one in examples/ for the configuration)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the verdict, and return it as the exit code."""
    import json
    from pathlib import Path

    from pcpo_fast.reproduction.checking import check_run

    result = check_run(Path(arguments.run_directory), None if arguments.band is None else Path(arguments.band))
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print(
            f"{result['name']} ({result['band']}){'' if result['verified'] else ', unverified: nobody has run it yet'}"
        )
        for point in result["points"]:
            print(f"  {point['verdict']:9}  {point['says']}")
        print(f"{result['run']}: {result['verdict']}. Source: {result['source']}")
    return EXIT_CODES[result["verdict"]]
