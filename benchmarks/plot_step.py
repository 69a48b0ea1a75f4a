"""Figure of the results of benchmarks/flux_step.py: the ladder from the public trainers' way to ours.

python benchmarks/plot_step.py step.json --out figures/step.png
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from json_files import read_json

from pcpo_fast.reporting.style import GRID, INK, OTHERS, SOFT, new_figure, styled


def rungs_of(content: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The paths that were timed, with their names: the public way, the ladder, and the strong way."""
    rungs = [("public trainers' way", content["baseline"])]
    alone = len(content["ladder"]) == 1  # where nothing else was measured, it is ours with all that is before it
    rungs += [("ours, up to " + rung["name"] if alone else rung["name"], rung) for rung in content["ladder"]]
    rungs.append(("strong plain PyTorch", content["strong"]))
    rungs = [(name, rung) for name, rung in rungs if "step_s" in rung]
    apart = {0, 1, len(rungs) - 1}  # the others are what is before them, and one lever more
    return [(name if place in apart else f"+ {name}", rung) for place, (name, rung) in enumerate(rungs)]


def table(content: dict[str, Any]) -> str:
    """Markdown: seconds, throughput, how often as fast as the public way, memory, and how far the log-ratios moved."""
    first = content["baseline"]["step_s"]
    lines = [
        "| | rollout s | update s | images/s | times as fast | peak GiB | log-ratio moved, of the clip range |",
        "|---|---|---|---|---|---|---|",
    ]
    extras = [(f"all of the above, {rung['name']}", rung) for rung in content["extras"] if "step_s" in rung]
    for name, rung in (*rungs_of(content), *extras):
        numerics = rung.get("numerics")
        moved = "-" if numerics is None else f"{numerics['log_ratio_change'] / numerics['clip_range']:.1e}"
        lines.append(
            f"| {name} | {rung['rollout_s']:.2f} | {rung['update_s']:.2f} | {rung['images_per_second']:.2f} "
            f"| {first / rung['step_s']:.2f} | {rung['peak_gib']:.2f} | {moved} |"
        )
    return "\n".join(lines) + "\n"


def draw(content: dict[str, Any]) -> Any:
    """Seconds of a step, rollout and update, from the slowest path to the fastest."""
    rungs = rungs_of(content)
    figure = new_figure(height=0.42 * len(rungs) + 1.3)
    what = f"{content['images']} images, {content['steps']} steps, {content['finetune']}"
    title = f"One training step of FLUX, size {content['size']} ({what}), on {content['device']}"
    axes = styled(figure.add_subplot(), title, "seconds", "", with_legend=True)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=GRID, linewidth=0.8)
    places = range(len(rungs))
    rollouts = [rung["rollout_s"] for _, rung in rungs]
    axes.barh(places, rollouts, color=OTHERS[0], label="rollout", height=0.62)
    axes.barh(
        places, [rung["update_s"] for _, rung in rungs], left=rollouts, color=OTHERS[2], label="update", height=0.62
    )
    longest = max(rung["step_s"] for _, rung in rungs)
    for place, (_, rung) in zip(places, rungs, strict=True):
        times = rungs[0][1]["step_s"] / rung["step_s"]
        axes.text(rung["step_s"] + longest / 100, place, f"{times:.2f} x", va="center", fontsize=8.5, color=INK)
    axes.set_yticks(list(places), [name for name, _ in rungs])
    axes.set_xlim(0, longest * 1.1)
    axes.invert_yaxis()
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8.5, labelcolor=SOFT)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the JSON file")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    chosen = parser.parse_args(arguments)
    content = read_json(chosen.results)
    missing = [name for name in ("baseline", "strong") if "step_s" not in content.get(name, {})]
    if missing:
        print(f"error: {chosen.results} has no time of {' and '.join(missing)}", file=sys.stderr)
        return 2
    if len({rung.get("code") for _, rung in rungs_of(content)}) > 1:
        print(f"error: {chosen.results}: its paths are of different code: measure all of them again", file=sys.stderr)
        return 2
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    draw(content).savefig(chosen.out, dpi=130)
    print(table(content))
    print(chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
