"""Another commit of this project beside this checkout, for comparing the two."""

import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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


def environment(root: Path) -> dict[str, str]:
    """Variables with which Python imports the packages of a checkout."""
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(root / "kernels")))}
