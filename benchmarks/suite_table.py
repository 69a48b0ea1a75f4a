"""The table at the end of the GPU suite: what was measured, what failed and why, in at most 60 lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINES, WIDTH = 60, 150
CUT = "... the rest is in the JSON files"


def table(out: Path, suite: dict[str, Any]) -> str:
    """Parts first, then their numbers from the files in ``out``."""
    lines = [f"{suite['device']}, {suite['minutes']:g} minutes"]
    if suite.get("dry"):
        lines.append("A dry run in Triton's interpreter: the times below say nothing about a GPU.")
    if any(part["name"] == "kernel tests" and part["status"] != "done" for part in suite["parts"]):
        lines.append("The kernel tests did not pass: no time of our kernels below may be published.")
    for part in suite["parts"]:
        lines.append(f"{part['status']:9}{part['seconds']:6.0f} s  {part['name']}: {part['why']}")
    started = suite.get("started", "")
    lines += [*ceilings(_read(out / "ceilings.json"), started), *step(_read(out / "flux_step.json"), started)]
    # These are short; the ops share what they leave.
    kernels, blocks = (list(ops(_read(out / name), started)) for name in ("kernels.json", "block_ops.json"))
    room = max(0, LINES - 1 - len(lines))
    of_blocks = min(len(blocks), max(room // 2, room - len(kernels)))
    lines += [*kernels[: room - of_blocks], *blocks[:of_blocks]]
    if len(kernels) + len(blocks) > room:
        lines.append(CUT)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], CUT]
    return "\n".join(line[:WIDTH].rstrip() for line in lines)


def _read(path: Path) -> dict[str, Any]:
    """A part's file; empty if it has not been written."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return content


def _earlier(record: dict[str, Any], started: str) -> str:
    """A mark of what an earlier run of the suite, or another script, left in the folder; empty if it is of this run."""
    measured = record.get("measured", "")
    if measured >= started:
        return ""
    return f" (EARLIER: {measured or 'date unknown'}, code {record.get('code', 'unknown')})"


def ceilings(content: dict[str, Any], started: str) -> Iterator[str]:
    """Copy, matrix product, attention."""
    if content:
        copy = content["copy_bytes_per_second"] / 1e9
        yield f"copy {copy:.0f} GB/s read and written{_earlier(content, started)}"
    for record in content.get("records", ()):
        what = " ".join(str(record[key]) for key in ("op", "name", "size", "way") if key in record)
        what += f" x{record['rows']}" if "rows" in record else ""
        yield f"{what}: " + (f"FAILED, {record['failed']}" if "failed" in record else f"{record['tflops']:.0f} TFLOP/s")


def step(content: dict[str, Any], started: str) -> Iterator[str]:
    """Seconds, rates and memory of each path."""
    if not content:
        return
    facts = f"{content['images']} images, micro-batches of {content['micro_batch']}, {content['finetune']}"
    yield f"training step, size {content['size']} ({facts}): rollout s, update s, TFLOP/s, MFU, GiB"
    paths = [content[name] for name in ("ours", "strong", "baseline") if name in content]
    for record in (*paths, *content["ladder"], *content["extras"]):
        if "step_s" not in record:
            why = record.get("failed", "its outputs are not those of eager PyTorch")
            yield f"  {record['name']}{_earlier(record, started)}: FAILED, {' '.join(why.split())}"
            continue
        mfu = "-" if record["mfu"] is None else f"{record['mfu']:.1%}"
        scaled = f", scaled from {record['measured_images']} images" if "measured_images" in record else ""
        yield (
            f"  {record['rollout_s']:8.2f} {record['update_s']:8.2f} {record['tflops']:7.1f} {mfu:>6} "
            f"{record['peak_gib']:6.1f}  {record['name']}{scaled}{_earlier(record, started)}"
        )
    for name, path, other in (("ratio", "baseline", "the public way"), ("ratio_strong", "strong", "the strong path")):
        if name in content:
            older = min((content["ours"], content[path]), key=lambda record: record.get("measured", ""))
            yield f"  ours is {content[name]:.2f} times as fast as {other}{_earlier(older, started)}"


def ops(content: dict[str, Any], started: str) -> Iterator[str]:
    """Our calls beside eager and compiled ones of the same op, way and size: milliseconds of a graph."""
    if not content:
        return
    yield f"ops: graph ms (ours, eager, compiled), share of the copy, launches{_earlier(content, started)}"
    grouped: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in content["records"]:
        key = record["op"], record["way"], record["size"], record["rows"]
        name = record["name"] if record["name"] != "ours" else f"ours {record['form']}"
        grouped.setdefault(key, {})[name] = record
    for (op, way, size, rows), records in grouped.items():
        others = " ".join(_time(records.get(name)) for name in ("eager", "compiled"))
        for name, record in records.items():
            if name.startswith("ours"):
                share = f"{record['share_of_copy']:6.1%}" if "share_of_copy" in record else "     -"
                form = "" if record["form"] == size else f" {record['form']}"
                what = f"{op} {way} {size} x{rows}{form}"
                yield f"  {_time(record)} {others} {share} {record.get('launches')!s:>4}  {what}"


def _time(record: dict[str, Any] | None) -> str:
    if record is None:
        return "       -"
    if "failed" in record:
        return "  FAILED"
    return f"{record['graph_milliseconds'] or record['milliseconds']:8.4f}"
