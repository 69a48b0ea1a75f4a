"""Loads a checkpoint's optimizer state into an engine with another number of ranks or ZeRO stage."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.distributed.collectives import rank, world_size
from pcpo_fast.engine.engine import STATE_FOLDER, Engine, read_average, read_state_file
from pcpo_fast.engine.resharding import SavedState


def load_resharded(path: Path, engine: Engine, ranks: int) -> bool:
    """Load every parameter's weights and moments from shards of another number of ranks or ZeRO stage.

    The moving average, which is sharded like the weights, is loaded as well.

    Args:
        path: the checkpoint's folder.
        engine: receives the state.
        ranks: number of ranks that wrote the checkpoint.

    Returns:
        False if the folder does not contain one file of optimizer states for each of those ranks.

    Raises:
        UnknownLayoutError: the shards have a layout that cannot be resharded.
    """
    folder = path / STATE_FOLDER
    trained = {name: p for name, p in engine.deepspeed.module.named_parameters() if p.requires_grad}
    files = sorted(folder.glob("*_optim_states.pt"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    if len(files) != ranks or not files:
        return False
    shards = [read_state_file(file, "cpu", mmap=True)["optimizer_state_dict"] for file in files]
    parts = [] if engine.ema is None else [read_average(path, number) for number in range(ranks)]
    averages = [part["average"] for part in parts if part is not None]
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in trained.items()}
    saved = SavedState(shards, sizes, averages or None)
    if saved.step is not None:
        for flat in _flat_groups(engine):  # AdamW creates its state in its first step; create it now, to fill it below
            engine.optimizer.state[flat] = {"step": saved.step.clone()} | {
                key: torch.zeros_like(flat, memory_format=torch.contiguous_format) for key in saved.moments
            }
    for name, parameter in trained.items():
        weights = saved.full(name)
        moments = {key: saved.full(name, key) for key in saved.moments}
        average = saved.full(name, "average") if averages else None
        if hasattr(parameter, "ds_id"):
            _set_scattered(engine, parameter, weights, moments, average)
        else:
            _set_whole(engine, parameter, weights, moments, average)
    if engine.ema is not None and averages:
        engine.ema.updates = next(part["updates"] for part in parts if part is not None)
    else:
        engine.begin_average()
    return True


def _flat_groups(engine: Engine) -> list[Tensor]:
    """The flat vectors that the optimizer updates."""
    zero = engine.deepspeed.optimizer
    scattered = getattr(zero, "fp32_partitioned_groups_flat", None)
    return list(scattered) if scattered is not None else [p for g in engine.optimizer.param_groups for p in g["params"]]


@torch.no_grad()
def _set_scattered(
    engine: Engine, parameter: Any, weights: Tensor, moments: dict[str, Tensor], average: Tensor | None
) -> None:
    """Set a ZeRO-3 parameter: this rank's shard, and the weights that the model computes with."""
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    def piece(whole: Tensor) -> Tensor:
        count = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(whole, (0, count * world_size() - whole.numel()))
        return padded.narrow(0, rank() * count, count)

    safe_set_local_fp32_param(parameter, piece(weights))
    for key, moment in moments.items():
        safe_set_local_optimizer_state(parameter, piece(moment), key)
    if engine.ema is not None and average is not None:
        zero = engine.deepspeed.optimizer
        group, start, count = zero.grad_position[zero.get_param_id(parameter)]
        engine.ema.average[group].narrow(0, start, count).copy_(piece(average))
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if rank() == 0:
            parameter.copy_(weights.view_as(parameter))


@torch.no_grad()
def _set_whole(
    engine: Engine, parameter: Any, weights: Tensor, moments: dict[str, Tensor], average: Tensor | None
) -> None:
    """Set a ZeRO-1 or ZeRO-2 parameter: the weights, and this rank's part of the master weights and moments."""
    parameter.copy_(weights.view_as(parameter))
    mapping = parameter._hp_mapping
    if mapping is None:
        return
    source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
    mapping.hp_fragment.copy_(weights.narrow(0, source.start, source.numel))
    flat = _flat_groups(engine)[mapping.param_group_index]
    for key, moment in moments.items():
        part = moment.narrow(0, source.start, source.numel)
        engine.optimizer.state[flat][key].narrow(0, target.start, target.numel).copy_(part)
    if engine.ema is not None and average is not None:
        held = engine.ema.average[mapping.param_group_index].narrow(0, target.start, target.numel)
        held.copy_(average.narrow(0, source.start, source.numel))
