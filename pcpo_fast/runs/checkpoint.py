"""Checkpoints: DeepSpeed's state, the trained weights as diffusers loads them, and where the loop stood.

A checkpoint is written under a hidden name, gets a manifest of its files' checksums, and is renamed when it is whole,
so a folder ``epoch_000010`` is complete or not there. Everything random in a run is keyed by its seed and the epoch, so
no generator state needs saving.
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
"""Holds the name of the newest complete checkpoint, for scripts; resuming looks at the checkpoints themselves."""

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
    """Write ``folder/epoch_<epoch>`` and drop the checkpoints that need not stay; all ranks must call it.

    Args:
        folder: the run's ``checkpoints`` folder.
        engine, policy: what is saved.
        epoch: epochs trained so far.
        state: the loop's own state, JSON values only; ``heldout_reward`` in it, a number or None, is what
            ``keep_best`` goes by.
        keep: newest checkpoints that stay.
        keep_best: checkpoints that stay for their held-out reward, whatever their age.

    Raises:
        UserError: it cannot be written; the earlier checkpoints are as they were.
    """
    final = folder / f"epoch_{epoch:06d}"
    temporary = folder / f".{final.name}.tmp"
    with _written(final, together=True):
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            temporary.mkdir()
    with _written(final, together=False):  # DeepSpeed's ranks wait for each other within
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
    """Which checkpoints may go: all but the newest ``keep`` and, of all, the ``keep_best`` with the highest reward.

    Args:
        oldest_first: each checkpoint and the mean held-out reward of its weights, None where it was not measured. Of
            equal rewards the newer checkpoint counts as better.
        keep, keep_best: how many stay.
    """
    measured = [(reward, number) for number, (_, reward) in enumerate(oldest_first) if reward is not None]
    best = {number for _, number in sorted(measured, reverse=True)[:keep_best]}
    return [path for number, (path, _) in enumerate(oldest_first[:-keep]) if number not in best]


def _publish(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name, then point ``latest`` at it."""
    sync_folder(temporary)
    if final.exists():  # a resumed run reaches the same epoch again
        final.rename(final.with_name(f".{final.name}.old"))
    temporary.rename(final)
    write_atomically(final.parent / LATEST_FILE, final.name + "\n")  # flushes the folder, too
    _remove_leftovers(final.parent)


@contextmanager
def _written(final: Path, together: bool) -> Iterator[None]:
    """Make what fails on the way to a checkpoint one sentence, on every rank where they can be told ``together``."""
    with shared_errors() if together else nullcontext():
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
            newest = checkpoints(final.parent)[-1:]
            rest = f"the run can be resumed from {newest[0].name}" if newest else "there is no earlier one"
            raise UserError(
                f"checkpoint {final} cannot be written: {reason}; {rest} once there is space and permission"
            ) from error


def load_checkpoint(path: Path, engine: Engine) -> dict[str, Any]:
    """Restore engine and optimiser from a checkpoint folder; returns the loop's state with its ``epoch``.

    The same number of ranks and ZeRO stage restore it bit for bit. Where they differ, weights and moments are
    resharded: the training state is the same, and what follows differs by how sums are rounded.

    Raises:
        UserError: the folder is no checkpoint, is damaged, or was written for other weights, or in a form that other
            ranks or another ZeRO stage cannot take up.
    """
    state, now = read_state(path), _engine_record(engine)
    written = {name: state["engine"].get(name) for name in now}
    if written["weights"] != now["weights"]:
        raise UserError(f"checkpoint {path} belongs to other trained weights (model.path, model.finetune, model.lora)")
    try:
        if written == now:
            loaded = engine.load(path)
        else:
            loaded = load_resharded(path, engine, int(written["world_size"] or 0))
    except UnknownLayoutError as error:
        ranks, stage = written["world_size"], written["zero_stage"]
        raise UserError(
            f"checkpoint {path} can only be resumed on {ranks} ranks with ZeRO stage {stage}, as it was written: "
            f"{error}"
        ) from None
    except (RuntimeError, LookupError, ValueError, AssertionError, OSError, EOFError, UnpicklingError) as error:
        reason = reason_of(error)
        raise UserError(f"checkpoint {path} cannot be read: {reason}") from None
    if not loaded:
        raise UserError(f"checkpoint {path} holds no engine state")
    engine.updates = int(state["updates"])
    return state


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``.

    Raises:
        UserError: it is missing or not what this file writes.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        int(state["epoch"]), int(state["updates"]), dict(state["engine"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a checkpoint of this trainer (no valid {STATE_FILE} in it)") from None
    return dict(state)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under ``folder``, oldest first, by their names and state files: nothing else is read."""
    if not folder.is_dir():
        return []
    # One killed between the two renames of a checkpoint that is written again has left its former self.
    found = {_epoch_of(path, _FORMER): path for path in folder.iterdir()}
    found |= {_epoch_of(path, _NAME): path for path in folder.iterdir()}
    return [found[epoch] for epoch in sorted(epoch for epoch in found if epoch is not None)]


def _plain_name(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(".old")


def _epoch_of(path: Path, pattern: re.Pattern[str]) -> int | None:
    match = pattern.fullmatch(path.name)
    return int(match[1]) if match and (path / STATE_FILE).is_file() else None


def visible_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint by its state and its files' names and sizes, in a few words; None: nothing.

    :func:`pcpo_fast.runs.manifest.damage_of` reads all of it.
    """
    try:
        read_state(path)
    except UserError:
        return f"it has no valid {STATE_FILE}"
    return missing_or_resized(path)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it counts no more but can be looked at; returns the new path."""
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
    """What a run must share with a checkpoint to take up its state: weights by name and shape, ranks, ZeRO stage."""
    digest = hashlib.sha256()
    for name, parameter in engine.deepspeed.module.named_parameters():
        if parameter.requires_grad:
            digest.update(
                f"{name} {tuple(getattr(parameter, 'ds_shape', parameter.shape))} {parameter.dtype}\n".encode()
            )
    return {"weights": digest.hexdigest()[:16], "world_size": world_size(), "zero_stage": engine.zero_stage}


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed in the middle, what is left of it does not look like one."""
    hidden = path.with_name(f".{_plain_name(path)}.removed")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted save left behind, but for a checkpoint that lost its successor."""
    for path in folder.iterdir():
        leftover = _LEFTOVER.fullmatch(path.name)
        if leftover and (leftover[2] != "old" or (folder / leftover[1]).exists()):
            shutil.rmtree(path, ignore_errors=True)
