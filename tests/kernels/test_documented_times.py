"""The measured times in docs/kernels.md and docs/block_kernels.md are those of the committed files."""

from pathlib import Path

import kernel_tables
import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS, BLOCKS, COUNTED = kernel_tables.read(ROOT / "benchmarks" / "results" / "nvidia_h200")


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def flat(name: str) -> str:
    return " ".join(page(name).split())


def of(records: list, **wanted: object) -> dict:
    (found,) = (r for r in records if all(r.get(key) == value for key, value in wanted.items()))
    return found


def graph(records: list, **wanted: object) -> float:
    return 1e3 * of(records, **wanted)["graph_milliseconds"]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("kernels", kernel_tables.table(KERNELS)),
        ("kernels", kernel_tables.goals(KERNELS, COUNTED)),
        ("block_kernels", kernel_tables.block_table(BLOCKS)),
    ],
    ids=["kernels", "goals", "blocks"],
)
def test_tables(name: str, table: str) -> None:
    """Made by ``python benchmarks/kernel_tables.py benchmarks/results/nvidia_h200``."""
    assert f"-->\n{table}<!-- end -->" in page(name)


def test_what_is_said_of_the_kernels() -> None:
    records, text = KERNELS["records"], flat("kernels")
    loss = {"op": "policy_loss", "way": "forward+backward", "name": "ours"}
    eight, one = (graph(records, **loss, form="endpoints", size="flux_1024", rows=rows) for rows in (8, 1))
    seven = 7 * of(records, **loss, form="endpoints", size="flux_1024", rows=1)["traffic_bytes"]
    ratio = graph(records, **loss, form="endpoints", rows=512) / graph(records, **loss, form="key", rows=512)
    idle = graph(records, op="policy_loss", way="forward", name="ours", form="detached", rows=8)
    eager = of(records, op="policy_loss", way="forward+backward", name="eager", rows=8)
    host = [of(records, **loss, form=form, rows=8)["host_microseconds"] for form in ("endpoints", "key", "detached")]
    for said in (
        f"after {len(records)} calls",
        f"L2 cache ({KERNELS['l2_bytes'] >> 20} MiB)",
        f"grows by only {eight - one:.1f} µs, to {eight:.1f}",
        f"take {1e6 * seven / KERNELS['copy_bytes_per_second']:.1f} µs",
        f"reads no image, takes {idle:.1f} µs",
        f"{ratio:.2f} times as fast at $`2^{{27}}`$ elements",
        f"copy bandwidth ({KERNELS['copy_bytes_per_second'] * 1e-12:.2f} TB/s)",
        f"costs {eager['host_microseconds'] / eager['launches']:.0f} µs of host time",
        f"forward and backward of ours {min(host):.0f} to {max(host):.0f} µs a call",
    ):
        assert said in text, said


def test_what_is_said_of_the_block_kernels() -> None:
    records, text = BLOCKS["records"], flat("block_kernels")

    def ratios(op: str) -> list[float]:
        mine = {r["way"]: r["graph_milliseconds"] for r in records if (r["op"], r["name"]) == (op, "ours")}
        theirs = {r["way"]: r["graph_milliseconds"] for r in records if (r["op"], r["name"]) == (op, "compiled")}
        return [theirs[way] / mine[way] for way in theirs]

    for op in ("norm_rope", "modulated_norm", "gated_residual_norm"):
        assert f"`{op}` ({min(ratios(op)):.2f} to {max(ratios(op)):.2f}" in text
    assert max(ratios("gated_residual")) < 1
    slower = sorted(1 / ratio - 1 for ratio in ratios("gated_residual"))[:2]
    assert "are {:.0f} to {:.0f} % slower".format(*(100 * share for share in slower)) in text
    ours, theirs = (graph(records, op="gated_residual", way="full", name=name) for name in ("ours", "compiled"))
    assert f"{ours:.1f} µs against {theirs:.1f}" in text

    mine = [r for r in records if r["name"] == "ours"]
    busy = {True: [], False: []}
    for record in mine:
        busy[record["op"] == "swiglu"].append(record["host_microseconds"] / (1e3 * record["graph_milliseconds"]))
    assert f"is {min(busy[False]):.1f} to {max(busy[False]):.1f} times its device time for all but `swiglu`" in text
    assert max(busy[True]) < 1

    def share(op: str, way: str) -> str:
        return f"{100 * of(mine, op=op, way=way)['share_of_copy']:.0f}"

    norms = [[share(op, way) for op in ("modulated_norm", "gated_residual_norm")] for way in ("lora", "full")]
    assert "from {} and {} % of the copy bandwidth to {} and {} %".format(*norms[0], *norms[1]) in text
    assert f"from {share('norm_rope', 'lora')} to {share('norm_rope', 'full')} %" in text
    one_by_one = [
        of(records, op=r["op"], way=r["way"], name="eager")["milliseconds"] / r["milliseconds"]
        for r in mine
        if r["way"] != "forward" and r["op"] in ("modulated_norm", "gated_residual", "gated_residual_norm")
    ]
    assert f"{max(one_by_one):.2f} times as fast as eager at best and {min(one_by_one):.2f} times at worst" in text
    assert f"a copy's {BLOCKS['copy_bytes_per_second'] * 1e-12:.2f} TB/s" in text
