"""A profile summary as tables for the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LONGEST_NAME = 60


def show_summary(summary: dict[str, Any], trace: Path, console: Console) -> None:
    """Print what :func:`pcpo_fast.profiling.trace_summary.summarize` returns, and where the trace is."""
    ranges = Table(title=f"Profile of epoch {summary['epoch']} on {summary['device']}, {summary['seconds']:.2f} s")
    for name in ("range", "times", "seconds", "share", "ms each"):
        ranges.add_column(name, justify="left" if name == "range" else "right")
    for entry in summary["ranges"]:
        share = entry["seconds"] / max(summary["seconds"], 1e-9)
        name = "  " * (len(entry["path"]) - 1) + entry["path"][-1]
        each = 1e3 * entry["seconds"] / entry["count"]
        times = str(entry["count"]) + (f" of {entry['happened']}" if entry["happened"] > entry["count"] else "")
        ranges.add_row(name, times, f"{entry['seconds']:.3f}", f"{share:.1%}", f"{each:.1f}")
    console.print(ranges)
    for kind in ("operations", "kernels"):
        if summary[kind]:
            console.print(_longest(f"{kind} by self time", summary[kind]))
    texts = []
    if summary["micro_step_ms"] is not None:
        step, python = summary["micro_step_ms"], summary["python_ms"]
        texts.append(f"A micro-step takes {step:.1f} ms, {python:.1f} ms of it in Python.")
    if summary["device_busy"] is not None:
        texts.append(f"The GPU is busy {summary['device_busy']:.1%} of the time.")
    texts.append(f"Trace: {trace} ({summary['events']:,} events; open it in https://ui.perfetto.dev)")
    for text in texts:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _longest(title: str, entries: list[dict[str, Any]]) -> Table:
    table = Table(title=title.capitalize())
    for name in ("name", "times", "seconds"):
        table.add_column(name, justify="left" if name == "name" else "right", no_wrap=True)
    for entry in entries:
        table.add_row(entry["name"][:LONGEST_NAME], str(entry["count"]), f"{entry['seconds']:.3f}")
    return table
