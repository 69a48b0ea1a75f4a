"""Reading weights from untrusted files: tensors only, nothing is executed."""

from pathlib import Path

from torch import Tensor

from pcpo_fast.rewards.checkpoints import read_checkpoint
from pcpo_fast.rewards.model_files import pretrained_file


def weights_file(path: str, where: str) -> Path:
    """The file that :func:`read_weights` would read for the same arguments.

    Raises:
        UserError: it does not exist.
    """
    return pretrained_file(where, where.removeprefix("--").partition("=")[0], path, "model.safetensors")


def read_weights(path: str, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors or ``.pth`` file, or of ``model.safetensors`` in a folder or hub repository.

    Args:
        path: file, folder or hub id "owner/name".
        where: prefix of error messages.

    Raises:
        UserError: the file does not exist, or holds anything other than tensors.
    """
    return read_checkpoint(weights_file(path, where), where)
