"""Curves over epochs, extracted from metric records."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from pcpo_fast.reporting.metrics_file import Record

_STATISTICS = ("mean", "std", "group_std")  # statistics of the total in reward/ and heldout/reward/, not reward names


@dataclass(frozen=True)
class Series:
    """The finite values of one metric, in order of the epochs."""

    epochs: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.epochs)

    def points(self) -> list[tuple[int, float]]:
        return list(zip(self.epochs, self.values, strict=True))

    def by_epoch(self) -> dict[int, float]:
        return dict(self.points())


def series(records: Iterable[Record], name: str) -> Series:
    """The value of a metric in every epoch that has one.

    This is the value of the last line for the whole epoch (kind "epoch" or "evaluation") or, without such a line, the
    mean over the epoch's updates. Values that are not finite are ignored.
    """
    whole: dict[int, float] = {}
    parts: dict[int, list[float]] = {}
    for record in records:
        epoch, value = record.get("epoch"), record.get(name)
        if not isinstance(epoch, int) or not _finite(value):
            continue
        if record.get("kind") == "update":
            parts.setdefault(epoch, []).append(float(value))
        else:
            whole[epoch] = float(value)
    merged = {epoch: sum(values) / len(values) for epoch, values in parts.items()} | whole
    epochs = sorted(merged)
    return Series(epochs, [merged[epoch] for epoch in epochs])


def update_values(records: Iterable[Record], name: str) -> tuple[list[float], list[float]]:
    """A metric of the individual updates: positions on the epoch axis (evenly spaced within an epoch), and values."""
    by_epoch: dict[int, list[float]] = {}
    for record in records:
        if record.get("kind") == "update" and isinstance(record.get("epoch"), int) and name in record:
            by_epoch.setdefault(record["epoch"], []).append(record[name])
    positions, values = [], []
    for epoch in sorted(by_epoch):
        for number, value in enumerate(by_epoch[epoch]):
            if _finite(value):
                positions.append(epoch + number / len(by_epoch[epoch]))
                values.append(float(value))
    return positions, values


def step_series(records: Sequence[Record], prefix: str) -> dict[int, Series]:
    """The curves of the metrics ``<prefix>_step_<i>`` by step i."""
    pattern = re.compile(re.escape(prefix) + r"_step_(\d+)")
    found = {int(match[1]) for record in records for key in record if (match := pattern.fullmatch(key))}
    curves = {step: series(records, f"{prefix}_step_{step}") for step in sorted(found)}
    return {step: curve for step, curve in curves.items() if curve}


def reward_names(records: Iterable[Record], prefix: str) -> list[str]:
    """The rewards with their own metric under `prefix` ("reward/"), in order of appearance."""
    names = dict.fromkeys(key.removeprefix(prefix) for record in records for key in record if key.startswith(prefix))
    return [name for name in names if name not in _STATISTICS]


def skipped_updates(records: Iterable[Record]) -> dict[int, int]:
    """Number of skipped updates by epoch, from the epoch's own line or, without one, from its updates."""
    counts: dict[int, int] = {}
    reported: dict[int, int] = {}
    for record in records:
        epoch = record.get("epoch")
        if not isinstance(epoch, int):
            continue
        if record.get("kind") == "update":
            skipped = record.get("policy/skipped_updates", 0) != 0
            counts[epoch] = counts.get(epoch, 0) + skipped
        elif _finite(record.get("policy/skipped_updates")):
            reported[epoch] = round(record["policy/skipped_updates"])
    return {epoch: count for epoch, count in (counts | reported).items() if count > 0}


def epochs_trained(records: Iterable[Record]) -> int:
    """Number of finished epochs: one more than the last epoch that has its own line."""
    return max(
        (r["epoch"] + 1 for r in records if r.get("kind") == "epoch" and isinstance(r.get("epoch"), int)), default=0
    )


def seconds_trained(records: Iterable[Record]) -> float:
    """The largest ``time`` of all lines, in seconds."""
    return max((float(r["time"]) for r in records if _finite(r.get("time"))), default=0.0)


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
