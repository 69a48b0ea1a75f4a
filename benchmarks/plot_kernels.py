"""Plots of kernels.json: speed-up against batch, and share of the copy bandwidth against size.

python benchmarks/plot_kernels.py benchmarks/results/my_gpu/kernels.json --out docs/figures
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pcpo_fast.reporting.plots import save_figure
from pcpo_fast.reporting.style import OTHERS, SOFT, new_figure, styled

COLOURS = dict(zip(("endpoints", "key", "detached"), OTHERS, strict=False))


def best(record: dict[str, Any]) -> float:
    """Device time without the host's share where a graph was captured."""
    times = (record["milliseconds"], record["graph_milliseconds"])
    return min(value for value in times if value is not None)


def select(content: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """Records with these values, in order of size and batch."""
    found = [r for r in content["records"] if all(r.get(name) == value for name, value in wanted.items())]
    return sorted(found, key=lambda r: (r["elements"], r["rows"]))


def speed_up(content: dict[str, Any], axes: Any) -> None:
    """Forward and backward of the loss at FLUX 1024 x 1024 (or the only size there is), against batch."""
    sizes = {r["size"] for r in content["records"] if r["name"] == "eager" and r["op"] == "policy_loss"}
    size = "flux_1024" if "flux_1024" in sizes else min(sizes)
    styled(axes, f"Policy loss, {size}", "batch", "times faster")
    common = {"op": "policy_loss", "way": "forward+backward", "size": size}
    for name, style in (("eager", "-"), ("compiled", "--")):
        theirs = {r["rows"]: r["milliseconds"] for r in select(content, name=name, **common)}
        for form, colour in COLOURS.items():
            ours = {r["rows"]: r["milliseconds"] for r in select(content, name="ours", form=form, **common)}
            rows = sorted(set(ours) & set(theirs))
            label = f"{form}, against {'eager' if name == 'eager' else 'torch.compile'}"
            axes.plot(
                rows, [theirs[r] / ours[r] for r in rows], style, color=colour, marker="o", markersize=3, label=label
            )
    axes.axhline(1, color=SOFT, linewidth=0.8)
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=7, frameon=False)


def roofline(content: dict[str, Any], axes: Any) -> None:
    """Bytes that cannot be avoided, per time, over the copy bandwidth of the same run."""
    styled(axes, "Roofline", "elements", "share of copy bandwidth")
    for op, marker in (("policy_loss", "o"), ("sample_step", "s"), ("guidance", "^")):
        records = [r for r in select(content, op=op, name="ours") if r["way"] != "forward" or op != "policy_loss"]
        for form in dict.fromkeys(r["form"] for r in records):
            mine = [r for r in records if r["form"] == form and "share_of_copy" in r]
            count = [r["rows"] * r["elements"] for r in mine]
            points = sorted(zip(count, (r["traffic_bytes"] / best(r) for r in mine), strict=True))
            shares = [speed * 1e3 / content["copy_bytes_per_second"] for _, speed in points]
            axes.plot([n for n, _ in points], shares, marker=marker, markersize=3, linewidth=1, label=f"{op}, {form}")
    axes.set(xscale="log", ylim=(0, None))
    axes.legend(fontsize=7, frameon=False)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="kernels.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for kernel_speed.png")
    chosen = parser.parse_args(arguments)
    content = json.loads(chosen.results.read_text())
    figure = new_figure(4.2, 11)
    left, right = figure.subplots(1, 2)
    speed_up(content, left)
    roofline(content, right)
    figure.suptitle(
        f"{content['device']}, torch {content['torch']}, triton {content['triton']}", fontsize=9, color=SOFT
    )
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / "kernel_speed.png"
    save_figure(figure, path, dpi=130)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
