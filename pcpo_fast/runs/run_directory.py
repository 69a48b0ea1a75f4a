"""Taking possession of a run directory: new, to be resumed, or already complete; never overwritten in silence."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.loading import dump_config, load_config
from pcpo_fast.config.roles import role_of
from pcpo_fast.config.schema import Config
from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.runs.checkpoint import checkpoints, read_state, set_aside, visible_damage
from pcpo_fast.runs.input_record import ACCEPT, INPUTS_FILE
from pcpo_fast.runs.manifest import damage_of

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, CREDIT_FILE = "config.yaml", "metrics.jsonl", "summary.json", "credit.json"


@dataclass(frozen=True)
class RunStart:
    """How a run begins.

    Attributes:
        checkpoint: what to resume from; None for a run from its beginning, or a complete one that has none left.
        epoch: epochs already trained.
        finished: the run is complete: there is nothing to train.
        restarted: the directory holds a run that left no checkpoint, so it begins again.
        fresh: the directory held no run; with a checkpoint, the run starts from one of another run.
        earlier: complete checkpoints before ``checkpoint`` that may take its place, oldest first.
        damaged: checkpoints that were skipped, with what is wrong with each.
    """

    checkpoint: Path | None
    epoch: int
    finished: bool = False
    restarted: bool = False
    fresh: bool = False
    earlier: tuple[Path, ...] = ()
    damaged: tuple[tuple[Path, str], ...] = ()

    def passing_over(self, problem: str) -> "RunStart":
        """The start from the checkpoint before, since this one's is damaged.

        Raises:
            UserError: there is none before it.
        """
        assert self.checkpoint is not None
        damaged = (*self.damaged, (self.checkpoint, problem))
        if not self.earlier:
            what = "; ".join(f"{path}: {text}" for path, text in damaged)
            raise UserError(
                f"every checkpoint is damaged, so there is nothing to resume from ({what}); name another one with "
                "--resume CHECKPOINT, or start over in another output_dir"
            )
        *earlier, checkpoint = self.earlier
        return replace(self, checkpoint=checkpoint, earlier=tuple(earlier), damaged=damaged)._whole_by_sight()

    def _whole_by_sight(self) -> "RunStart":
        """Pass over what is damaged by its files' names and sizes; sets :attr:`epoch`."""
        assert self.checkpoint is not None
        problem = visible_damage(self.checkpoint)
        if problem is not None:
            return self.passing_over(problem)
        return replace(self, epoch=int(read_state(self.checkpoint)["epoch"]))


def claim(config: Config, resume: str) -> RunStart:
    """Look at ``output_dir`` and decide how the run begins; changes nothing.

    Args:
        config: the run.
        resume: "auto" (continue where the directory's run stopped), "accept-changes" (the same, even if what it
            reads has changed), "never", or the path of a checkpoint or a run.

    Raises:
        UserError: the directory holds another run, or cannot hold one, or ``resume`` names no checkpoint.
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
    return RunStart(newest, 0, finished=finished, fresh=fresh, earlier=tuple(earlier))._whole_by_sight()


def verified(start: RunStart) -> RunStart:
    """Read the checkpoint of a start and hold it against its manifest; where it is damaged, go back to one that is not.

    All ranks must call it, and share the reading.

    Raises:
        UserError: none is whole.
    """
    while start.checkpoint is not None and (problem := damage_of(start.checkpoint)) is not None:
        start = start.passing_over(problem)
    return start


def open_run(config: Config, start: RunStart) -> None:
    """Record the resolved configuration in the run directory, and take away what the run has left behind: the summary
    of an earlier, shorter run, and damaged checkpoints, which get another name.

    Raises:
        UserError: the directory cannot be written.
    """
    path = Path(config.output_dir) / CONFIG_FILE
    try:
        write_atomically(path, dump_config(config))
        (path.parent / SUMMARY_FILE).unlink(missing_ok=True)
        for damaged, _ in start.damaged:
            if damaged.parent.resolve() == (path.parent / "checkpoints").resolve():  # another run's are its own affair
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
    """What ``--resume`` names: a run's checkpoints, oldest first, or the one."""
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
    """Going on in the same directory from another run, or from before its end, would overwrite what it holds."""
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
        earlier = load_config(path)  # what a newer version added has its default
    except UserError as error:
        raise UserError(
            f"output_dir: {folder} holds a run that cannot be resumed ({error}); choose another output_dir"
        ) from None
    before, now = (dict(flattened(either.model_dump(mode="json"))) for either in (earlier, config))
    # Where the model's content is compared, a revision is but a name: the way back to it where a branch moved on.
    free = ("free", "by_content") if (folder / INPUTS_FILE).is_file() else ("free",)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and role_of(Config, key).on_resume not in free:
            raise UserError(
                f"{key}: the run in {folder} has {before.get(key)!r}, this configuration {now.get(key)!r}; "
                "choose another output_dir, or restore the value to resume"
            )
