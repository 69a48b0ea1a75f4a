"""Never two runs in one folder: a lock that dies with its process."""

import errno
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pcpo_fast.errors import UserError

LOCK_FILE = ".lock"
_held: set[Path] = set()


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the folder's lock within the block; a folder that is made for it and stays empty is taken away again.

    It is a POSIX record lock: the system takes it back when this process ends, however it ends, also where its children
    live on; and NFS, Lustre, GPFS and CephFS hold it for all machines, unless they are mounted with locks of each
    machine's own (``nolock``, ``localflock``). Where there are no locks, a warning says so.

    Raises:
        UserError: another run holds it; says which process on which machine, since when.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    place, is_new = folder.resolve(), not folder.exists()
    if place in _held:  # such a lock does not keep out its own process, and closing the file anywhere in it loses it
        raise UserError(f"output_dir: {folder} is the folder of a run of this process")
    try:
        descriptor, holder, refused = _acquire(folder, fcntl.lockf, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}") from None
    try:
        if holder is not None:
            raise UserError(
                f"output_dir: another run is at work in {folder} ({holder}); wait for it, end it, or choose another "
                "output_dir"
            )
        if refused:
            warnings.warn(
                f"output_dir: the file system of {folder} has no locks ({refused}): nothing but you keeps a second run "
                "out of it",
                stacklevel=3,
            )
        else:
            began = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {began}\n".encode(), 0)
        _held.add(place)
        yield
    finally:
        _held.discard(place)
        if holder is None:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
                if is_new and os.listdir(folder) == [LOCK_FILE]:
                    (folder / LOCK_FILE).unlink()
                    folder.rmdir()
        os.close(descriptor)


def _acquire(folder: Path, lock: Callable[[int, int], object], how: int) -> tuple[int, str | None, str]:
    """The open lock file; who holds it, None if we do; why there are no locks."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock(descriptor, how)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return descriptor, None, error.strerror or str(error)
            return descriptor, os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "it has just begun", ""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK_FILE)):
                return descriptor, None, ""
        os.close(descriptor)  # taken away by one that has put nothing into the folder
