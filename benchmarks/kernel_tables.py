"""The tables of docs/kernels.md and docs/block_kernels.md, from what a GPU measured.

python benchmarks/kernel_tables.py benchmarks/results/nvidia_h200
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from json_files import read_json

Record = dict[str, Any]
KINDS = ("ours", "eager", "compiled")

# SMs x 4 schedulers x 32 lanes x clock. An H200's data sheet promises 67 TFLOP/s in float32: 128 fused multiply-adds on
# each of 132 SMs at 1.98 GHz. The clock during the measurements is not known.
CLOCK = {"NVIDIA H200": 1.98e9}
LANES = 4 * 32
OF_COPY, OF_ISSUE = 0.85, 0.8  # the goals

# The kernels of a call; the forward of the on-policy loss reads no image.
KERNELS = {
    ("policy_loss", "forward"): ("policy_loss_forward",),
    ("policy_loss", "forward+backward"): ("policy_loss_forward", "policy_loss_backward"),
    ("sample_step", "forward"): ("sample_step",),
}


def micro(record: Record, name: str = "graph_milliseconds") -> float:
    """Microseconds in a CUDA graph, or launched one by one."""
    return 1e3 * record[name]


def ratio(theirs: float, ours: float) -> str:
    """How often as fast."""
    times = theirs / ours
    return f"{times:.1f}" if times >= 10 else f"{times:.2f}"


def compared(records: dict[str, Record]) -> str:
    """Cells of a call: three times, two ratios, share of the copy and launches."""
    times = {kind: (micro(records[kind]), micro(records[kind], "milliseconds")) for kind in KINDS if records.get(kind)}
    cells = ["{:.1f} ({:.0f})".format(*times[kind]) if kind in times else "-" for kind in KINDS]
    for kind in KINDS[1:]:
        pairs = zip(times[kind], times["ours"], strict=True) if kind in times else ()
        cells.append("{} ({})".format(*(ratio(*pair) for pair in pairs)) if kind in times else "-")
    share = records["ours"].get("share_of_copy")
    cells.append("-" if share is None else f"{share:.0%}")
    cells.append(", ".join(str(records[kind]["launches"]) for kind in KINDS if kind in times))
    return " | ".join(cells)


HEAD = "ours | eager | torch.compile | against eager | against torch.compile | of the copy | launches |"
RULE = "|" + "---|" * 9


def table(content: Record) -> str:
    """The kernels: every call of ours, beside the public trainers' with the same batch and direction."""
    lines = [f"| op | images | {HEAD}", RULE]
    found = content["records"]
    for ours in (record for record in found if record["name"] == "ours"):
        same = [r for r in found if all(r[key] == ours[key] for key in ("op", "way", "size", "rows"))]
        others = {r["name"]: r for r in same if r["name"] != "ours"}
        way = ours["way"].replace("+", " + ")
        lines.append(
            f"| `{ours['op']}`, {ours['form']}, {way} | {ours['rows']} | {compared(others | {'ours': ours})} |"
        )
    return "\n".join(lines) + "\n"


WAYS = {"forward": "forward", "lora": "with backward, LoRA", "full": "with backward, full"}


def block_table(content: Record) -> str:
    """The block kernels of the one size that was measured."""
    lines = [f"| op | | {HEAD}", RULE]
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in content["records"]:
        found.setdefault((record["op"], record["way"]), {})[record["name"]] = record
    lines += [f"| `{op}` | {WAYS[way]} | {compared(records)} |" for (op, way), records in found.items()]
    return "\n".join(lines) + "\n"


def issue_seconds(content: Record, record: Record, counted: list[Record]) -> float:
    """Time of a call if every scheduler issued an instruction in every clock."""
    names = KERNELS[record["op"], record["way"]]
    if record["form"] == "detached":
        names = tuple(name for name in names if name != "policy_loss_forward")
    rows = {r["kernel"]: r for r in counted if (r["variant"], r["target"]) == (f"bf16-{record['form']}", "sm_90")}
    instructions = sum(rows[name]["instructions"] / rows[name]["elements"] for name in names)
    issued = content["multiprocessors"] * LANES * CLOCK[content["device"]]
    return instructions * record["rows"] * record["elements"] / issued


def goals(content: Record, counted: list[Record]) -> str:
    """The calls of 2^27 elements against the goal: the lower of two shares, each as a share of the copy bandwidth."""
    lines = ["| op | of the copy | of the issue limit | goal, of the copy | |", "|" + "---|" * 5]
    for record in content["records"]:
        if (record["name"], record["size"]) != ("ours", "large") or "share_of_copy" not in record:
            continue
        seconds = record["graph_milliseconds"] * 1e-3
        least, issue = record["share_of_copy"] * seconds, issue_seconds(content, record, counted)
        goal = min(OF_COPY, OF_ISSUE * least / issue)
        verdict = "met" if record["share_of_copy"] >= goal else "missed"
        way = record["way"].replace("+", " + ")
        lines.append(
            f"| `{record['op']}`, {record['form']}, {way} | {record['share_of_copy']:.1%} | {issue / seconds:.1%} "
            f"| {goal:.1%} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def read(folder: Path) -> tuple[Record, Record, list[Record]]:
    """The kernels' times, the block kernels', and the instruction counts of the Triton version that was measured."""
    kernels, blocks = (read_json(folder / name) for name in ("kernels.json", "block_ops.json"))
    counts = Path(__file__).parent / "results" / "kernels" / f"triton-{kernels['triton']}.json"
    return kernels, blocks, read_json(counts)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of kernels.json and block_ops.json")
    kernels, blocks, counted = read(parser.parse_args(arguments).results)
    print(table(kernels), goals(kernels, counted), block_table(blocks), sep="\n", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
