"""A plan as tables for the terminal."""

import re
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pcpo_fast.config.wording import counted
from pcpo_fast.reporting.progress import say


def show_plan(plan: dict[str, Any], console: Console) -> None:
    """Print what :func:`pcpo_fast.planning.run_plan.make_plan` returns."""
    model = plan["model"]
    base = "" if model["base_weights"] == "full" else f", frozen weights in {model['base_weights']}"
    say(console, f"{model['path']} ({model['source']}), {model['finetune']}, {model['dtype']}{base}")
    console.print(_parameters(plan))
    console.print(_work(plan))
    console.print(_memory(plan))
    console.print(_host(plan))
    console.print(_disk(plan["disk_gb"]))
    if "encoded prompts" not in plan["disk_gb"]["parts"]:
        each = _number(1e3 * plan["disk_gb"]["each_prompt"])
        say(console, f"Encoded prompts come on top, {each} MB each: prompts.train or prompts.heldout is not here")
    run = plan["run"]
    epochs, evaluations = counted(run["epochs"], "epoch"), counted(run["evaluations"], "evaluation")
    say(
        console,
        f"The whole run, {epochs} and {evaluations}: {_number(run['tflops'])} TFLOP, "
        f"{_seconds(3600 * run['hours'])} at an assumed MFU of {run['mfu']:g} (--mfu), without rewards and loading",
    )
    own, gpus = plan["configured"], f"{plan['gpus']} x {plan['gpu_memory_gb']:g} GB"
    peak = f"{own['peak']:.1f} GB at its peak ({own['worst_phase']})"
    verdict = "fits" if own["fits"] else "does not fit"
    host = f"{own['host']['peak']:.1f} GB of host memory in each machine ({own['host']['worst_phase']})"
    if own["host_if_mapped"] is not None:
        mapped = f"{own['host_if_mapped']['peak']:.1f} if the files of the model, which are not here, store"
        host += f", {mapped} {plan['model']['dtype']}"
    say(console, f"This configuration ({own['zero']}) needs {peak}; it {verdict} {gpus}. It needs {host}")
    advice = plan["recommendation"]
    say(console, ("Recommended: " if advice["fits"] else "Does not fit: ") + advice["reason"])
    if advice["fits"]:
        say(console, "  " + " ".join(advice["settings"]))
    for way in advice.get("ways_out", ()):
        say(console, f"  - {way}")


def _parameters(plan: dict[str, Any]) -> Table:
    counts = plan["parameters"]
    table = Table()
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
    title = "Memory per GPU in GB, with the configuration's batch sizes and checkpointing"
    table = _stages(title, plan["memory_gb"] | {"this config": plan["configured"]})
    table.caption = "not all parts are alive in every phase"
    if plan["uncounted_rewards"]:
        table.caption += f"; not counted: the models of {', '.join(plan['uncounted_rewards'])}"
    return table


def _host(plan: dict[str, Any]) -> Table:
    count, size = plan["gpus"] // plan["nodes"], plan["host_memory_gb"]
    held = f"{count} rank{'s' if count > 1 else ''}" + ("" if size is None else f" and {size:g} GB")
    columns = plan["host_gb"] | {"this config": plan["configured"]["host"]}
    table = _stages(f"Host memory of a machine with {held}, in GB", columns)
    if not plan["model"]["mapped"]:
        table.caption = f"with a copy of the weights in every rank: files that store {plan['model']['dtype']} need none"
    return table


def _stages(title: str, columns: dict[str, Any]) -> Table:
    """Parts and peaks of one kind of memory, in a column for each ZeRO stage and one for the configuration."""
    table = Table(box=SIMPLE_HEAD, title=title)
    table.add_column("part", no_wrap=True)
    for name in columns:
        table.add_column(re.sub("[_ ]", "\n", name), justify="right", no_wrap=True)
    own = columns["this config"]
    for part in own["parts"]:
        if any(column["parts"][part] for column in columns.values()):
            table.add_row(part, *(_gb(column["parts"][part]) for column in columns.values()))
    table.add_section()
    for phase in own["phases"]:
        table.add_row(f"peak: {phase}", *(_gb(column["phases"][phase]) for column in columns.values()))
    if own["fits"] is not None:
        table.add_section()
        table.add_row("fits", *(_verdict(column["fits"]) for column in columns.values()))
    return table


def _disk(disk: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Disk space in GB")
    table.add_column("part", no_wrap=True)
    table.add_column("GB", justify="right")
    for part, size in disk["parts"].items():
        table.add_row(part, _gb(size))
    table.add_section()
    table.add_row("all", _gb(disk["total"]))
    if disk["fits"] is not None:
        table.add_row(f"fits {disk['free']:g} GB", _verdict(disk["fits"]))
    return table


def _verdict(fits: bool) -> str:
    return "[green]yes[/]" if fits else "[red]no[/]"


def _gb(value: float) -> str:
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:.2f}" if 0 < value < 10 else _number(value)


def _number(value: float) -> str:
    if value == 0:
        return "-"
    if value < 0.001:
        return "<0.001"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _seconds(value: float) -> str:
    if value < 1e-3:
        return "<1 ms" if value else "-"
    for limit, unit, name in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if value < limit:
            return f"{_number(value / unit)} {name}"
    return f"{_number(value / 3600)} h"
