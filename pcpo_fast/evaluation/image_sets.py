"""Finished images on the disk: those of a contestant, and those of a reference folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.evaluation.contestants import IMAGE_SUFFIXES
from pcpo_fast.fingerprints import files_digest


@dataclass(frozen=True)
class ImageSet:
    """Images of one origin.

    Attributes:
        name: for people.
        files: of a contestant prompt-major, k of each prompt.
        identity: hash of what made them.
    """

    name: str
    files: Sequence[Path]
    identity: str

    def read(self, index: int) -> Tensor:
        """One image, float32 [3, H, W] in 0..1.

        Raises:
            UserError: the file is damaged or no image.
        """
        return read_image(self.files[index])

    def batches(self, size: int) -> Iterator[list[Tensor]]:
        """All images in order, ``size`` at a time; they may differ in size."""
        for start in range(0, len(self.files), size):
            yield [read_image(file) for file in self.files[start : start + size]]


def read_image(file: Path) -> Tensor:
    """float32 [3, H, W] in 0..1; see :meth:`ImageSet.read`."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise UserError(f"{file} cannot be read as an image: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def folder_of_images(folder: Path, name: str, option: str, expected: int | None = None) -> ImageSet:
    """All images in a folder and below it, in the order of their names.

    Args:
        folder: where they are.
        name: of the set.
        option: begins the message of an error.
        expected: how many there must be; None: any number from two on.

    Raises:
        UserError: there is no such folder, or it holds another number of images.
    """
    if not folder.is_dir():
        raise UserError(f"{option}: {folder} is not a folder")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if expected is not None and len(files) != expected:
        raise UserError(
            f"{option}: {folder} holds {len(files)} images, but the prompts ask for {expected}: in the order of their "
            "names, all images of the first prompt, then those of the second, and so on"
        )
    if len(files) < 2:
        raise UserError(f"{option}: {folder} holds {len(files)} images ({', '.join(IMAGE_SUFFIXES)}); two are needed")
    return ImageSet(name, files, files_digest(files, folder))
