"""Which code a measurement is of, and another commit of this project beside this checkout, for comparing the two."""

import hashlib
import io
import os
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pcpo_fast", "kernels", "benchmarks")


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The files of a commit, in a folder that exists within the block.

    Raises:
        SystemExit: there is no such commit.
    """
    packed = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True)
    if packed.returncode:
        raise SystemExit(f"error: --base {revision}: {packed.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def origin() -> dict[str, str]:
    """When a measurement is made, and of which code: a hash of the sources, which also stand where there is no Git."""
    sources = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes() + b"\0")
    return {"measured": now(), "code": digest.hexdigest()[:12]}


def now() -> str:
    """The time in UTC, to be compared as text."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def environment(root: Path) -> dict[str, str]:
    """Variables with which Python imports the packages of a checkout."""
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(root / "kernels")))}
