"""Never two runs in one folder: a lock that is released when its process ends."""

import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pcpo_fast.errors import UserError
from pcpo_fast.files.locks import LOCK_FILE, lock_folder, write_holder

_held: set[Path] = set()


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the folder's lock within the block; a folder that is created for it and stays empty is removed again.

    Where the system has no locks nothing is held; where the file system has none, a warning says so.

    Raises:
        UserError: another run holds it; says which process on which machine, since when.
    """
    place, is_new = folder.resolve(), not folder.exists()
    if place in _held:  # the lock does not keep out its own process
        raise UserError(f"output_dir: {folder} is already in use by a run of this process")
    try:
        attempt = lock_folder(folder, inherited=False)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}") from None
    if attempt is None:
        yield
        return
    try:
        if attempt.holder is not None:
            raise UserError(
                f"output_dir: another run is using {folder} ({attempt.holder or 'it has just started'}); wait for "
                "it, end it, or choose another output_dir"
            )
        if attempt.refused:
            warnings.warn(
                f"output_dir: the file system of {folder} has no locks ({attempt.refused}): nothing but you keeps a "
                "second run out of it",
                stacklevel=3,
            )
        else:
            began = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            write_holder(attempt.descriptor, f"process {os.getpid()} on {socket.gethostname()} since {began}\n")
        _held.add(place)
        yield
    finally:
        _held.discard(place)
        if attempt.holder is None:
            with suppress(OSError):
                write_holder(attempt.descriptor, "")
                if is_new and os.listdir(folder) == [LOCK_FILE]:
                    (folder / LOCK_FILE).unlink()
                    folder.rmdir()
        os.close(attempt.descriptor)
