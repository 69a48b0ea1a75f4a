"""``pcpo-fast step-gradients``: what per-step credit does to the mean gradient, on frozen weights."""

import argparse
from typing import TYPE_CHECKING, Any

from pcpo_fast.commands import add_settings, show_results

if TYPE_CHECKING:
    from pcpo_fast.training.step_gradients import GradientComparison

EXAMPLES = """examples:
  pcpo-fast step-gradients runs/demo --rollouts 16
  pcpo-fast step-gradients runs/demo advantage.steps=gain advantage.gain_lambda=0.5 --epoch 30 --json
  pcpo-fast step-gradients --config configs/tiny_flux.yaml         the base model

A cosine near 1 says that the mean gradient points where that of the final advantage points. docs/stepwise.md explains
the numbers."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "step-gradients",
        help="compare the mean gradients of final, baseline and gain credit",
        description="Compare the mean gradients of final, baseline and gain credit on the frozen weights of a run.",
        epilog=EXAMPLES,
    )
    # One list for both, since argparse would take the first setting for the run where there is none.
    add_settings(parser, "run directory or checkpoint (none: the base model of --config), and settings that win")
    parser.add_argument("--config", metavar="FILE", help="YAML configuration of the base model, instead of a run")
    parser.add_argument("--epoch", type=int, help="checkpoint after this many epochs (default: the newest)")
    parser.add_argument(
        "--rollouts", type=int, default=8, metavar="K", help="rollouts to take gradients of (default 8)"
    )
    parser.add_argument(
        "--warm-up", type=int, default=2, metavar="K", help="rollouts before them, for the slopes (default 2)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print a table."""
    import json
    import sys
    from pathlib import Path

    import torch

    from pcpo_fast.config.loading import load_config
    from pcpo_fast.errors import UserError
    from pcpo_fast.runs.checkpoint import WEIGHTS, read_state
    from pcpo_fast.runs.exporting import find_checkpoint
    from pcpo_fast.training.step_gradients import measure_gradients

    for name, least in (("rollouts", 3), ("warm_up", 1)):
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option}: must be at least {least}, got {getattr(arguments, name)}")
    folders = [text for text in arguments.settings if "=" not in text]
    settings = [text for text in arguments.settings if "=" in text]
    if len(folders) + (arguments.config is not None) != 1:
        raise UserError("step-gradients needs either one run directory (or checkpoint) or --config FILE")
    weights, epoch = None, 0
    if folders:
        checkpoint = find_checkpoint(Path(folders[0]), arguments.epoch)
        weights, epoch = checkpoint / WEIGHTS, int(read_state(checkpoint)["epoch"])
        config = load_config(checkpoint.absolute().parent.parent / "config.yaml", settings)
    elif arguments.epoch is not None:
        raise UserError("--epoch: chooses a checkpoint of a run, and --config names none")
    else:
        config = load_config(arguments.config, settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure_gradients(
        config, weights, epoch, arguments.rollouts, arguments.warm_up, device, lambda text: print(text, file=sys.stderr)
    )
    if arguments.json:
        print(json.dumps(_record(found, epoch), indent=1, allow_nan=False))
    else:
        _print(found)
    return 0


def _record(found: "GradientComparison", epoch: int) -> dict[str, Any]:
    from pcpo_fast.training.step_gradients import KINDS

    def known(values: Any) -> Any:
        if isinstance(values, list):
            return [known(value) for value in values]
        return values if values == values else None

    return {
        "epoch": epoch,
        "rollouts": found.rollouts,
        "kinds": list(KINDS),
        "cosines": known(found.cosines.tolist()),
        "standard_errors": known(found.errors.tolist()),
        "towards_final": known(found.towards_final.tolist()),
    }


def _print(found: "GradientComparison") -> None:
    from rich.console import Console

    from pcpo_fast.reporting.tables import Grid
    from pcpo_fast.training.step_gradients import KINDS

    def text(value: float, error: float | None = None) -> str:
        if value != value:
            return "noise"
        return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"

    rows = tuple(
        (
            kind,
            *(
                text(value, error) if index != other else "1"
                for other, (value, error) in enumerate(
                    zip(found.cosines[index].tolist(), found.errors[index].tolist(), strict=True)
                )
            ),
            text(float(found.towards_final[index])),
        )
        for index, kind in enumerate(KINDS)
    )
    header = ("cosine of mean gradients", *KINDS, "one rollout with final's mean")
    lines = ["± standard error over rollouts (jackknife); noise: too few rollouts to tell the gradient from its noise"]
    title = f"Gradients of per-step credit, {found.rollouts} rollouts"
    show_results(Console(), [Grid(title, header, rows)], lines)
