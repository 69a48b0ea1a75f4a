"""The collectives that training needs; with one process they do nothing.

They use torch.distributed only; :mod:`pcpo_fast.engine.engine` creates the process group.
"""

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pcpo_fast.errors import UserError, reason_of, shared

T = TypeVar("T")
LOST_RANK = re.compile(r"Connection (closed|reset)|Broken pipe|remote process exited|Socket closed", re.IGNORECASE)
"""Error messages of gloo and NCCL when the peer process has died."""


def is_distributed() -> bool:
    """Whether a process group with more than one rank is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    """Rank within this machine, from the launcher's environment."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_gpu() -> int:
    """Index of this rank's GPU among those visible to PyTorch.

    Raises:
        UserError: this machine has fewer GPUs than ranks.
    """
    count = torch.cuda.device_count()
    if local_rank() >= count:
        raise UserError(
            f"LOCAL_RANK is {local_rank()}, counted from 0, and PyTorch sees {count} GPU{'s' if count > 1 else ''} on "
            "this machine: start one process per GPU, and let each see all of them (with Slurm --gpus-per-node, not "
            "--gpus-per-task)"
        )
    return local_rank()


def lone_device() -> torch.device:
    """The device of a command that runs in one process: the current GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ranks_per_machine(environment: Mapping[str, str] = os.environ) -> int | None:
    """Ranks per machine as set by the launcher (torchrun, DeepSpeed); None if it sets nothing."""
    text = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", ""))
    return int(text) or None if text.isdecimal() else None


def local_world_size() -> int:
    """Processes on this machine; the world size if the launcher does not set it."""
    return ranks_per_machine() or world_size()


def barrier() -> None:
    """Wait for every rank."""
    if is_distributed():
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum of a tensor over ranks, the same on every rank; a new tensor."""
    total = values.clone()
    if is_distributed():
        dist.all_reduce(total)
    return total


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate [n, ...] tensors, of equal shape on every rank, in rank order."""
    if not is_distributed():
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's (small, picklable) object, in rank order."""
    if not is_distributed():
        return [value]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


@contextmanager
def shared_errors() -> Iterator[None]:
    """Raise a :class:`UserError` of any rank within the block on every rank.

    Otherwise the other ranks would wait forever for the one that failed. All ranks must enter and leave the block.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    first = next((text for text in gather_objects(message) if text is not None), None)
    if first is not None:
        raise shared(first)


def once_per_machine(compute: Callable[[], T]) -> T:
    """Call ``compute`` on the first rank of each machine and return its (picklable) result on all ranks of the machine.

    Collective.

    Raises:
        UserError: ``compute`` raised one on some machine; raised on every rank.
    """
    if not is_distributed():
        return compute()
    mine: tuple[T, ...] = ()
    with shared_errors():
        if local_rank() == 0:
            mine = (compute(),)
    host = socket.gethostname()
    told: list[T] = [value for other, values in gather_objects((host, mine)) if other == host for value in values]
    return mine[0] if mine else told[0]


def lost_rank(error: RuntimeError) -> UserError:
    """The error to raise when a collective failed because the peer process is gone."""
    return UserError(f"another rank has died; its last output says why ({reason_of(error)})")


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Convert the error of a collective that fails because a process has died (see :func:`lost_rank`)."""
    try:
        yield
    except RuntimeError as error:
        if is_distributed() and LOST_RANK.search(str(error)):
            raise lost_rank(error) from error
        raise
