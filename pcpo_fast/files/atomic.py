"""Write a file whole or not at all."""

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path | str, data: bytes | str) -> None:
    """Replace the file `path` by `data` so that a reader, or a process killed half-way, never meets a part of it.

    The data go to a hidden temporary file in the same folder (created when missing), are flushed to the disk, and the
    file is then renamed over `path` and the folder flushed, so that a power cut undoes nothing. Text is written as
    UTF-8 without any change of line endings. The new file has the permissions that an ordinary new file gets. If
    anything fails the temporary file is removed, `path` keeps its old content, and the error (an `OSError`) is passed
    on.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk.

    Raises:
        OSError: the file system cannot.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names: only then has a rename in it happened for good."""
    with contextlib.suppress(OSError):  # some file systems cannot, and need not
        sync(folder)
