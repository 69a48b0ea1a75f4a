"""Reading and writing metrics.jsonl: one JSON object per line, complete lines only."""

import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically

Record = dict[str, Any]


class MetricsFile:
    """Appends records to a metrics.jsonl file.

    Every record is one `write` call on a file opened for appending, so it survives the death of the process once
    `append` has returned. If a run was killed in the middle of a line, opening the file again removes the partial line.

    JSON has neither NaN nor infinity: a number that is not finite is written as ``null``, and `read_metrics` returns it
    as NaN. Every line is therefore valid JSON for any reader.

    Raises `UserError` if the file cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        self._open()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            self._repair(self._descriptor)
        except OSError as error:
            raise UserError(f"cannot open {self.path} for writing: {error.strerror or error}") from error

    def _repair(self, descriptor: int) -> None:
        """Make the file end with a complete line: drop a partial last line, or add its missing newline."""
        content = self.path.read_bytes()
        tail = content[content.rfind(b"\n") + 1 :]
        if not tail:
            return
        if _parse(tail) is None:
            os.ftruncate(descriptor, len(content) - len(tail))
        else:
            os.write(descriptor, b"\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one line. If that fails (a full disk), no part of the line remains in the file."""
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        line = encode(record)
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, size)
            raise UserError(f"cannot write to {self.path}: {error.strerror or error}") from error

    def keep(self, condition: Callable[[Record], bool]) -> None:
        """Rewrite the file with only the lines whose record meets `condition`; they are kept byte for byte."""
        lines = [line for line, record in _lines(self.path) if condition(record)]
        self.close()
        write_atomically(self.path, b"".join(line + b"\n" for line in lines))
        self._open()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of JSON including its newline; numbers that are not finite become null."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(clean, allow_nan=False).encode("utf-8") + b"\n"


def find_metrics(folder: Path) -> Path | None:
    """A run directory's ``metrics.jsonl``, or ``metrics.jsonl.gz`` of a small record; None: it has neither."""
    paths = (folder / "metrics.jsonl", folder / "metrics.jsonl.gz")
    return next((path for path in paths if path.is_file()), None)


def read_metrics(path: Path | str) -> list[Record]:
    """All records of a ``metrics.jsonl`` or ``metrics.jsonl.gz`` file, in file order.

    A partial last line (the run was killed, or is writing right now) is ignored. ``null`` becomes NaN. Raises
    `UserError` if the file cannot be read, or if any other line is not a JSON object.
    """
    records = [record for _, record in _lines(Path(path))]
    return [{key: math.nan if value is None else value for key, value in record.items()} for record in records]


def _lines(path: Path) -> list[tuple[bytes, Record]]:
    """The non-empty lines (without newlines) and their records."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    *whole, tail = content.split(b"\n")
    result = []
    for number, line in enumerate(whole, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            raise UserError(f"{path}, line {number}: not a JSON object (each line of this file must be one)")
        result.append((line, record))
    last = _parse(tail)
    if last is not None:
        result.append((tail, last))
    return result


def _parse(line: bytes) -> Record | None:
    """The JSON object on a line, or None. (A truncated object is never itself a valid object.)"""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
