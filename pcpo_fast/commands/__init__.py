"""One file per command; each has ``add_parser`` and ``run``, and does slow imports only in ``run``."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcpo_fast.config.presets import DEFAULT_CONFIG

if TYPE_CHECKING:
    from rich.console import Console

    from pcpo_fast.config.schema import Config
    from pcpo_fast.reporting.tables import Grid


def add_settings(parser: argparse.ArgumentParser, what: str = "settings that take precedence over the file") -> None:
    """Add positional ``key.subkey=value`` arguments, stored as ``settings``."""
    parser.add_argument("settings", nargs="*", metavar="key.subkey=value", help=what)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, which has the demo's configuration as its default."""
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help=f"YAML file, or a name of `pcpo-fast configs` (default: {DEFAULT_CONFIG})",
    )


def add_run_or_config(parser: argparse.ArgumentParser) -> None:
    """Add what names frozen weights: a run, or the base model of a configuration, and settings."""
    # One list for both, since argparse would take the first setting for the run where there is none.
    add_settings(parser, "run directory or checkpoint (none: the base model of --config), and settings")
    parser.add_argument("--config", metavar="FILE", help="YAML configuration of the base model, instead of a run")
    parser.add_argument("--epoch", type=int, help="checkpoint after this many epochs (default: the newest)")


def run_or_config(
    command: str, arguments: argparse.Namespace, further: Sequence[str] = ()
) -> "tuple[Config, Path | None, int]":
    """The configuration, the trained weights (None: the base model) and their epoch.

    Args:
        command: its name, for messages.
        arguments: of :func:`add_run_or_config`.
        further: settings that take precedence over all others.

    Raises:
        UserError: there is not exactly one run or configuration, or it cannot be read.
    """
    from pcpo_fast.config.loading import load_config
    from pcpo_fast.errors import UserError
    from pcpo_fast.runs.checkpoint import WEIGHTS, read_state
    from pcpo_fast.runs.exporting import find_checkpoint

    folders = [text for text in arguments.settings if "=" not in text]
    settings = [*(text for text in arguments.settings if "=" in text), *further]
    if len(folders) + (arguments.config is not None) != 1:
        raise UserError(f"{command} needs either one run directory (or checkpoint) or --config FILE")
    if folders:
        checkpoint = find_checkpoint(Path(folders[0]), arguments.epoch)
        config = load_config(checkpoint.absolute().parent.parent / "config.yaml", settings)
        return config, checkpoint / WEIGHTS, int(read_state(checkpoint)["epoch"])
    if arguments.epoch is not None:
        raise UserError("--epoch: selects a checkpoint of a run, so it cannot be combined with --config")
    return load_config(arguments.config, settings), None, 0


def values_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments for the interface function, which are named like the options."""
    return {name: value for name, value in vars(arguments).items() if name not in ("run", "json", "local_rank")}


def show_results(console: "Console", tables: "Iterable[Grid]", lines: Iterable[str]) -> None:
    """Print tables, then lines of text."""
    from pcpo_fast.reporting.progress import say

    if not console.is_terminal:
        console.width = 240  # a table in a file or pipe is not cut into narrow columns
    for table in tables:
        console.print(table.rich())
    for line in lines:
        say(console, line)
