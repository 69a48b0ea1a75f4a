"""Reading weights from files that a user may have downloaded: tensors only, nothing is executed."""

import pickle
from pathlib import Path

from torch import Tensor

from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.rewards.checkpoints import load_tensors
from pcpo_fast.rewards.model_files import pretrained_file


def weights_file(path: str, where: str) -> Path:
    """Where the weights are that :func:`read_weights` reads, whose arguments it takes.

    Raises:
        UserError: there is no such thing.
    """
    return pretrained_file(where, where.removeprefix("--").partition("=")[0], path, "model.safetensors")


def read_weights(path: str, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors or ``.pth`` file, of a folder's ``model.safetensors``, or of such a hub repository.

    Args:
        path: file, folder or hub id "owner/name".
        where: begins the message of an error.

    Raises:
        UserError: there is no such thing, or it holds something else than tensors.
    """
    file = weights_file(path, where)
    try:
        state = load_tensors(file)
    except pickle.UnpicklingError:
        raise UserError(
            f"{where}: {file} is no file of weights, or holds other things than tensors, which are not read for safety"
        ) from None
    except Exception as error:  # of several libraries, each with its own kind
        reason = reason_of(error)
        raise UserError(f"{where}: {file} cannot be read as weights: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{where}: {file} does not hold a table of tensors")
    return state
