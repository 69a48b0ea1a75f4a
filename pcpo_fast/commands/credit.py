"""``pcpo-fast credit``: the credit of each step of a sampler."""

import argparse
from typing import TYPE_CHECKING, Any, get_args

from pcpo_fast.config.credit_rules import CREDIT_RULES
from pcpo_fast.config.sampler_registry import SAMPLERS, Kind, Variance, listed, samplers_of, samplers_taking
from pcpo_fast.config.wording import counted

if TYPE_CHECKING:
    from pcpo_fast.method.transitions import Transitions

EXAMPLES = """examples:
  pcpo-fast credit --sampler dance --steps 16 --noise 0.3 --shift 3
  pcpo-fast credit --sampler flow --steps 10 --noise 0.7 --plot credit.png
  pcpo-fast credit --sampler ddim --steps 50 --eta 1 --json
  pcpo-fast credit --sampler ddim --steps 50 --variance reshaped --weight 4.5"""

OPTIONS = ("noise", "shift", "eta", "variance", "weight")
"""Options that apply to some samplers only; the noise level is called ``noise`` or ``eta``, as in the literature."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "credit",
        help="show native and proportionate credit per step",
        description="Show native and proportionate credit per step of a sampler.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), default="dance")
    parser.add_argument("--steps", type=int, default=16, help="denoising steps (default 16)")
    shifted, varied = listed(samplers_taking("shift"), "and"), listed(samplers_taking("variance"))
    parser.add_argument("--noise", type=float, help=f"noise level of {_usual_noise('flow')}")
    parser.add_argument("--shift", type=float, help=f"time shift of {shifted} (default 3)")
    parser.add_argument("--eta", type=float, help=f"noise level of {_usual_noise('diffusion')}")
    parser.add_argument("--variance", choices=get_args(Variance), help=f"{varied}'s variance (default native)")
    parser.add_argument("--weight", type=float, help="credit that a reshaped or exact variance gives every step")
    parser.add_argument(
        "--rule",
        choices=tuple(CREDIT_RULES),
        default="proportionate",
        help="credit rule to show as well, for example grpo_guard",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the table")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def _usual_noise(kind: Kind) -> str:
    first, *others = samplers_of(kind)
    names = [f"{first} (default {SAMPLERS[first].noise:g})", *(f"{name} ({SAMPLERS[name].noise:g})" for name in others)]
    return listed(names)


def run(arguments: argparse.Namespace) -> int:
    """Print the table, and plot it if requested."""
    import json
    from pathlib import Path

    from pcpo_fast.errors import UserError
    from pcpo_fast.method.credit import credit_record, credit_table

    try:
        transitions = _transitions(arguments)
        record = credit_record(arguments.sampler, transitions, credit_table(transitions, arguments.rule))
    except ValueError as error:
        raise UserError(f"credit: {error}") from None
    if arguments.plot is not None:
        from pcpo_fast.reporting.plots import credit_figure, save_figure

        title = f"{arguments.sampler}, {counted(arguments.steps, 'step')}"
        columns = (record["times"], record["native"], record["proportionate"], record["zeta"], title)
        figure = credit_figure(*columns, used=record["used"], used_label=record["rule"])
        try:
            save_figure(figure, Path(arguments.plot))
        except (OSError, ValueError) as error:
            raise UserError(f"--plot {arguments.plot}: cannot be written: {error}") from None
    if arguments.json:
        print(json.dumps(record))
    else:
        _print_table(record)
        if arguments.plot is not None:
            print(f"Plot: {arguments.plot}")
    return 0


def _transitions(arguments: argparse.Namespace) -> "Transitions":
    from pcpo_fast.errors import UserError
    from pcpo_fast.method.transitions import ddim_timesteps, shifted_times, stable_diffusion_alphas

    if not 2 <= arguments.steps <= 1000:
        raise UserError(f"--steps: must be from 2 to 1000, got {arguments.steps}")
    sampler = SAMPLERS[arguments.sampler]
    flow = sampler.kind == "flow"
    level = "noise" if flow else "eta"
    takes = (level, *(name for name in sampler.takes if name in OPTIONS))
    for name in OPTIONS:
        if getattr(arguments, name) is not None and name not in takes:
            raise UserError(f"--{name} does not apply to {arguments.sampler}, which accepts --{', --'.join(takes)}")
    given = {name: getattr(arguments, name) for name in takes if getattr(arguments, name) is not None}
    noise, shift = given.pop(level, sampler.noise), given.pop("shift", 3.0)
    steps = arguments.steps
    times = (shifted_times(steps, shift),) if flow else (stable_diffusion_alphas(), ddim_timesteps(steps))
    table: Transitions = sampler.load()(*times, noise, **given)
    return table


def _print_table(record: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    columns = ["native", "proportionate"]
    if record["rule"] not in columns:
        columns.append("used")
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        title=f"{record['sampler']}: credit per step, zeta = {record['zeta']:.6g}",
    )
    for name in ("step", "from t", "to t", *columns, "native /\nproportionate"):
        table.add_column(record["rule"] if name == "used" else name, justify="right", no_wrap=True)
    times = record["times"]
    for step, (native, target) in enumerate(zip(record["native"], record["proportionate"], strict=True)):
        credits = [f"{record[name][step]:.4f}" for name in columns]
        share = f"{native / target:.3f}" if target else "no noise"
        table.add_row(str(step), f"{times[step]:.4f}", f"{times[step + 1]:.4f}", *credits, share)
    Console().print(table)
