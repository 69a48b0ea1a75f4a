"""``pcpo-fast step-gradients``: what per-step credit does to the mean gradient, on frozen weights."""

import argparse
from typing import TYPE_CHECKING, Any

from pcpo_fast.commands import add_run_or_config, run_or_config, show_results
from pcpo_fast.config.wording import counted

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
    add_run_or_config(parser)
    parser.add_argument(
        "--rollouts", type=int, default=8, metavar="K", help="rollouts whose gradients are measured (default 8)"
    )
    parser.add_argument(
        "--warm-up", type=int, default=2, metavar="K", help="rollouts before these, to estimate the slopes (default 2)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print a table."""
    import json
    import sys

    from pcpo_fast.config.arguments import check_least
    from pcpo_fast.distributed.collectives import lone_device
    from pcpo_fast.training.step_gradients import measure_gradients

    check_least(3, rollouts=arguments.rollouts)
    check_least(1, warm_up=arguments.warm_up)
    config, weights, epoch = run_or_config("step-gradients", arguments)
    rollouts, warm_up = arguments.rollouts, arguments.warm_up
    found = measure_gradients(
        config, weights, epoch, rollouts, warm_up, lone_device(), lambda text: print(text, file=sys.stderr)
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
    title = f"Gradients of per-step credit, {counted(found.rollouts, 'rollout')}"
    show_results(Console(), [Grid(title, header, rows)], lines)
