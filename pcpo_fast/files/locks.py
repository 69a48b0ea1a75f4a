"""Folder locks that the operating system releases when the holding process ends, even if it is killed."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LOCK_FILE = ".lock"


class LockAttempt(NamedTuple):
    """The result of an attempt to lock a folder.

    Attributes:
        descriptor: descriptor of the open lock file; closing it releases the lock.
        holder: what the process that holds the lock wrote into the file; None: no other process holds it.
        refused: why the file system does not support locks; empty if it does.
    """

    descriptor: int
    holder: str | None = None
    refused: str = ""


def lock_folder(folder: Path, *, inherited: bool) -> LockAttempt | None:
    """Try to lock a folder, which is created if missing; None if the operating system has no such locks.

    Args:
        folder: the folder to lock.
        inherited: use ``flock``: child processes that inherit the descriptor hold the lock too. Otherwise use a POSIX
            record lock, held by this process alone; NFS, Lustre, GPFS and CephFS enforce it across machines unless
            mounted with local locks (``nolock``, ``localflock``). It does not exclude the process that holds it, and
            closing the file anywhere in that process releases it.

    Raises:
        OSError: the lock file cannot be opened.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return None
    lock = fcntl.flock if inherited else fcntl.lockf
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return LockAttempt(descriptor, holder=os.pread(descriptor, 200, 0).decode(errors="replace").strip())
            return LockAttempt(descriptor, refused=error.strerror or str(error))
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK_FILE)):
                return LockAttempt(descriptor)
        os.close(descriptor)  # the lock file was removed meanwhile by a process that left the folder empty


def write_holder(descriptor: int, text: str) -> None:
    """Write the holder into a lock file, for the error message of the next process that wants the lock."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
