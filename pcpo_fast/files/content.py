"""What a file or a model's folder holds, as a hash of every byte; each file is read once and remembered.

A file is recognised by its path, inode, size, mtime and ctime. A copy that keeps size and date still has an inode or a
ctime of its own, so it is read, too. What changes bytes behind all of these (a store mounted without real inodes and
times) is found by reading anew.
"""

import hashlib
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pcpo_fast.distributed.collectives import launcher_rank
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.files.atomic import write_atomically

INDEX = "model_index.json"
RECORD_FOLDER = "content"
"""Name of the record's folder, next to the encoded prompts."""
ANNOUNCED = 10**9
"""Bytes from which on a line says that they are being read."""
SETTLED = 2.0
"""Seconds that a file must have lain unchanged before its hash is remembered: the tick of the coarsest clock that file
systems have. A second change within one tick would show nowhere."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_NEVER_READ = (".md", ".msgpack", ".h5", ".ot", ".onnx", ".onnx_data", ".xml", ".tflite", ".png", ".jpg", ".lock")
_PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")


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


def different(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names whose content differs, or that only one of them has, sorted."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def is_weights(file: Path) -> bool:
    """Whether a file holds weights, or says which do, by its name."""
    return file.suffix in _WEIGHTS or ".index." in file.name


def _identity(status: os.stat_result) -> str:
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _key(file: Path | str, status: os.stat_result) -> str:
    return _digest(f"{os.path.realpath(file)}\n{_identity(status)}")


def _digest(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=16).hexdigest()
