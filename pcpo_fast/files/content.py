"""Short hashes of files, folders and settings, used as cache keys and to detect changes.

:class:`Contents` reads every byte of a file once and remembers its hash. It recognizes the file by path, inode, size,
mtime and ctime. A copy with the same size and date still has another inode or ctime, so it is read as well. Changes
that leave all of these alone (on a store mounted without real inodes and times) are only found by reading again.
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

from pcpo_fast.distributed.launching import launcher_rank
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.files.atomic import write_atomically

INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"
"""Names of the file that says what a pipeline's folder holds: of a pipeline, and of a modular one."""
RECORD_FOLDER = "content"
"""Name of the folder of remembered hashes, next to the encoded prompts."""
ANNOUNCED = 10**9
"""Reading at least this many bytes is announced on stderr."""
SETTLED = 2.0
"""Seconds for which a file must be unchanged before its hash is remembered: the coarsest timestamp resolution of a file
system, since a second change within one tick would leave no trace."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_NEVER_READ = (".md", ".msgpack", ".h5", ".ot", ".onnx", ".onnx_data", ".xml", ".tflite", ".png", ".jpg", ".lock")
_PLAIN = re.compile(r"[^.]+\.safetensors(\.index\.json)?")
_BLOCK, _BLOCKS = 1 << 16, 64
"""Block size in bytes and number of blocks that :func:`weights_digest` reads of a large file."""


class Contents:
    """Hashes of files, with a record on disk that processes and machines can share.

    The record has one file per hashed file, written atomically and with a checksum; a damaged one is ignored. If the
    record is not writable, nothing is remembered.

    Args:
        record: folder of the record; None: every call reads the files.
        anew: read the files even if the record has them, and correct the record.
    """

    def __init__(self, record: Path | None = None, *, anew: bool = False) -> None:
        self.record = record
        self.anew = anew

    def of_file(self, file: Path | str) -> str:
        """The hash of a file's bytes: BLAKE2b, 32 hexadecimal digits.

        Raises:
            UserError: the file cannot be read, or a wrong record cannot be corrected.
        """
        try:
            # On a network disk the status of an open file is up to date, unlike that of its path.
            with open(file, "rb", buffering=0) as stream:
                began, status = time.time(), os.fstat(stream.fileno())
                key = _key(file, status)
                remembered = self._remembered(key)
                if remembered is not None and not self.anew:
                    return remembered
                found = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
                # Not remembered if it changed meanwhile, or is so new that a change would leave no trace.
                settled = max(status.st_mtime, status.st_ctime) < began - SETTLED
                if settled and _identity(os.fstat(stream.fileno())) == _identity(status):
                    self._remember(key, found, remembered)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or reason_of(error)}") from None
        if remembered not in (None, found):
            warnings.warn(f"{file} changed although its size and times did not", stacklevel=2)
        return found

    def of_files(self, files: Mapping[str, Path]) -> dict[str, str]:
        """:meth:`of_file` for several files, by the same names; reading many bytes is announced on stderr.

        Raises:
            UserError: as :meth:`of_file`.
        """
        paths = {name: os.path.realpath(file) for name, file in files.items()}
        distinct = sorted(set(paths.values()))  # parts of a hub's snapshot share files
        unknown = sum(map(self._bytes_to_read, distinct))
        if unknown >= ANNOUNCED and launcher_rank() == 0:
            kept = "" if self.record is None else f" (once: the hashes are kept in {self.record})"
            text = f"Hashing {unknown / 1e9:.1f} GB of model files{kept}"
            print(text, file=sys.stderr, flush=True)
        with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
            found = dict(zip(distinct, pool.map(self.of_file, distinct), strict=True))
        return {name: found[path] for name, path in paths.items()}

    def _bytes_to_read(self, file: str) -> int:
        try:
            status = os.stat(file)
        except OSError:
            return 0  # reading it reports the error
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
            if before is not None:  # a missing record is harmless, a wrong one is not
                raise UserError(f"{self.record / key} is out of date and cannot be written: {error.strerror}") from None


def index_of(folder: Path) -> Path:
    """The file that says which parts a pipeline has: :data:`MODULAR_INDEX` where there is no :data:`INDEX`."""
    index, modular = folder / INDEX, folder / MODULAR_INDEX
    return modular if modular.is_file() and not index.is_file() else index


def part_files(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """The files, by name, that may be read when a part of a pipeline or a transformers model is loaded.

    If there are weights in several formats, only those that would be loaded are included, so that downloading the
    others later changes nothing: plain safetensors if there are any, unless a variant is requested. Files of unknown
    kinds are included.

    Args:
        folder: folder of the part; a missing folder has no files.
        variant: variant of the weights, for example "fp16".
    """
    if not folder.is_dir():
        return {}
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    files = [file for file in files if file.suffix not in _NEVER_READ]
    if variant is None and any(_PLAIN.fullmatch(file.name) for file in files):
        files = [file for file in files if _PLAIN.fullmatch(file.name) or not is_weights(file)]
    return {file.name: file for file in files}


def pipeline_files(folder: Path, parts: Iterable[str], variant: str | None = None) -> dict[str, Path]:
    """:func:`part_files` of several parts of a pipeline, with names "part/name"."""
    return {f"{part}/{name}": file for part in parts for name, file in part_files(folder / part, variant).items()}


def different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sorted names whose values differ or that occur in only one of the two."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def digest(value: Any) -> str:
    """A hash of a JSON-compatible value: 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """A hash of the weights and settings in a folder by relative file name and content; independent of its location.

    For a large file only the size and 64 blocks spread over it are hashed, which is enough to detect training;
    :class:`Contents` reads everything.
    """
    found = {}
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)  # bookkeeping of downloads
        if not hidden and file.suffix in (".safetensors", ".json", ".bin", ".pth") and file.is_file():
            found[name.as_posix()] = _sample(file)
    return digest(found)


def files_digest(files: Iterable[Path], root: Path) -> str:
    """A hash of files by name, inode, size and times; their content is not read."""
    return digest([[file.relative_to(root).as_posix(), *_identity(file.stat())] for file in files])


def is_weights(file: Path) -> bool:
    """Whether a file is a weights file or a weights index, judging by its name."""
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
