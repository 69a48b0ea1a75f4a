"""Image files on disk: those of a candidate, or of a reference folder."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.collectives import rank
from pcpo_fast.errors import UserError
from pcpo_fast.files.content import files_digest
from pcpo_fast.files.image_files import IMAGE_SUFFIXES, UNREAD_SUFFIXES, find_images, read_image
from pcpo_fast.prompts import load_prompts

MANIFEST_FILE = "prompts.jsonl"


@dataclass(frozen=True)
class ImageSet:
    """The image files of one candidate or reference.

    Attributes:
        name: shown to users.
        files: prompt-major for a candidate, k per prompt.
        identity: hash of everything that determines the images.
    """

    name: str
    files: Sequence[Path]
    identity: str

    def read(self, index: int) -> Tensor:
        """One image, float32 [3, H, W] in 0..1.

        Raises:
            UserError: the file is damaged or not an image; see :func:`pcpo_fast.files.image_files.read_image`.
        """
        return read_image(self.files[index])

    def batches(self, size: int) -> Iterator[list[Tensor]]:
        """All images in order, ``size`` at a time; they may differ in size."""
        for start in range(0, len(self.files), size):
            yield [read_image(file) for file in self.files[start : start + size]]


def folder_of_images(
    folder: Path, name: str, option: str, expected: int | None = None, texts: Sequence[str] | None = None
) -> ImageSet:
    """All images in a folder and its subfolders.

    Files are matched to prompts by a manifest in the folder (``prompts.jsonl`` with a ``file_name`` in every line) or,
    without one, by the natural order of their names.

    Args:
        folder: the folder.
        name: name of the set.
        option: prefix of error messages.
        expected: required number of images; None: two or more, in any order.
        texts: the prompt of each expected image.

    Raises:
        UserError: the folder does not exist, holds another number of images, or its manifest does not match.
    """
    if not folder.is_dir():
        raise UserError(f"{option}: {folder} is not a folder")
    listed = None if expected is None else _manifest(folder)
    if listed is not None and texts is not None:
        files = _of_prompts(listed, texts, f"{option}: {folder / MANIFEST_FILE}")
    else:
        files = find_images(folder) if listed is None else [file for file, _ in listed]
        unread = len(find_images(folder, UNREAD_SUFFIXES)) if listed is None else 0
        without = f" (besides {unread} that are not read: {', '.join(UNREAD_SUFFIXES)})" if unread else ""
        if expected is not None and len(files) != expected:
            raise UserError(
                f"{option}: {folder} holds {counted(len(files), 'image')}{without}, but the prompts require "
                f"{expected}: sorted by name, all images of the first prompt, then those of the second, and so on"
            )
        if len(files) < 2:
            raise UserError(
                f"{option}: {folder} holds {counted(len(files), 'image')} ({', '.join(IMAGE_SUFFIXES)}){without}; at "
                "least 2 are needed"
            )
        if rank() == 0 and unread:
            warnings.warn(f"{folder} holds {counted(len(files), 'image')}{without}", stacklevel=2)
        odd = next((pair for pair in pairwise(files) if pair[0] > pair[1]), None)
        if rank() == 0 and expected is not None and listed is None and odd is not None:
            warnings.warn(
                f"the images of {folder} are sorted by the numbers in their names: {odd[0].relative_to(folder)} comes "
                f"before {odd[1].relative_to(folder)}, unlike in alphabetical order",
                stacklevel=2,
            )
    try:
        return ImageSet(name, files, files_digest(files, folder))
    except OSError as error:
        raise UserError(f"{option}: {error.filename} cannot be read: {error.strerror}") from None


def _manifest(folder: Path) -> list[tuple[Path, str]] | None:
    """(image, prompt) of every line; None without a manifest, or if it only lists prompts."""
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        return None
    prompts = load_prompts(manifest)
    if not any("file_name" in prompt.metadata for prompt in prompts):
        return None
    listed: dict[Path, str] = {}
    for number, prompt in enumerate(prompts, start=1):
        name = prompt.metadata.get("file_name")
        if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f'{manifest} entry {number}: "file_name" must be the path of an image below {folder}')
        if not (folder / name).is_file():
            raise UserError(f"{manifest} entry {number}: there is no {name}")
        if folder / name in listed:
            raise UserError(f"{manifest} entry {number}: {name} is listed twice")
        listed[folder / name] = prompt.text
    return list(listed.items())


def _of_prompts(listed: Sequence[tuple[Path, str]], texts: Sequence[str], where: str) -> list[Path]:
    """The images in the order of ``texts``; images of the same prompt in the order of the manifest."""
    waiting: dict[str, list[Path]] = {}
    for file, text in listed:
        waiting.setdefault(text, []).append(file)
    files = []
    for text in texts:
        if not waiting.get(text):
            raise UserError(
                f"{where} has {counted(sum(text == other for _, other in listed), 'image')} of the prompt {text!r}, "
                f"but the evaluation asks for {sum(text == other for other in texts)}"
            )
        files.append(waiting[text].pop(0))
    left = next((found for found in waiting.items() if found[1]), None)
    if left is not None:
        raise UserError(
            f"{where} has more images of the prompt {left[0]!r} than the evaluation asks for; {left[1][0].name} is "
            "left over"
        )
    return files
