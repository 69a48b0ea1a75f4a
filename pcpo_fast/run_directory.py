"""Taking possession of a run directory: new, to be resumed, or already complete; never overwritten in silence."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pcpo_fast.atomic import write_atomically
from pcpo_fast.checkpoint import checkpoints, read_state
from pcpo_fast.config import Config
from pcpo_fast.config_loading import dump_config
from pcpo_fast.errors import UserError

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, CREDIT_FILE = "config.yaml", "metrics.jsonl", "summary.json", "credit.json"

FREE_TO_CHANGE = (
    "output_dir",
    "deepspeed",
    "train.epochs",
    "evaluation",
    "checkpoint",
    "logging",
    "rollout.batch_size",
    "model.attention",
    "model.gradient_checkpointing",
    "model.embedding_cache",
)
"""Settings that a resumed run may change: how it runs and for how long, not what it computes."""


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        checkpoint: what to resume from, or None for a run from its beginning.
        epoch: epochs already trained.
        finished: the run is complete: there is nothing to train.
        restarted: the directory holds a run that left no checkpoint, so it begins again.
    """

    checkpoint: Path | None
    epoch: int
    finished: bool = False
    restarted: bool = False


def claim(config: Config, resume: str) -> Start:
    """Look at ``output_dir`` and decide how the run begins; changes nothing.

    Args:
        config: the run.
        resume: "auto" (go on where the directory's run stopped), "never", or the path of a checkpoint or a run.

    Raises:
        UserError: the directory holds another run, or cannot hold one, or ``resume`` names no checkpoint.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file, not a folder")
    holds_run = any((folder / name).exists() for name in (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE))
    if resume not in ("auto", "never"):
        checkpoint = _checkpoint_at(Path(resume))
        if holds_run and folder.resolve() not in checkpoint.resolve().parents:
            raise UserError(
                f"output_dir: {folder} already holds another run than --resume {resume}; choose another one"
            )
        return Start(checkpoint, int(read_state(checkpoint)["epoch"]))
    if not holds_run:
        return Start(None, 0)
    if resume == "never":
        raise UserError(
            f"output_dir: {folder} already holds a run; choose another output_dir, remove it, or resume it with --resume auto"
        )
    _check_same_run(folder, config)
    newest = checkpoints(folder / "checkpoints")
    if not newest:
        return Start(None, 0, restarted=True)
    epoch = int(read_state(newest[-1])["epoch"])
    return Start(newest[-1], epoch, finished=_is_finished(folder, config))


def write_config(config: Config) -> None:
    """Record the resolved configuration in the run directory.

    Raises:
        UserError: the directory cannot be written.
    """
    path = Path(config.output_dir) / CONFIG_FILE
    try:
        write_atomically(path, dump_config(config))
    except OSError as error:
        raise UserError(f"output_dir: {path.parent} cannot be written: {error.strerror}") from None


def read_summary(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a finished run."""
    return dict(json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8")))


def _checkpoint_at(path: Path) -> Path:
    if (path / "checkpoints").is_dir():
        found = checkpoints(path / "checkpoints")
        if not found:
            raise UserError(f"--resume: the run {path} has no complete checkpoint")
        return found[-1]
    read_state(path)
    return path


def _is_finished(folder: Path, config: Config) -> bool:
    try:
        return int(read_summary(folder)["epochs"]) >= config.train.epochs
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_same_run(folder: Path, config: Config) -> None:
    path = folder / CONFIG_FILE
    try:
        earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"output_dir: {folder} holds a run without {CONFIG_FILE}; choose another output_dir") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise UserError(f"output_dir: {path} cannot be read; choose another output_dir") from None
    before, now = dict(_flat(earlier)), dict(_flat(config.model_dump(mode="json")))
    for key in sorted(before.keys() | now.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE_TO_CHANGE)
        if not free and before.get(key) != now.get(key):
            raise UserError(
                f"{key}: the run in {folder} has {before.get(key)!r}, this configuration {now.get(key)!r}; "
                "choose another output_dir, or restore the value to resume"
            )


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _flat(below, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
