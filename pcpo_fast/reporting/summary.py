"""summary.json: the results of a finished run, for scripts."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.reporting.metrics_file import Record, read_metrics
from pcpo_fast.reporting.series import epochs_trained, reward_names, seconds_trained, series, skipped_updates


def summarize_run(records: list[Record]) -> dict[str, Any]:
    """Summary numbers of a run from its metric records; None for those that were not recorded.

    ``heldout_reward_before`` and ``_after`` are the first and the last of at least two held-out evaluations
    (``heldout_rewards`` has the same for each reward), ``reward_before`` and ``_after`` the mean reward of the
    rollouts in the first and the last epoch. The others are ``epochs``, ``updates``, ``skipped_updates``, ``seconds``,
    and ``images_per_second``, the median over epochs.
    """
    heldout = series(records, "heldout/reward/mean")
    reward = series(records, "reward/mean")
    throughput = series(records, "throughput/images_per_second")
    parts = {name: series(records, f"heldout/reward/{name}") for name in reward_names(records, "heldout/reward/")}
    return {
        "heldout_reward_before": heldout.values[0] if heldout else None,
        "heldout_reward_after": heldout.values[-1] if len(heldout.values) > 1 else None,
        "heldout_rewards": {
            name: {"before": part.values[0], "after": part.values[-1]} for name, part in parts.items() if part
        },
        "reward_before": reward.values[0] if reward else None,
        "reward_after": reward.values[-1] if reward else None,
        "epochs": epochs_trained(records),
        "updates": sum(record.get("kind") == "update" for record in records),
        "skipped_updates": sum(skipped_updates(records).values()),
        "seconds": seconds_trained(records),
        "images_per_second": statistics.median(throughput.values) if throughput else None,
    }


def write_summary(run_dir: Path | str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write ``summary.json`` from the run directory's metrics.jsonl, atomically; returns its content.

    `extra` (JSON values) is added and overrides computed numbers of the same name. Numbers that are not finite become
    null. Raises `UserError` if metrics.jsonl is missing or damaged.
    """
    run_dir = Path(run_dir)
    summary = summarize_run(read_metrics(run_dir / "metrics.jsonl")) | dict(extra or {})
    summary = json.loads(json.dumps(summary), parse_constant=lambda _: None)  # NaN and the infinities
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary
