"""Lock of a comparison's folder: one command at a time, even if a killed command left runs behind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pcpo_fast.errors import UserError
from pcpo_fast.files.locks import lock_folder, write_holder


@contextmanager
def only_one(folder: Path) -> Iterator[int | None]:
    """Hold the folder's lock; yields its file descriptor, which child processes inherit and thereby also hold.

    The system releases the lock when the last process that holds it has ended, even if the command was killed and its
    children were not. Yields None on systems and file systems without such locks.

    Raises:
        UserError: another process holds it.
    """
    attempt = lock_folder(folder, inherited=True)
    if attempt is None:
        yield None
        return
    try:
        if attempt.holder is not None:
            who = f" ({attempt.holder})" if attempt.holder else ""
            raise UserError(
                f"{folder}: another comparison, or runs that it left behind, are still running here{who}; wait for "
                "them to finish, or stop them"
            )
        if attempt.refused:
            yield None
            return
        note_processes(attempt.descriptor, [])
        yield attempt.descriptor
    finally:
        os.close(attempt.descriptor)


def note_processes(descriptor: int, children: list[int]) -> None:
    """Write into the lock who holds it, for the error message of the next command."""
    runs = f", runs {', '.join(map(str, children))}" if children else ""
    write_holder(descriptor, f"process {os.getpid()}{runs}")
