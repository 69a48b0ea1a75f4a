"""Image files: finding them in a folder, natural order, and reading pixels."""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif")
UNREAD_SUFFIXES = (".gif", ".heic", ".heif", ".jp2", ".jxl")
"""Image formats that are not supported."""
# Formats are detected by content. Restricting them keeps Pillow from running Ghostscript on a renamed PostScript file.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF")
_ANIMATED = ("PNG", "WEBP", "AVIF")  # a TIFF's or MPO's further images are thumbnails, gain maps or pages
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def is_image(file: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> bool:
    """Whether the name is that of an image and not hidden (such as macOS's ``._0.png``)."""
    return file.suffix.lower() in suffixes and not file.name.startswith(".")


def find_images(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """All images in a folder and its subfolders, without hidden files and folders, in the order of :func:`by_number`.

    Args:
        folder: where to search.
        suffixes: lower-case extensions of the files to find.

    Raises:
        UserError: a folder cannot be read.
    """
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if is_image(Path(name), suffixes)]
    return sorted(found, key=lambda file: by_number(file.relative_to(folder)))


def by_number(path: Path) -> tuple[object, ...]:
    """Sort key for natural order: 2.png comes before 10.png, and folders likewise."""
    *folders, name = path.parts
    parts = (*folders, Path(name).stem)
    # re.split puts text at even and numbers at odd places, so text is compared with text and numbers with numbers.
    numbers = tuple(
        tuple(int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", text)))
        for text in parts
    )
    return numbers, path.parts


def read_image(file: Path) -> Tensor:
    """The pixels as displayed, float32 [3, H, W] in 0..1.

    EXIF orientation is applied, transparency is composited over white, and 16-bit grey keeps its precision.

    Raises:
        UserError: the file is missing, damaged, an animation, not in a supported format, or so large that decoding may
            exhaust memory (more than ``PIL.Image.MAX_IMAGE_PIXELS``).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_FORMATS) as opened:
                frames = getattr(opened, "n_frames", 1)
                if opened.format in _ANIMATED and frames > 1:
                    raise ValueError(f"it is an animation of {counted(frames, 'frame')}")
                pixels = _pixels(opened)
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{file} cannot be read as an image: {reason.splitlines()[0]}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _pixels(opened: Image.Image) -> np.ndarray:
    """float32 [H, W, 3]."""
    tags = getattr(opened, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]  # a TIFF may store 12 bits in 16
    inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    clear = opened.info.get("transparency")
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = values.astype(np.float32) / (2**bits - 1)
        grey = np.where(values == clear, np.float32(1), 1 - grey if inverted else grey)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("it has 32-bit pixels, whose white value is unknown; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
