"""A lock that prevents two runs from using one folder; released when the process ends."""

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
    """Hold the folder's lock within the block; a folder that was created for it and is still empty is removed.

    Without locks in the operating system nothing is done; without locks in the file system a warning is issued.

    Raises:
        UserError: another run holds the lock; the message names its process, machine and start.
    """
    place, is_new = folder.resolve(), not folder.exists()
    if place in _held:  # the lock does not exclude its own process
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
                "it, stop it, or choose another output_dir"
            )
        if attempt.refused:
            warnings.warn(
                f"output_dir: the file system of {folder} does not support locks ({attempt.refused}): make sure "
                "yourself that no second run uses it",
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
