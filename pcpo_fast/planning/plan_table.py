"""A plan as tables for the terminal."""

import re
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def show_plan(plan: dict[str, Any], console: Console) -> None:
    """Print what :func:`pcpo_fast.planning.run_plan.make_plan` returns."""
    console.print(_parameters(plan))
    console.print(_work(plan))
    console.print(_memory(plan))
    run = plan["run"]
    _say(
        console,
        f"The whole run, {run['epochs']} epochs and {run['evaluations']} evaluations: {_number(run['tflops'])} TFLOP, "
        f"{_seconds(3600 * run['hours'])} at an assumed MFU of {run['mfu']:g} (--mfu), without rewards and loading",
    )
    own, gpus = plan["configured"], f"{plan['gpus']} x {plan['gpu_memory_gb']:g} GB"
    peak = f"{own['peak']:.1f} GB at its peak ({own['worst_phase']})"
    verdict = "fits" if own["fits"] else "does not fit"
    _say(console, f"This configuration ({own['zero']}) needs {peak}; it {verdict} {gpus}")
    advice = plan["recommendation"]
    _say(console, ("Recommended: " if advice["fits"] else "Does not fit: ") + advice["reason"])
    if advice["fits"]:
        _say(console, "  " + " ".join(advice["settings"]))
    for way in advice.get("ways_out", ()):
        _say(console, f"  - {way}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _parameters(plan: dict[str, Any]) -> Table:
    model, counts = plan["model"], plan["parameters"]
    base = "" if model["base_weights"] == "full" else f", frozen weights in {model['base_weights']}"
    table = Table(title=f"{model['path']} ({model['source']}), {model['finetune']}, {model['dtype']}{base}")
    table.add_column("parameters")
    table.add_column("count", justify="right")
    rows = {key: counts[key] for key in ("network", "trained", "frozen", "vae")} | counts["text_encoders"]
    for name, count in rows.items():
        table.add_row(name, f"{count:,}")
    return table


def _work(plan: dict[str, Any]) -> Table:
    flops = plan["flops"]
    table = Table(title=f"Operations per epoch, and ideal time on {plan['gpus']} x {plan['peak_tflops']:g} TFLOP/s")
    table.add_column("phase")
    for name in ("model TFLOP", "recomputed TFLOP", "ideal time"):
        table.add_column(name, justify="right")
    for name, work in flops["phases"].items():
        recomputed = _number(work["recomputed_tflops"])
        table.add_row(name, _number(work["tflops"]), recomputed, _seconds(work["ideal_seconds"]))
    table.add_section()
    table.add_row("epoch", _number(flops["epoch_tflops"]), "", _seconds(flops["epoch_ideal_seconds"]))
    table.caption = (
        f"per image and step: forward {_number(flops['forward_tflops'])} TFLOP, forward and backward "
        f"{_number(flops['forward_backward_tflops'])}, checkpointing adds {_number(flops['checkpointing_tflops'])}; "
        "the epoch does not include an evaluation"
    )
    return table


def _memory(plan: dict[str, Any]) -> Table:
    stages, own = plan["memory_gb"], plan["configured"]
    table = Table(box=SIMPLE_HEAD, title="Memory per GPU in GB, with the configuration's batch sizes and checkpointing")
    table.add_column("part", no_wrap=True)
    columns = {**stages, "this config": own}
    for name in columns:
        table.add_column(re.sub("[_ ]", "\n", name), justify="right", no_wrap=True)
    for part in own["parts"]:
        if part != "text encoders" and any(column["parts"][part] for column in columns.values()):
            table.add_row(part, *(_number(column["parts"][part]) for column in columns.values()))
    table.add_section()
    for phase in own["phases"]:
        table.add_row(f"peak: {phase}", *(_number(column["phases"][phase]) for column in columns.values()))
    table.add_section()
    fits = ("[green]yes[/]", "[red]no[/]")
    table.add_row("fits", *(fits[not column["fits"]] for column in columns.values()))
    table.caption = "not all parts are alive in every phase"
    if plan["uncounted_rewards"]:
        table.caption += f"; not counted: the models of {', '.join(plan['uncounted_rewards'])}"
    return table


def _number(value: float) -> str:
    if value == 0:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _seconds(value: float) -> str:
    for limit, unit, name in ((1e-3, 1e-6, "µs"), (1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if value < limit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 3600:.3g} h"
