"""Published checkpoints of reward models: reading them without executing code, and loading them into modules."""

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.policies.weight_files import and_more


def read_checkpoint(file: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a PyTorch file that contains nothing but tensors, by name.

    A nested dictionary (``state_dict`` or ``model``) is unwrapped, and the prefix ``module.`` of distributed training
    is removed.

    Args:
        file: the checkpoint.
        where: prefix of error messages.

    Raises:
        UserError: the file is not a checkpoint, or contains code.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise UserError(
            f"{where}: {file} is not a PyTorch checkpoint, or holds objects other than tensors, which are not loaded "
            "for safety; allowed are plain weights in a .pt, .pth, .bin or .safetensors file"
        ) from None
    except Exception as error:  # every library raises its own errors for invalid files
        raise UserError(f"{where}: {file} cannot be read as a checkpoint: {reason_of(error)}") from None
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{where}: {file} does not hold a dictionary of tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def module_of(
    make: Callable[[], Any],
    weights: Mapping[str, Tensor],
    what: str,
    names: Sequence[tuple[str, str]] = (),
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> Any:
    """A module on the CPU with exactly the weights of a checkpoint.

    Args:
        make: creates the module; called on the meta device.
        weights: the checkpoint's tensors.
        what: prefix of error messages: "reward x: FILE" and what it should be.
        names: regular expressions and replacements that, applied in order, map the module's names to the checkpoint's.
        change: converts a checkpoint tensor, given the module's name for it.

    Raises:
        UserError: a weight is missing, unknown or of the wrong shape.
    """
    with torch.device("meta"):
        module = make()
    empty = module.state_dict()
    sources = {name: name for name in empty}
    for pattern, replacement in names:
        sources = {name: re.sub(pattern, replacement, source) for name, source in sources.items()}
    missing = sorted(set(sources.values()) - set(weights))
    unknown = sorted(set(weights) - set(sources.values()))
    if missing:
        raise UserError(f"{what}: it lacks {missing[0]}{and_more(missing)}")
    if unknown:
        raise UserError(f"{what}: it has an unexpected {unknown[0]}{and_more(unknown)}")
    state = {name: change(name, weights[source]) for name, source in sources.items()}
    for name, tensor in state.items():
        if tensor.shape != empty[name].shape:
            source = sources[name]
            raise UserError(
                f"{what}: {source} has the shape {list(weights[source].shape)}, which does not fit the others"
            )
    module.load_state_dict(state, assign=True)
    for part in module.modules():
        # Position ids are not weights and not in checkpoints.
        positions = part._buffers.get("position_ids")
        if positions is not None:
            part.register_buffer("position_ids", torch.arange(positions.shape[-1])[None], persistent=False)
    return module


def shape_of(weights: Mapping[str, Tensor], name: str, dimensions: int, what: str) -> list[int]:
    """The shape of a checkpoint's weight.

    Raises:
        UserError: the weight is missing or has another number of dimensions; ``what`` is the prefix of the message.
    """
    if name not in weights:
        raise UserError(f"{what}: it lacks {name}")
    found = list(weights[name].shape)
    if len(found) != dimensions:
        raise UserError(f"{what}: {name} has the shape {found}, not {counted(dimensions, 'dimension')}")
    return found


def depth_of(weights: Mapping[str, Tensor], layers: str) -> int:
    """Number of layers in a checkpoint whose names are ``layers``, a dot and the layer's number."""
    found = [re.match(rf"{re.escape(layers)}\.(\d+)\.", name) for name in weights]
    return 1 + max((int(match[1]) for match in found if match), default=0)
