"""A folder's manifest: size and SHA-256 of every file in it, so that damage is seen before anything is loaded.

All ranks share the reading of large folders; a function that does so says it, and every rank must call it.
"""

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pcpo_fast.distributed.collectives import gather_objects, rank, world_size
from pcpo_fast.files.atomic import sync, sync_folder, write_atomically

MANIFEST_FILE = "manifest.json"
VERSION = 1


def files_of(folder: Path) -> list[str]:
    """Relative names of all files under a folder but its manifest, sorted, with ``/`` between their parts."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != MANIFEST_FILE)


def write_manifest(folder: Path) -> None:
    """Flush every file under ``folder`` to the disk, read it back, and record it; all ranks must call it.

    PyTorch's archives carry a checksum of each tensor that was made before writing, and are held against it.

    Raises:
        OSError: a file is not what was written to it, or cannot be read; on every rank alike.
    """
    names = gather_objects(files_of(folder) if rank() == 0 else None)[0]  # one list, however a shared disk is cached
    mine: dict[str, dict[str, Any]] = {}
    problem = None
    try:
        for name in names[rank() :: world_size()]:
            sync(folder / name)
            _check_content(folder / name)
            mine[name] = _describe(folder / name)
    except OSError as error:
        problem = f"{name}: {error.strerror or error}"
    parts = gather_objects((mine, problem))
    for _, text in parts:
        if text is not None:
            raise OSError(f"{folder}: {text}")
    if rank() == 0:
        files = {name: record for part, _ in parts for name, record in part.items()}
        text = json.dumps({"version": VERSION, "files": dict(sorted(files.items()))}, indent=1)
        for below in {(folder / name).parent for name in files}:
            sync_folder(below)
        write_atomically(folder / MANIFEST_FILE, text)


def missing_or_resized(folder: Path) -> str | None:
    """What is wrong with a folder by its files' names and sizes alone, in a few words; None: nothing."""
    listed = _listed(folder)
    if isinstance(listed, str):
        return listed
    there = set(files_of(folder))
    for name, record in listed.items():
        path = folder / name
        if name not in there or path.is_symlink():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != record["bytes"]:
            return f"{name} has {size} bytes, not {record['bytes']}"
    extra = sorted(there - listed.keys())
    return f"{extra[0]} is not in its {MANIFEST_FILE}" if extra else None


def damage_of(folder: Path) -> str | None:
    """What is wrong with a folder, its content read and compared, in a few words; None: nothing.

    All ranks must call it, and all get the same answer.
    """
    problem = missing_or_resized(folder)
    listed = _listed(folder)
    if problem is None and isinstance(listed, dict):
        problem = _first_changed(folder, dict(sorted(listed.items())[rank() :: world_size()]))
    return next((text for text in gather_objects(problem) if text is not None), None)


def changed_file(folder: Path, below: str) -> str | None:
    """As :func:`damage_of`, of the files in one folder below only, and by this process alone."""
    listed = _listed(folder)
    if isinstance(listed, str):
        return listed
    mine = {name: record for name, record in listed.items() if name.startswith(f"{below}/")}
    missing = next((name for name in mine if not (folder / name).is_file()), None)
    return f"{missing} is missing" if missing is not None else _first_changed(folder, mine)


def _first_changed(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    for name, record in files.items():
        try:
            now = _describe(folder / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        if now != {key: record[key] for key in now}:
            return f"{name} is not what was written: its checksum differs"
    return None


def _listed(folder: Path) -> dict[str, dict[str, Any]] | str:
    """The manifest's files, or what is wrong with it."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {str(name): dict(record) for name, record in manifest["files"].items()}
        for name, record in files.items():
            int(record["bytes"]), str(record["sha256"])
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"its {MANIFEST_FILE} names a file outside of it"
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST_FILE} cannot be read"
    return files


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _check_content(path: Path) -> None:
    """Hold an archive or a weights file against what it says of itself.

    Raises:
        OSError: they do not agree.
    """
    try:
        if path.suffix == ".pt":
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
            if wrong is not None:
                raise OSError(f"{wrong} in it was written wrongly")
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
    except (zipfile.BadZipFile, SafetensorError, EOFError) as error:
        raise OSError(f"not a whole file: {str(error).splitlines()[0]}") from None
