"""What made an image or a feature, as a short hash: so that nothing is made twice and nothing stale is kept."""

import hashlib
import json
import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

_BLOCK = 1 << 16
_BLOCKS = 64


def digest(value: Any) -> str:
    """Of anything that is JSON: 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def folder_digest(folder: Path, suffixes: Container[str] | None = None) -> str:
    """Of the files below a folder, hidden ones apart, by their names there and their content, wherever it lies.

    Of a large file only its size and 64 blocks spread over it are read, which tells apart what training has changed;
    :mod:`pcpo_fast.files.content` reads everything.

    Args:
        folder: a model's.
        suffixes: of the files that count, all if None.
    """
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)  # a download's own records
        if not hidden and (suffixes is None or file.suffix in suffixes):
            found[name.as_posix()] = _sample(file)
    return digest(found)


def weights_digest(folder: Path) -> str:
    """:func:`folder_digest` of weights and settings alone."""
    return folder_digest(folder, (".safetensors", ".json", ".bin", ".pth"))


def files_digest(files: Iterable[Path], root: Path) -> str:
    """Of image files, by name, inode, size and times: content that changed behind its size and date shows in these."""
    return digest([[file.relative_to(root).as_posix(), *_identity(file.stat())] for file in files])


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


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


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys that differ."""
    return [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
