"""The command line: ``pcpo-fast COMMAND``; a user's mistake is one sentence and exit code 2, never a traceback."""

import argparse
import os
import sys
from collections.abc import Sequence

from pcpo_fast import __version__
from pcpo_fast.commands import credit, export, report, sample, train
from pcpo_fast.errors import UserError

COMMANDS = (train, sample, credit, report, export)
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="pcpo-fast",
        description="Align text-to-image models with rewards: proportionate credit, fused kernels, DeepSpeed.",
        epilog="example:\n  pcpo-fast train            the demo: tiny FLUX on a CPU, in about two minutes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pcpo-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    # transformers reports at import what it does without; none of it concerns this program.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        # Every rank meets the same mistake; one of them says so.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (``| head``): no more to say, and nothing to flush into.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
