"""Checkpoints: DeepSpeed's state, the trained weights in diffusers' format, and where the loop stood.

A checkpoint is written under a hidden name and renamed when it is whole, so a folder ``epoch_000010`` is complete or
not there. Everything random in a run is keyed by its seed and the epoch, so no generator state needs saving.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from pcpo_fast.atomic import write_atomically
from pcpo_fast.distributed import barrier, rank, world_size
from pcpo_fast.engine import Engine
from pcpo_fast.errors import UserError

if TYPE_CHECKING:  # looking at a run directory need not load the models' libraries
    from pcpo_fast.policies import Policy

STATE_FILE = "state.json"
WEIGHTS = "weights"
_NAME = re.compile(r"epoch_\d{6,}")
_LEFTOVER = re.compile(r"\.epoch_\d{6,}\.(tmp|old)")


def save_checkpoint(
    folder: Path, engine: Engine, policy: "Policy", epoch: int, state: dict[str, Any], keep: int
) -> Path:
    """Write ``folder/epoch_<epoch>`` and drop all but the newest ``keep`` checkpoints; all ranks must call it.

    Args:
        folder: the run's ``checkpoints`` folder.
        engine, policy: what is saved.
        epoch: epochs trained so far.
        state: the loop's own state, JSON values only.
        keep: checkpoints that stay.
    """
    final = folder / f"epoch_{epoch:06d}"
    temporary = folder / f".{final.name}.tmp"
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
    barrier()
    engine.save(temporary)
    weights = engine.full_state()
    if rank() == 0:
        policy.save_weights(temporary / WEIGHTS, weights)
        own = {"epoch": epoch, "updates": engine.updates, "engine": _engine_record(engine)}
        write_atomically(temporary / STATE_FILE, json.dumps(state | own))
    barrier()
    if rank() == 0:
        if final.exists():  # a resumed run comes by the same epoch again
            final.rename(folder / f".{final.name}.old")
        temporary.rename(final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
        _remove_leftovers(folder)
    barrier()
    return final


def load_checkpoint(path: Path, engine: Engine) -> dict[str, Any]:
    """Restore engine and optimiser from a checkpoint folder; returns the loop's state with its ``epoch``.

    Raises:
        UserError: the folder is no checkpoint, is damaged, or was written for other weights, ranks or ZeRO stage.
    """
    state = read_state(path)
    written = state["engine"]
    for name, now in _engine_record(engine).items():
        if written.get(name) == now:
            continue
        if name == "weights":
            raise UserError(f"checkpoint {path} is of other trained weights (model.path, model.finetune, model.lora)")
        raise UserError(
            f"checkpoint {path} was written with {name} {written.get(name)}, this run has {now}: resume with the same"
        )
    try:
        loaded = engine.load(path)
    except (RuntimeError, LookupError, ValueError, AssertionError, OSError, EOFError, UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
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
    """Complete checkpoints under ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("epoch_")))


def _engine_record(engine: Engine) -> dict[str, Any]:
    """What a run must share with a checkpoint to take up its state: weights by name and shape, ranks, ZeRO stage."""
    digest = hashlib.sha256()
    for name, parameter in engine.deepspeed.module.named_parameters():
        if parameter.requires_grad:
            digest.update(
                f"{name} {tuple(getattr(parameter, 'ds_shape', parameter.shape))} {parameter.dtype}\n".encode()
            )
    return {"weights": digest.hexdigest()[:16], "world_size": world_size(), "zero_stage": engine.zero_stage}


def _remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted save left behind."""
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
