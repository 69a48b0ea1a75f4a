"""Locks on folders that the system releases when the process that holds them ends, however it ends."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LOCK_FILE = ".lock"


class LockAttempt(NamedTuple):
    """What came of an attempt to lock a folder.

    Attributes:
        descriptor: of the open lock file; closing it releases the lock.
        holder: what the other process that holds the lock has written into it; None: we hold it, if anyone can.
        refused: why the file system has no locks; empty where it has.
    """

    descriptor: int
    holder: str | None = None
    refused: str = ""


def lock_folder(folder: Path, *, inherited: bool) -> LockAttempt | None:
    """Try to lock a folder, which is created if it does not exist; None where the system has no such locks.

    Args:
        folder: what to lock.
        inherited: child processes that inherit the descriptor hold the lock, too (``flock``). Otherwise it is this
            process's alone, a POSIX record lock, which NFS, Lustre, GPFS and CephFS keep for all machines, unless they
            are mounted with locks local to each machine (``nolock``, ``localflock``). Such a lock does not keep out the
            process that holds it, and closing the file anywhere in that process releases it.

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
        os.close(descriptor)  # a process that left the folder empty has removed it meanwhile


def write_holder(descriptor: int, text: str) -> None:
    """Write into a lock file who holds the lock, for the message of the next process that wants it."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
