"""What made a run: ``provenance.json`` in its folder, which its page shows and its exports carry."""

import hashlib
import importlib.metadata
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import pcpo_fast
from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.schema import Config
from pcpo_fast.distributed.collectives import world_size
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.runs.hidden_secrets import HIDDEN, command_without_secrets, names_secret

PROVENANCE_FILE = "provenance.json"
LIBRARIES = ("torch", "triton", "deepspeed", "diffusers", "transformers", "peft", "numpy")
_CHECKOUT = Path(pcpo_fast.__file__).resolve().parents[1]


def write_provenance(folder: Path, config: Config, epoch: int) -> None:
    """Add this start of a run to its ``provenance.json``.

    Args:
        folder: the run directory.
        config: the run, its sizes resolved.
        epoch: epochs trained before this start; 0 discards the record of earlier starts.
    """
    starts = read_provenance(folder) if epoch else []
    write_atomically(folder / PROVENANCE_FILE, json.dumps([*starts, _provenance(config, epoch)], indent=1) + "\n")


def read_provenance(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none where they are not recorded."""
    try:
        found = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) and all(isinstance(one, dict) for one in found) else []


def about_run(folder: Path, config: Config) -> dict[str, Any]:
    """What a tracker shows of a run: its settings by dotted key, secrets left out, and its latest start."""
    settings = {
        key: HIDDEN if names_secret(key) else value
        for key, value in flattened(config.model_dump(mode="json", exclude={"output_dir"}), lists=True)
    }
    return settings | {
        f"provenance.{key}": value for start in read_provenance(folder)[-1:] for key, value in start.items()
    }


def copy_provenance(run: Path, target: Path) -> None:
    """Put a run's provenance beside its weights, if it has one."""
    if (run / PROVENANCE_FILE).is_file():
        shutil.copyfile(run / PROVENANCE_FILE, target / PROVENANCE_FILE)


def _provenance(config: Config, epoch: int) -> dict[str, Any]:
    settings = json.dumps(config.model_dump(mode="json", exclude={"output_dir"}), sort_keys=True)
    commit = _git("rev-parse", "HEAD")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "after_epoch": epoch,
        "pcpo_fast": pcpo_fast.__version__,
        "commit": commit,
        "commit_dirty": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "libraries": library_versions(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ranks": world_size(),
        "command": command_without_secrets(shlex.join(sys.argv)),
        "configuration_sha256": hashlib.sha256(settings.encode()).hexdigest(),
    }


def library_versions() -> dict[str, str]:
    """Versions of the :data:`LIBRARIES` that are installed."""
    found = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that pcpo_fast runs from; None where it is none, or git does not answer."""
    if not (_CHECKOUT / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(_CHECKOUT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
