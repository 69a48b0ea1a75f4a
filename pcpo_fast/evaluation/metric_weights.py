"""Reading weights from files that a user may have downloaded: tensors only, nothing is executed."""

from pathlib import Path

from torch import Tensor

from pcpo_fast.rewards.checkpoints import read_checkpoint
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
    return read_checkpoint(weights_file(path, where), where)
