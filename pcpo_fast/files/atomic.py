"""Atomic file writes."""

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path | str, data: bytes | str) -> None:
    """Replace the file `path` by `data` so that no reader ever sees a partial file, even if the process is killed.

    The data are written to a hidden temporary file in the same folder (created if missing) and flushed to disk; the
    file is then renamed to `path` and the folder flushed, so that the write survives a power failure. Text is written
    as UTF-8 with unchanged line endings. The new file has the permissions of an ordinary new file. If anything fails,
    the temporary file is removed, `path` keeps its old content, and the error (an `OSError`) propagates.
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
    """Flush a file or a folder's entries to disk.

    Raises:
        OSError: the file system does not support it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, which makes a rename in it durable."""
    with contextlib.suppress(OSError):  # some file systems do not support this, and do not need it
        sync(folder)
