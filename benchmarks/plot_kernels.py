"""Plots of kernels.json: speed-up against batch, and share of the copy bandwidth against size.

python benchmarks/plot_kernels.py benchmarks/results/nvidia_h200/kernels.json --out docs/figures
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from json_files import read_json

from pcpo_fast.reporting.plots import save_figure
from pcpo_fast.reporting.style import BASE, INK, NATIVE, OTHERS, PAPER, SOFT, new_figure, percent, styled

FORMS = ("endpoints", "key", "detached")
COLOURS = {("policy_loss", form): colour for form, colour in zip(FORMS, OTHERS, strict=False)}
COLOURS |= {("sample_step", "key"): NATIVE, ("guidance", "cfg"): BASE}
MARKERS = {"policy_loss": "o", "sample_step": "s", "guidance": "^"}
LOOKS = {
    call: {"color": colour, "marker": MARKERS[call[0]], "markersize": 4, "linewidth": 1.4}
    for call, colour in COLOURS.items()
}
LOOKS["policy_loss", "endpoints"] |= {"markersize": 7, "linewidth": 3}  # seen beneath another form that is as fast
TIMES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def best(record: dict[str, Any]) -> float:
    """Device time without the host's share where a graph was captured."""
    times = (record["milliseconds"], record["graph_milliseconds"])
    return min(value for value in times if value is not None)


def select(content: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """Records with these values that did not fail, in order of size and batch."""
    measured = (r for r in content["records"] if "failed" not in r)
    found = [r for r in measured if all(r.get(name) == value for name, value in wanted.items())]
    return sorted(found, key=lambda r: (r["elements"], r["rows"]))


def speed_up(content: dict[str, Any], axes: Any, time: str, title: str) -> None:
    """Forward and backward of the loss at FLUX 1024 x 1024 (or the only size there is), against batch."""
    sizes = {r["size"] for r in content["records"] if r["name"] == "eager" and r["op"] == "policy_loss"}
    size = "flux_1024" if "flux_1024" in sizes else min(sizes)
    styled(axes, f"Policy loss, {size}, {title}", "images", "times as fast")
    common = {"op": "policy_loss", "way": "forward+backward", "size": size}
    batches: set[int] = set()
    for name, style in (("eager", "-"), ("compiled", "--")):
        theirs = {r["rows"]: r[time] for r in select(content, name=name, **common) if r[time] is not None}
        for form in FORMS:
            ours = {r["rows"]: r[time] for r in select(content, name="ours", form=form, **common)}
            rows = sorted(count for count in theirs if ours.get(count) is not None)
            batches |= set(rows)
            label = f"{form}, against {'eager' if name == 'eager' else 'torch.compile'}"
            look = {"linestyle": style, **LOOKS["policy_loss", form]}
            if name == "compiled":
                look["markerfacecolor"] = PAPER  # a single batch has no line
            axes.plot(rows, [theirs[r] / ours[r] for r in rows], label=label, **look)
    axes.axhline(1, color=SOFT, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(min(batches) / 1.3, max(batches) * 1.3)
    axes.set_xticks(sorted(batches), [str(rows) for rows in sorted(batches)])
    axes.minorticks_off()


def roofline(content: dict[str, Any], axes: Any) -> None:
    """Bytes that cannot be avoided, per time, over the copy bandwidth of the same run."""
    styled(axes, "Share of the copy bandwidth", "latent elements of the batch", "")
    for (op, form), look in LOOKS.items():
        records = [r for r in select(content, op=op, form=form, name="ours") if "share_of_copy" in r]
        records = [r for r in records if r["way"] != "forward" or op != "policy_loss"]
        points = sorted((r["rows"] * r["elements"], r["traffic_bytes"] / best(r)) for r in records)
        shares = [speed * 1e3 / content["copy_bytes_per_second"] for _, speed in points]
        axes.plot([count for count, _ in points], shares, label=f"{op}, {form}", **look)
    axes.set(xscale="log", ylim=(0, max(1.05, axes.get_ylim()[1])))
    percent(axes.yaxis)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)


def draw(content: dict[str, Any]) -> Any:
    """Speed-up in a CUDA graph, where there are any, and launched one by one; the share of the copy bandwidth."""
    ways = [("milliseconds", "launched one by one")]
    if any(record["graph_milliseconds"] is not None for record in select(content, op="policy_loss", name="eager")):
        ways.insert(0, ("graph_milliseconds", "in a CUDA graph"))
    figure = new_figure(4.4, 4.6 * (len(ways) + 1))
    *left, right = figure.subplots(1, len(ways) + 1)
    for axes, (time, title) in zip(left, ways, strict=True):
        speed_up(content, axes, time, title)
    low, high = (pick(axes.get_ylim()[end] for axes in left) for end, pick in enumerate((min, max)))
    shown = [times for times in TIMES if low <= times <= high]
    for axes in left:
        axes.set_yticks(shown, [f"{times:g}" for times in shown])
        axes.set_ylim(low, high)
    roofline(content, right)
    figure.legend(
        *left[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=8, handlelength=4,
        frameon=False, labelcolor=INK,
    )  # fmt: skip
    figure.suptitle(
        f"{content['device']}, torch {content['torch']}, triton {content['triton']}", fontsize=9, color=SOFT
    )
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="kernels.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for kernel_speed_<device>.png")
    chosen = parser.parse_args(arguments)
    content = read_json(chosen.results)
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"kernel_speed_{re.sub(r'[^a-z0-9]+', '_', content['device'].lower())}.png"
    save_figure(draw(content), path, dpi=130)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
