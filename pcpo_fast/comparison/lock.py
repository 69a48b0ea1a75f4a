"""One command at a time in a comparison's folder, and no two trainers in one run directory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pcpo_fast.errors import UserError

LOCK_FILE = ".lock"


@contextmanager
def only_one(folder: Path) -> Iterator[int | None]:
    """Hold the folder's lock; yields its file descriptor, which child processes inherit and thereby hold, too.

    The system gives the lock back when the last process that holds it has ended, however it ended: also where the
    command was killed and its children were not. Yields None on systems and file systems without such locks.

    Raises:
        UserError: somebody else holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            who = f" ({holder})" if holder else ""
            raise UserError(
                f"{folder}: another comparison is at work here, or runs that it left behind{who}; wait for them, or "
                "end them"
            ) from None
        except OSError:  # a network file system without locks
            yield None
            return
        note_processes(descriptor, [])
        yield descriptor
    finally:
        os.close(descriptor)


def note_processes(descriptor: int, children: list[int]) -> None:
    """Write into the lock who holds it, for the message of whoever comes next."""
    runs = f", runs {', '.join(map(str, children))}" if children else ""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()}{runs}".encode(), 0)
