"""Host memory that is left on this machine."""

import os
from pathlib import Path


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that new processes can have: what the system has available, and what its container or job may still take.

    Limits of control groups are read in version 2, those of all groups above this process's own included.

    Args:
        root: serves tests.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        left = 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration):  # no Linux
        left = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    top = root / "sys/fs/cgroup"
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = top / next(line for line in groups if line.startswith("0::")).removeprefix("0::").lstrip("/")
    except (OSError, StopIteration):
        return left
    for group in (own, *own.parents):
        if not group.is_relative_to(top):
            break
        try:
            limit, used = ((group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
            pages = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            left = min(left, int(limit) - int(used) + int(pages["file"]))  # pages of files make room
        except (OSError, ValueError, KeyError):  # the group has no limit
            continue
    return left
