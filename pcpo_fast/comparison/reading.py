"""Reads a run directory for a comparison: its curves, its seed, and whether it is finished."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.reporting.metrics_file import Record, find_metrics, read_metrics
from pcpo_fast.reporting.series import Series, epochs_trained, series, skipped_updates, step_series

WORK = ("forwards", "trained", "decodes", "reward_calls")

_READ = {
    "epoch": re.compile(
        r"reward/mean|policy/(clip_fraction(_step_\d+)?|skipped_updates)|time/(rollout|reward|update)|compute/.+"
    ),
    "update": re.compile(r"policy/(grad_norm|skipped_updates)"),
    "evaluation": re.compile(r".+"),
}


def what_is_read(record: Record) -> Record:
    """A metrics record without the numbers that comparisons do not use."""
    read = _READ.get(record.get("kind", ""), _READ["evaluation"])
    fixed = ("kind", "epoch", "update", "time")
    return {name: value for name, value in record.items() if name in fixed or read.fullmatch(name)}


@dataclass(frozen=True)
class RunCurves:
    """The measurements of a run.

    Attributes:
        folder: the run directory.
        config: its resolved configuration; None if it cannot be read.
        problem: why the configuration cannot be read; None if it can.
        epochs: epochs trained.
        finished: whether it trained for all configured epochs and its summary was written.
        reward: mean training reward; the value at epoch e comes from weights trained for e epochs.
        heldout: mean held-out reward by epochs trained; empty without held-out prompts.
        diversity: mean distance between images of the same held-out prompt; empty if not measured.
        clip_fraction: fraction of (image, step) pairs clipped, by epoch.
        clip_steps: the same for each sampler step.
        grad_norms: (epoch, gradient norm before clipping) of every applied update, in order.
        skipped: updates skipped because a gradient was not finite, by epoch.
        seconds: seconds of rollout, reward and update by epoch.
        work: compute of each epoch, by metric name below ``compute/``; empty for runs that did not count it.
        judges: held-out scores of evaluation-only rewards by epochs trained, by reward name.
        kl: KL divergence of held-out trajectories from the base model's, by epochs trained; empty if not measured.
        base_distance: mean pixel distance of held-out images from the base model's, by epochs trained.
    """

    folder: Path
    config: Config | None
    problem: str | None
    epochs: int
    finished: bool
    reward: Series
    heldout: Series
    diversity: Series
    clip_fraction: Series
    clip_steps: dict[int, Series]
    grad_norms: list[tuple[int, float]]
    skipped: dict[int, int]
    seconds: Series
    work: dict[str, Series]
    judges: dict[str, Series]
    base_distance: Series
    kl: Series

    @property
    def seed(self) -> int | None:
        """Its random seed, which pairs it with runs of other variants."""
        return None if self.config is None else self.config.seed


def read_run(folder: Path | str) -> RunCurves:
    """Read a run directory, finished or not.

    Raises:
        UserError: it holds no metrics.jsonl (or metrics.jsonl.gz), or a damaged one.
    """
    folder = Path(folder)
    metrics = find_metrics(folder)
    if metrics is None:
        what = "holds no run (there is no metrics.jsonl in it)" if folder.is_dir() else "is not a run directory"
        raise UserError(f"{folder} {what}")
    records = read_metrics(metrics)
    config, problem = _config_of(folder)
    epochs = epochs_trained(records)
    judges = [] if config is None else [reward.column for reward in config.rewards if reward.evaluation_only]
    return RunCurves(
        folder=folder,
        config=config,
        problem=problem,
        epochs=epochs,
        finished=_is_finished(folder, config, epochs),
        reward=series(records, "reward/mean"),
        heldout=series(records, "heldout/reward/mean"),
        diversity=series(records, "heldout/diversity"),
        clip_fraction=series(records, "policy/clip_fraction"),
        clip_steps=step_series(records, "policy/clip_fraction"),
        grad_norms=_grad_norms(records),
        skipped=skipped_updates(records),
        seconds=_seconds(records),
        work={name: series(records, f"compute/{name}") for name in WORK},
        judges={name: series(records, f"heldout/reward/{name}") for name in judges},
        base_distance=series(records, "heldout/base_distance"),
        kl=series(records, "heldout/kl"),
    )


def _config_of(folder: Path) -> tuple[Config | None, str | None]:
    path = folder / "config.yaml"
    if not path.is_file():
        return None, f"{folder} has no config.yaml"
    try:
        return load_config(path), None
    except UserError as error:
        return None, str(error)


def _is_finished(folder: Path, config: Config | None, epochs: int) -> bool:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        done = int(summary["epochs"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return done <= epochs and (config is None or config.train.epochs <= done)


def _grad_norms(records: list[Record]) -> list[tuple[int, float]]:
    """Norms of applied updates only: a skipped update's norm is not finite."""
    found = []
    for record in records:
        norm = record.get("policy/grad_norm")
        if record.get("kind") != "update" or record.get("policy/skipped_updates", 0) or not isinstance(norm, float):
            continue
        if 0 <= norm < float("inf"):
            found.append((int(record["epoch"]), norm))
    return found


def _seconds(records: list[Record]) -> Series:
    parts = [series(records, f"time/{phase}") for phase in ("rollout", "reward", "update")]
    epochs = [epoch for epoch in parts[0].epochs if all(epoch in part.by_epoch() for part in parts)]
    return Series(epochs, [sum(part.by_epoch()[epoch] for part in parts) for epoch in epochs])
