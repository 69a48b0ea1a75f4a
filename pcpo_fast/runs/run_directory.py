"""Claiming a run directory: new, to be resumed, or already finished; never silently overwritten."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.loading import dump_config, load_config
from pcpo_fast.config.roles import role_of
from pcpo_fast.config.schema import Config
from pcpo_fast.config.yaml_text import value_text
from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.runs.checkpoint import checkpoints, read_state, set_aside, visible_damage
from pcpo_fast.runs.input_record import ACCEPT, INPUTS_FILE
from pcpo_fast.runs.manifest import damage_of

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, CREDIT_FILE, GAINS_FILE = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "credit.json",
    "gains.json",
)


@dataclass(frozen=True)
class RunStart:
    """How a run starts.

    Attributes:
        checkpoint: checkpoint to resume from; None: start from the beginning, or a finished run without checkpoints.
        epoch: epochs already trained.
        finished: the run is finished; there is nothing to train.
        restarted: the directory holds a run without a checkpoint, which starts again from the beginning.
        fresh: the directory held no run; with a checkpoint, this is another run's.
        earlier: earlier complete checkpoints to fall back to, oldest first.
        damaged: skipped checkpoints with a description of the damage.
    """

    checkpoint: Path | None
    epoch: int
    finished: bool = False
    restarted: bool = False
    fresh: bool = False
    earlier: tuple[Path, ...] = ()
    damaged: tuple[tuple[Path, str], ...] = ()

    def fall_back(self, problem: str) -> "RunStart":
        """The start from the previous checkpoint, because this one is damaged.

        Raises:
            UserError: there is no undamaged earlier one.
        """
        assert self.checkpoint is not None
        damaged = (*self.damaged, (self.checkpoint, problem))
        if not self.earlier:
            what = "; ".join(f"{path}: {text}" for path, text in damaged)
            raise UserError(
                f"every checkpoint is damaged, so there is nothing to resume from ({what}); give another one with "
                "--resume CHECKPOINT, or start again in another output_dir"
            )
        *earlier, checkpoint = self.earlier
        return replace(self, checkpoint=checkpoint, earlier=tuple(earlier), damaged=damaged)._skip_visible_damage()

    def _skip_visible_damage(self) -> "RunStart":
        """Fall back until file names and sizes match the manifest; sets :attr:`epoch`."""
        assert self.checkpoint is not None
        problem = visible_damage(self.checkpoint)
        if problem is not None:
            return self.fall_back(problem)
        return replace(self, epoch=int(read_state(self.checkpoint)["epoch"]))


def claim(config: Config, resume: str) -> RunStart:
    """Inspect ``output_dir`` and decide how the run starts; changes nothing.

    Args:
        config: the run.
        resume: "auto" (continue the run in the directory), "accept-changes" (the same, even if its inputs have
            changed), "never", or the path of a checkpoint or a run.

    Raises:
        UserError: the directory holds another run or is not writable, or ``resume`` is not a checkpoint.
    """
    folder = Path(config.output_dir)
    _check_writable(folder)
    holds_run = any((folder / name).exists() for name in (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE))
    if resume not in ("auto", "never", ACCEPT):
        candidates = _checkpoints_at(Path(resume))
        if holds_run:
            _check_newest_of(folder, candidates[-1], resume)
            _check_same_run(folder, config)
        finished = holds_run and _is_finished(folder, config)
        return _from_newest(candidates, finished=finished, fresh=not holds_run)
    if not holds_run:
        return RunStart(None, 0, fresh=True)
    if resume == "never":
        raise UserError(
            f"output_dir: {folder} already holds a run; choose another output_dir, remove it, or resume it with "
            "--resume auto"
        )
    _check_same_run(folder, config)
    newest, finished = checkpoints(folder / "checkpoints"), _is_finished(folder, config)
    if newest:
        return _from_newest(newest, finished=finished)
    if finished:  # its checkpoints have been removed, or were never copied
        return RunStart(None, int(read_summary(folder)["epochs"]), finished=True)
    return RunStart(None, 0, restarted=True)


def _from_newest(candidates: list[Path], *, finished: bool, fresh: bool = False) -> RunStart:
    *earlier, newest = candidates
    return RunStart(newest, 0, finished=finished, fresh=fresh, earlier=tuple(earlier))._skip_visible_damage()


def verified(start: RunStart) -> RunStart:
    """Compare the checkpoint's contents with its manifest, and fall back to an earlier one if it is damaged.

    All ranks must call it; they share the reading.

    Raises:
        UserError: all checkpoints are damaged.
    """
    while start.checkpoint is not None and (problem := damage_of(start.checkpoint)) is not None:
        start = start.fall_back(problem)
    return start


def open_run(config: Config, start: RunStart) -> None:
    """Write the resolved configuration into the run directory, and clean up after an earlier part of the run: delete
    its summary, and rename damaged checkpoints.

    Raises:
        UserError: the directory cannot be written.
    """
    path = Path(config.output_dir) / CONFIG_FILE
    try:
        write_atomically(path, dump_config(config))
        (path.parent / SUMMARY_FILE).unlink(missing_ok=True)
        for damaged, _ in start.damaged:
            if damaged.parent.resolve() == (path.parent / "checkpoints").resolve():  # not another run's
                set_aside(damaged)
    except OSError as error:
        raise UserError(f"output_dir: {path.parent} cannot be written: {error.strerror}") from None


def read_summary(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a finished run."""
    return dict(json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8")))


def _check_writable(folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"output_dir: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: {folder} cannot be written: no permission for {there}")


def _checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints that ``--resume`` refers to: all of a run, oldest first, or a single one."""
    if not path.is_dir():
        raise UserError(
            f"--resume: {path} is not a folder; allowed: auto, {ACCEPT}, never, or the path of a checkpoint or a run"
        )
    if (path / CONFIG_FILE).is_file() or (path / "checkpoints").is_dir():
        found = checkpoints(path / "checkpoints")
        if not found:
            raise UserError(f"--resume: run {path} has no complete checkpoint")
        return found
    read_state(path)
    return [path]


def _check_newest_of(folder: Path, checkpoint: Path, resume: str) -> None:
    """Refuse to continue a directory from another run or from an earlier checkpoint, which would overwrite it."""
    if folder.resolve() not in checkpoint.resolve().parents:
        raise UserError(
            f"output_dir: {folder} already holds a run other than --resume {resume}; choose another output_dir"
        )
    newest = checkpoints(folder / "checkpoints")[-1:]
    if newest and newest[0].resolve() != checkpoint.resolve():
        raise UserError(
            f"output_dir: {folder} holds a later checkpoint than --resume {resume}, {newest[0].name}, which would be "
            "overwritten; choose another output_dir, or remove it"
        )


def _is_finished(folder: Path, config: Config) -> bool:
    try:
        return int(read_summary(folder)["epochs"]) >= config.train.epochs
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_same_run(folder: Path, config: Config) -> None:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"output_dir: {folder} holds a run without {CONFIG_FILE}; choose another output_dir")
    try:
        earlier = load_config(path)  # settings added by newer versions get their defaults
    except UserError as error:
        raise UserError(
            f"output_dir: {folder} holds a run that cannot be resumed ({error}); choose another output_dir"
        ) from None
    before, now = (dict(flattened(either.model_dump(mode="json"))) for either in (earlier, config))
    # If the model's content is compared, its revision may change: that is the way back if a branch has moved on.
    free = ("free", "by_content") if (folder / INPUTS_FILE).is_file() else ("free",)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and role_of(Config, key).on_resume not in free:
            given = (dict(flattened(each.model_dump(mode="json", exclude_defaults=True))) for each in (earlier, config))
            old, new = (
                value_text(short.get(key, whole.get(key))) for short, whole in zip(given, (before, now), strict=True)
            )
            raise UserError(
                f"{key}: the run in {folder} has {old}, this configuration {new}; "
                "choose another output_dir, or restore the value to resume"
            )
