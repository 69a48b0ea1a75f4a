"""What files, folders and settings hold, as short hashes: so that nothing is made twice and nothing stale is used.

:class:`Contents` reads every byte of a file once and remembers its hash. It recognises the file by path, inode, size,
mtime and ctime. A copy that keeps size and date still has its own inode or ctime, so it is read, too. Bytes that change
behind all of these (on a store mounted without real inodes and times) are found only by reading anew.
"""

import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pcpo_fast.distributed.collectives import launcher_rank
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.files.atomic import write_atomically

INDEX = "model_index.json"
RECORD_FOLDER = "content"
"""Name of the record's folder, next to the encoded prompts."""
ANNOUNCED = 10**9
"""Reading at least this many bytes is announced."""
SETTLED = 2.0
"""Seconds for which a file must have been unchanged before its hash is remembered: the coarsest tick of a file system's
clock, since a second change within one tick would leave no trace."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_NEVER_READ = (".md", ".msgpack", ".h5", ".ot", ".onnx", ".onnx_data", ".xml", ".tflite", ".png", ".jpg", ".lock")
_PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")
_BLOCK, _BLOCKS = 1 << 16, 64
"""Of a large file, :func:`weights_digest` reads so many blocks of so many bytes."""


class Contents:
    """Hashes of files, with a record on the disk that any number of processes and machines may share.

    The record is a file per hashed file, written whole or not at all, and with a checksum: one that is damaged counts
    as none. Where it cannot be written, nothing is remembered.

    Args:
        record: its folder; None: every call reads the files.
        anew: read the files whatever the record says of them, and correct it.
    """

    def __init__(self, record: Path | None = None, *, anew: bool = False) -> None:
        self.record = record
        self.anew = anew

    def of_file(self, file: Path | str) -> str:
        """The hash of a file's bytes: BLAKE2b, 32 hexadecimal digits.

        Raises:
            UserError: it cannot be read, or a record that is wrong cannot be corrected.
        """
        try:
            # The status of an open file is never a network disk's old one.
            with open(file, "rb", buffering=0) as stream:
                began, status = time.time(), os.fstat(stream.fileno())
                key = _key(file, status)
                remembered = self._remembered(key)
                if remembered is not None and not self.anew:
                    return remembered
                found = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
                # Someone may have written to it meanwhile; and what is too fresh may be written to unseen.
                settled = max(status.st_mtime, status.st_ctime) < began - SETTLED
                if settled and _identity(os.fstat(stream.fileno())) == _identity(status):
                    self._remember(key, found, remembered)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or reason_of(error)}") from None
        if remembered not in (None, found):
            warnings.warn(f"{file} changed without a trace in its size and times", stacklevel=2)
        return found

    def of_files(self, files: Mapping[str, Path]) -> dict[str, str]:
        """:meth:`of_file` of several files, by the same names; a line to stderr where that takes a while.

        Raises:
            UserError: as :meth:`of_file`.
        """
        paths = {name: os.path.realpath(file) for name, file in files.items()}
        distinct = sorted(set(paths.values()))  # parts of a hub's snapshot share files
        unknown = sum(map(self._bytes_to_read, distinct))
        if unknown >= ANNOUNCED and launcher_rank() == 0:
            kept = "" if self.record is None else f", once: {self.record} remembers what is in them"
            text = f"Reading {unknown / 1e9:.1f} GB of model files to know them by their content{kept}"
            print(text, file=sys.stderr, flush=True)
        with ThreadPoolExecutor(4) as pool:  # hashing leaves Python's lock to others
            found = dict(zip(distinct, pool.map(self.of_file, distinct), strict=True))
        return {name: found[path] for name, path in paths.items()}

    def _bytes_to_read(self, file: str) -> int:
        try:
            status = os.stat(file)
        except OSError:
            return 0  # reading it says why
        known = not self.anew and self._remembered(_key(file, status)) is not None
        return 0 if known else status.st_size

    def _remembered(self, key: str) -> str | None:
        if self.record is None:
            return None
        try:
            found, check = (self.record / key).read_text(encoding="ascii").split()
        except (OSError, ValueError):
            return None
        return found if check == _digest(key + found) else None

    def _remember(self, key: str, found: str, before: str | None) -> None:
        if self.record is None or found == before:
            return
        try:
            write_atomically(self.record / key, f"{found} {_digest(key + found)}\n")
        except OSError as error:
            if before is not None:  # a disk that is full or read-only does no harm, a record that is wrong would
                raise UserError(f"{self.record / key} is out of date and cannot be written: {error.strerror}") from None


def part_files(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """The files that loading a part of a pipeline, or a model of transformers, may read; by name.

    Of weights in several formats those count that are loaded, so that a later download of the others changes nothing:
    plain safetensors where there are any, unless a variant is asked for. What is not known counts.

    Args:
        folder: the part's; a missing one has no files.
        variant: of the weights, for example "fp16".
    """
    if not folder.is_dir():
        return {}
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    files = [file for file in files if file.suffix not in _NEVER_READ]
    if variant is None and any(_PLAIN.fullmatch(file.name) for file in files):
        files = [file for file in files if _PLAIN.fullmatch(file.name) or not is_weights(file)]
    return {file.name: file for file in files}


def pipeline_files(folder: Path, parts: Iterable[str], variant: str | None = None) -> dict[str, Path]:
    """:func:`part_files` of several parts of a pipeline, by "part/name"."""
    return {f"{part}/{name}": file for part in parts for name, file in part_files(folder / part, variant).items()}


def different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names whose content differs, or that only one of the two has, sorted."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def digest(value: Any) -> str:
    """A hash of anything that is JSON: 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """A hash of the weights and settings below a folder, by file name and content, wherever the folder is.

    Of a large file only its size and 64 blocks spread over it are read, which is enough to notice training;
    :class:`Contents` reads everything.
    """
    found = {}
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)  # a download's own records
        if not hidden and file.suffix in (".safetensors", ".json", ".bin", ".pth") and file.is_file():
            found[name.as_posix()] = _sample(file)
    return digest(found)


def files_digest(files: Iterable[Path], root: Path) -> str:
    """A hash of files by name, inode, size and times; nothing is read."""
    return digest([[file.relative_to(root).as_posix(), *_identity(file.stat())] for file in files])


def is_weights(file: Path) -> bool:
    """Whether a file holds weights, or says which do, by its name."""
    return file.suffix in _WEIGHTS or ".index." in file.name


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _key(file: Path | str, status: os.stat_result) -> str:
    return _digest(f"{os.path.realpath(file)}\n{' '.join(map(str, _identity(status)))}")


def _digest(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=16).hexdigest()


def _sample(file: Path) -> str:
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= _BLOCK * _BLOCKS:
            found.update(stream.read())
        else:
            for block in range(_BLOCKS):
                stream.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                found.update(stream.read(_BLOCK))
    return found.hexdigest()[:16]
