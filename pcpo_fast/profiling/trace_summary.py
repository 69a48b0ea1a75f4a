"""Summary of a trace: time per range and per operation, and Python time between the operations."""

import gzip
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pcpo_fast.profiling.profiler_ranges import NAMES

WORK = ("cpu_op", "cuda_runtime", "cuda_driver")
"""Event categories during which a CPU thread is not running Python."""
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
SHOWN = 10

Event = dict[str, Any]
Interval = tuple[float, float]


def read_trace(path: Path) -> list[Event]:
    """The complete events (Chrome's ``"ph": "X"``) of a trace: ``name``, ``cat``, ``ts`` and ``dur`` in µs, ``pid``,
    ``tid``."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def ranges_of(events: Iterable[Event]) -> list[Event]:
    """The run's own ranges by start time, outer before inner."""
    found = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in NAMES]
    return sorted(found, key=lambda event: (event["ts"], -event["dur"]))


def summarize(path: Path, happened: Mapping[tuple[str, ...], int] | None = None) -> dict[str, Any]:
    """Time per range and operation.

    Args:
        path: the trace.
        happened: how often each range occurred, by its path of names; None: as often as it was recorded.

    Returns:
        ``events`` and ``seconds`` in total; ``ranges`` (``path`` of names, ``count``, ``happened``, ``seconds``);
        ``operations`` and ``kernels`` with the most self time (``name``, ``count``, ``seconds``); ``micro_step_ms``
        without the optimizer step and ``python_ms``, the part of it outside operations of any thread, both None without
        a recorded micro-step; ``device_busy``, the share of the recorded micro-steps and sampler steps in which the GPU
        computes, None without a GPU.
    """
    events = read_trace(path)
    own = ranges_of(events)
    begin = min((event["ts"] for event in own), default=0.0)
    end = max((event["ts"] + event["dur"] for event in own), default=0.0)
    device = [event for event in events if event.get("cat") in DEVICE]
    steps = _union(_interval(event) for event in own if event["name"] in ("sampler step", "micro-step"))
    return {
        "events": len(events),
        "seconds": (end - begin) / 1e6,
        "ranges": _tree(own, happened or {}),
        "operations": _longest(_self_times([event for event in events if event.get("cat") == "cpu_op"])),
        "kernels": _longest([(event["name"], event["dur"]) for event in device]),
        "device_busy": _overlap(_union(map(_interval, device)), steps) / _length(steps) if device and steps else None,
        **_micro_steps(own, [event for event in events if event.get("cat") in WORK]),
    }


def _interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _tree(own: Sequence[Event], happened: Mapping[tuple[str, ...], int]) -> list[dict[str, Any]]:
    """Ranges with the same path of names, combined; outer names first."""
    totals: dict[tuple[str, ...], list[float]] = {}
    around: list[Event] = []
    for event in own:
        while around and event["ts"] >= around[-1]["ts"] + around[-1]["dur"]:
            around.pop()
        around.append(event)
        entry = totals.setdefault(tuple(one["name"] for one in around), [0, 0.0])
        entry[0] += 1
        entry[1] += event["dur"] / 1e6
    order = sorted(totals, key=lambda path: [NAMES.index(name) for name in path])
    return [
        {
            "path": list(path),
            "count": totals[path][0],
            "happened": _times(path, happened) or totals[path][0],
            "seconds": totals[path][1],
        }
        for path in order
    ]


def _times(path: tuple[str, ...], happened: Mapping[tuple[str, ...], int]) -> int:
    """How often a range occurred; parents that were not recorded may be missing from ``path``."""
    total = 0
    for other, count in happened.items():
        names = iter(other)
        total += count if other[-1] == path[-1] and all(name in names for name in path) else 0
    return total


def _self_times(operations: Iterable[Event]) -> list[tuple[str, float]]:
    """(name, self time in µs) of each operation: its duration without that of the operations it calls."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in operations:
        threads[event["pid"], event["tid"]].append(event)
    times: list[tuple[str, float]] = []
    for thread in threads.values():
        around: list[tuple[float, int]] = []  # (end, place in times)
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while around and event["ts"] >= around[-1][0]:
                around.pop()
            if around:
                name, left = times[around[-1][1]]
                times[around[-1][1]] = (name, left - event["dur"])
            around.append((event["ts"] + event["dur"], len(times)))
            times.append((event["name"], event["dur"]))
    return times


def _longest(times: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, microseconds in times:
        seconds[name] += microseconds / 1e6  # type: ignore[assignment]
        counts[name] += 1
    return [{"name": name, "count": counts[name], "seconds": time} for name, time in seconds.most_common(SHOWN)]


def _micro_steps(own: Sequence[Event], work: Iterable[Event]) -> dict[str, float | None]:
    """Mean time of a micro-step without the optimizer step: in total, and outside operations of any thread."""
    count = sum(event["name"] == "micro-step" for event in own)
    if not count:
        return {"micro_step_ms": None, "python_ms": None}
    steps, optimizer = (
        _union(_interval(event) for event in own if event["name"] == name) for name in ("micro-step", "optimizer")
    )
    stepping = _overlap(optimizer, steps)
    total = _length(steps) - stepping
    busy = _overlap(_union([*map(_interval, work), *optimizer]), steps) - stepping
    return {"micro_step_ms": total / count / 1e3, "python_ms": (total - busy) / count / 1e3}


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Merge overlapping intervals; sorted."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _length(merged: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in merged)


def _overlap(merged: Sequence[Interval], others: Iterable[Interval]) -> float:
    """Total length of the intersection of two unions of intervals."""
    ends = [end for _, end in merged]
    total = 0.0
    for begin, end in others:
        for index in range(bisect_right(ends, begin), len(merged)):
            if merged[index][0] >= end:
                break
            total += min(end, merged[index][1]) - max(begin, merged[index][0])
    return total
