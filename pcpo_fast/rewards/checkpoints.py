"""Published checkpoints of reward models: read without running anything in them, and held against what is expected."""

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcpo_fast.errors import UserError, reason_of


@dataclass(frozen=True)
class Source:
    """Where a weight comes from: the checkpoint's name, and what becomes of the tensor."""

    name: str
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor


def load_tensors(file: Path) -> Any:
    """What a ``.safetensors`` or PyTorch file holds, on the CPU; nothing but tensors and plain containers is let in.

    Raises:
        pickle.UnpicklingError: a PyTorch file with anything else, or none at all.
        Exception: of either library, for a file that is none of its kind.
    """
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def read_weights(file: Path, where: str) -> dict[str, Tensor]:
    """Tensors by name of a ``.safetensors`` file, or of a PyTorch file in which nothing but tensors is let in.

    A dictionary within (``state_dict`` or ``model``) is looked into, and the prefix ``module.`` of distributed training
    is taken off.

    Args:
        file: the checkpoint.
        where: reward and option, for messages.

    Raises:
        UserError: not a checkpoint, or one that holds code.
    """
    try:
        found = load_tensors(file)
    except pickle.UnpicklingError:
        raise UserError(
            f"{where}: {file} is not a PyTorch checkpoint, or holds other things than tensors, which are not read for "
            "safety; allowed are weights alone, in a .pt, .pth, .bin or .safetensors file"
        ) from None
    except Exception as error:  # each library has errors of its own for a file that is none of its kind
        reason = reason_of(error)
        raise UserError(f"{where}: {file} cannot be read as a checkpoint: {reason}") from None
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{where}: {file} holds no dictionary of tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def check_names(found: Iterable[str], expected: Iterable[str], ignored: Iterable[str], what: str) -> None:
    """Refuse a checkpoint that lacks a weight or has one too many.

    Args:
        found: the checkpoint's names.
        expected: names it must have.
        ignored: names it may have.
        what: "reward x: FILE" and what it should be, for the message.
    """
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected) - set(ignored))
    if missing:
        raise UserError(f"{what}: it lacks {_some(missing)}")
    if unknown:
        raise UserError(f"{what}: it has {_some(unknown)}, which is unknown")


def fill(module: nn.Module, weights: Mapping[str, Tensor], sources: Mapping[str, Source], what: str) -> None:
    """Put a checkpoint's weights into a module made on the meta device.

    Args:
        module: gets all its parameters here.
        weights: the checkpoint's tensors; names were checked.
        sources: where each entry of the module's state comes from.
        what: "reward x: FILE" and what it should be, for the message.

    Raises:
        UserError: a shape differs.
    """
    state = {}
    for name, empty in module.state_dict().items():
        source = sources[name]
        tensor = source.change(weights[source.name])
        if tensor.shape != empty.shape:
            raise UserError(
                f"{what}: {source.name} has the shape {list(weights[source.name].shape)}, which does not fit the others"
            )
        state[name] = tensor
    module.load_state_dict(state, assign=True)
    for part in module.modules():
        # Numbers of positions are no weights, so no checkpoint holds them.
        empty = part._buffers.get("position_ids")
        if empty is not None:
            part.register_buffer("position_ids", torch.arange(empty.shape[-1])[None], persistent=False)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
