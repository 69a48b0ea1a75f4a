"""One file per command; each has ``add_parser`` and ``run``, and does slow imports only in ``run``."""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from pcpo_fast.reporting.tables import Grid


def add_settings(parser: argparse.ArgumentParser, what: str = "settings that win over the file") -> None:
    """Add positional ``key.subkey=value`` arguments, stored as ``settings``."""
    parser.add_argument("settings", nargs="*", metavar="key.subkey=value", help=what)


def values_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments for the interface function, which are named like the options."""
    return {name: value for name, value in vars(arguments).items() if name not in ("run", "json", "local_rank")}


def show_results(console: "Console", tables: "Iterable[Grid]", lines: Iterable[str]) -> None:
    """Print tables, then lines of text."""
    if not console.is_terminal:
        console.width = 240  # a table in a file or pipe is not cut into narrow columns
    for table in tables:
        console.print(table.rich())
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
