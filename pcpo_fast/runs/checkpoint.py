"""Checkpoints: DeepSpeed's state, the trained weights in diffusers' format, and the state of the training loop.

A checkpoint is written under a hidden name, gets a manifest with checksums of its files, and is renamed once complete,
so a folder ``epoch_000010`` is either complete or absent. All randomness in a run is keyed by seed and epoch, so no
generator state has to be saved.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.collectives import rank, shared_errors, world_size
from pcpo_fast.engine.engine import Engine
from pcpo_fast.engine.optimizer_state import load_resharded
from pcpo_fast.engine.resharding import UnknownLayoutError
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.files.atomic import sync_folder, write_atomically
from pcpo_fast.runs.manifest import missing_or_resized, write_manifest

if TYPE_CHECKING:  # looking at a run directory need not load the models' libraries
    from pcpo_fast.policies import Policy

STATE_FILE = "state.json"
LATEST_FILE = "latest"
"""Contains the name of the newest complete checkpoint, for scripts; resuming does not use it."""

WEIGHTS = "weights"
_NAME = re.compile(r"epoch_(\d{6,})")
_FORMER = re.compile(r"\.epoch_(\d{6,})\.old")
_LEFTOVER = re.compile(r"\.(epoch_\d{6,})\.(tmp|old|removed)")


def save_checkpoint(
    folder: Path,
    engine: Engine,
    policy: "Policy",
    epoch: int,
    state: dict[str, Any],
    keep: int,
    keep_best: int = 0,
) -> Path:
    """Write ``folder/epoch_<epoch>`` and delete obsolete checkpoints; all ranks must call it.

    Args:
        folder: the run's ``checkpoints`` folder.
        engine, policy: what to save.
        epoch: epochs trained so far.
        state: the training loop's state, JSON values only; ``keep_best`` compares its ``heldout_reward``, a number or
            None.
        keep: number of newest checkpoints to keep.
        keep_best: number of checkpoints with the highest held-out reward to keep, whatever their age.

    Raises:
        UserError: the checkpoint cannot be written; earlier checkpoints are unchanged.
    """
    final = folder / f"epoch_{epoch:06d}"
    temporary = folder / f".{final.name}.tmp"
    with _written(final, together=True):
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            temporary.mkdir()
    with _written(final, together=False):  # has collectives inside, so ranks cannot exchange errors here
        engine.save(temporary)
    weights = engine.full_state()
    with _written(final, together=True):
        if rank() == 0:
            policy.save_weights(temporary / WEIGHTS, weights)
            own = {"epoch": epoch, "updates": engine.updates, "engine": _engine_record(engine)}
            write_atomically(temporary / STATE_FILE, json.dumps(state | own))
    with _written(final, together=True):
        write_manifest(temporary)
    with _written(final, together=True):
        if rank() == 0:
            _publish(temporary, final)
            kept = [(path, _heldout_reward(path)) for path in checkpoints(folder)]
            for old in obsolete(kept, keep, keep_best):
                if old != final:
                    _remove(old)
    return final


def obsolete(oldest_first: Sequence[tuple[Path, float | None]], keep: int, keep_best: int) -> list[Path]:
    """Checkpoints to delete: all but the newest ``keep`` and the ``keep_best`` with the highest reward of all.

    Args:
        oldest_first: each checkpoint with the mean held-out reward of its weights, None if not measured. Of equal
            rewards the newer checkpoint counts as better.
        keep, keep_best: how many to keep.
    """
    measured = [(reward, number) for number, (_, reward) in enumerate(oldest_first) if reward is not None]
    best = {number for _, number in sorted(measured, reverse=True)[:keep_best]}
    return [path for number, (path, _) in enumerate(oldest_first[:-keep]) if number not in best]


def _publish(temporary: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name, then update ``latest``."""
    sync_folder(temporary)
    if final.exists():  # a resumed run reaches the same epoch again
        final.rename(final.with_name(f".{final.name}.old"))
    temporary.rename(final)
    write_atomically(final.parent / LATEST_FILE, final.name + "\n")  # also flushes the folder
    _remove_leftovers(final.parent)


@contextmanager
def _written(final: Path, together: bool) -> Iterator[None]:
    """Turn errors while writing a checkpoint into a ``UserError``, on all ranks if they can be ``together``."""
    with shared_errors() if together else nullcontext():
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
            newest = checkpoints(final.parent)[-1:]
            rest = f"resume from {newest[0].name}" if newest else "start the run again (there is no checkpoint)"
            raise UserError(
                f"checkpoint {final} cannot be written: {reason}; once there is space and permission, {rest}"
            ) from error


def load_checkpoint(path: Path, engine: Engine) -> dict[str, Any]:
    """Restore engine and optimizer from a checkpoint folder; returns the loop's state including ``epoch``.

    With the same number of ranks and the same ZeRO stage the state is restored bit for bit. Otherwise weights and
    moments are resharded: the training state is the same, but later sums may be rounded differently.

    Raises:
        UserError: the folder is not a checkpoint, is damaged, belongs to other weights, or has a layout that cannot be
            resharded.
    """
    state, now = read_state(path), _engine_record(engine)
    written = {name: state["engine"].get(name) for name in now}
    if written["weights"] != now["weights"]:
        raise UserError(
            f"checkpoint {path} holds other trained weights than this configuration (model.path, model.finetune, "
            "model.lora)"
        )
    try:
        if written == now:
            loaded = engine.load(path)
        else:
            loaded = load_resharded(path, engine, int(written["world_size"] or 0))
    except UnknownLayoutError as error:
        ranks, stage = written["world_size"], written["zero_stage"]
        raise UserError(
            f"checkpoint {path} can only be resumed on {counted(ranks, 'rank')} with ZeRO stage {stage}, as when it "
            f"was written: {error}"
        ) from None
    except (RuntimeError, LookupError, ValueError, AssertionError, OSError, EOFError, UnpicklingError) as error:
        reason = reason_of(error)
        raise UserError(f"checkpoint {path} cannot be read: {reason}") from None
    if not loaded:
        raise UserError(f"checkpoint {path} has no engine state")
    engine.updates = int(state["updates"])
    return state


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``.

    Raises:
        UserError: it is missing or invalid.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        int(state["epoch"]), int(state["updates"]), dict(state["engine"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a checkpoint of this trainer (no valid {STATE_FILE} in it)") from None
    return dict(state)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first, judged by their names and the presence of a state file."""
    if not folder.is_dir():
        return []
    # A run killed between the two renames while rewriting a checkpoint has left only the old version.
    found = {_epoch_of(path, _FORMER): path for path in folder.iterdir()}
    found |= {_epoch_of(path, _NAME): path for path in folder.iterdir()}
    return [found[epoch] for epoch in sorted(epoch for epoch in found if epoch is not None)]


def _plain_name(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(".old")


def _epoch_of(path: Path, pattern: re.Pattern[str]) -> int | None:
    match = pattern.fullmatch(path.name)
    return int(match[1]) if match and (path / STATE_FILE).is_file() else None


def visible_damage(path: Path) -> str | None:
    """Describe damage visible from a checkpoint's state file, file names and sizes; None if there is none.

    :func:`pcpo_fast.runs.manifest.damage_of` also checks the contents.
    """
    try:
        read_state(path)
    except UserError:
        return f"it has no valid {STATE_FILE}"
    return missing_or_resized(path)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is ignored but can be inspected; returns the new path."""
    target = path.with_name(f"damaged_{_plain_name(path)}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)
    return target


def _heldout_reward(path: Path) -> float | None:
    try:
        reward = read_state(path).get("heldout_reward")
    except UserError:
        return None
    return float(reward) if isinstance(reward, int | float) and math.isfinite(reward) else None


def _engine_record(engine: Engine) -> dict[str, Any]:
    """What identifies the engine's layout: trained weights (names, shapes, dtypes), ranks, ZeRO stage."""
    digest = hashlib.sha256()
    for name, parameter in engine.deepspeed.module.named_parameters():
        if parameter.requires_grad:
            digest.update(
                f"{name} {tuple(getattr(parameter, 'ds_shape', parameter.shape))} {parameter.dtype}\n".encode()
            )
    return {"weights": digest.hexdigest()[:16], "world_size": world_size(), "zero_stage": engine.zero_stage}


def _remove(path: Path) -> None:
    """Delete a checkpoint; if interrupted, the rest is not mistaken for a checkpoint."""
    hidden = path.with_name(f".{_plain_name(path)}.removed")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted save left behind, except an old version without its replacement."""
    for path in folder.iterdir():
        leftover = _LEFTOVER.fullmatch(path.name)
        if leftover and (leftover[2] != "old" or (folder / leftover[1]).exists()):
            shutil.rmtree(path, ignore_errors=True)
