"""A folder's manifest: size and SHA-256 of every file, to detect damage before anything is loaded.

Large folders are read by all ranks together; the functions that do so must be called by every rank.
"""

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.collectives import gather_objects, rank, world_size
from pcpo_fast.files.atomic import sync, sync_folder, write_atomically

MANIFEST_FILE = "manifest.json"
VERSION = 1


def files_of(folder: Path) -> list[str]:
    """Sorted relative names (with ``/``) of all files in a folder and its subfolders, without the manifest."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != MANIFEST_FILE)


def write_manifest(folder: Path) -> None:
    """Flush every file in ``folder`` to disk, read it back, and record it in the manifest; all ranks must call it.

    PyTorch's archives contain a checksum of each tensor, computed in memory before writing; they are checked as well.

    Raises:
        OSError: a file differs from what was written to it, or cannot be read; raised on all ranks.
    """
    names = gather_objects(files_of(folder) if rank() == 0 else None)[0]  # one list, even if a shared disk is cached
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
    """Describe damage visible from file names and sizes alone; None if there is none."""
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
            return f"{name} has {counted(size, 'byte')}, not {record['bytes']}"
    extra = sorted(there - listed.keys())
    return f"{extra[0]} is not in its {MANIFEST_FILE}" if extra else None


def damage_of(folder: Path) -> str | None:
    """Describe damage to a folder after reading and comparing all contents; None if there is none.

    All ranks must call it and get the same result.
    """
    problem = missing_or_resized(folder)
    listed = _listed(folder)
    if problem is None and isinstance(listed, dict):
        problem = _first_changed(folder, dict(sorted(listed.items())[rank() :: world_size()]))
    return next((text for text in gather_objects(problem) if text is not None), None)


def changed_file(folder: Path, below: str) -> str | None:
    """As :func:`damage_of`, but only for the files in the subfolder ``below``, and in this process alone."""
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
            return f"{name} is corrupt: its checksum differs from the one recorded when it was written"
    return None


def _listed(folder: Path) -> dict[str, dict[str, Any]] | str:
    """The files in the manifest, or what is wrong with it."""
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
    """Check an archive or a weights file against its own checksums or header.

    Raises:
        OSError: it is inconsistent.
    """
    try:
        if path.suffix == ".pt":
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
            if wrong is not None:
                raise OSError(f"{wrong} in it is corrupt")
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
    except (zipfile.BadZipFile, SafetensorError, EOFError) as error:
        raise OSError(f"incomplete or corrupt file: {str(error).splitlines()[0]}") from None
