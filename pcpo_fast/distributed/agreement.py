"""Before anything is loaded: do all ranks run the same code, settings and libraries, and read the same files?"""

import hashlib
import importlib.metadata
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import pcpo_fast
from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.roles import role_of
from pcpo_fast.config.schema import Config
from pcpo_fast.distributed.collectives import gather_objects, is_distributed
from pcpo_fast.distributed.rendezvous import by_host
from pcpo_fast.errors import shared

LIBRARIES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "numpy", "triton")
SHOWN = 4
"""Differences that are named one by one."""


def check_agreement(config: Config) -> None:
    """Refuse to start where ranks differ; nothing to do with one process. All ranks must call it.

    Raises:
        UserError: on every rank, with the ranks and hosts that differ from rank 0, and in what.
    """
    if is_distributed():
        check_alike(facts(config))


def check_alike(found: Mapping[str, str]) -> None:
    """Refuse to start where ranks found different things; all ranks must call it.

    Raises:
        UserError: on every rank, with the ranks and hosts that differ from rank 0, and in what.
    """
    message = disagreement(gather_objects((socket.gethostname(), found)))
    if message is not None:
        raise shared(message)


def facts(config: Config) -> dict[str, str]:
    """What all ranks of a run must have in common, by a name that says what it is."""
    found = {"Python": platform.python_version(), "pcpo_fast": pcpo_fast.__version__, "source code": _code_digest()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["CUDA"] = str(torch.version.cuda)
    for key, value in flattened(config.model_dump(mode="json")):
        if not role_of(Config, key).per_host:  # where the model lies may differ: what it holds is compared later
            found[f"setting {key}"] = json.dumps(value)
    return found


def disagreement(everyone: Sequence[tuple[str, Mapping[str, str]]]) -> str | None:
    """The sentence about ranks that differ from rank 0, None where none does.

    Args:
        everyone: host name and :func:`facts` of each rank, in rank order.
    """
    first_host, first = everyone[0]
    different: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    for rank, (host, found) in enumerate(everyone):
        for name in first.keys() | found.keys():
            mine, theirs = found.get(name, "missing"), first.get(name, "missing")
            if mine != theirs:
                different.setdefault((name, mine, theirs), []).append((rank, host))
    if not different:
        return None
    # A library first: what it differs in may be why the rest does.
    order = {name: number for number, name in enumerate(first)}
    lines = [
        f"{by_host(ranks)}: {name} {mine}, not {theirs}"
        for (name, mine, theirs), ranks in sorted(different.items(), key=lambda item: order.get(item[0][0], len(order)))
    ]
    more = f"; and {len(lines) - SHOWN} more differences" if len(lines) > SHOWN else ""
    return f"ranks differ from rank 0 on {first_host}: {'; '.join(lines[:SHOWN])}{more}"


def _code_digest() -> str:
    import pcpo_kernels

    digest = hashlib.sha256()
    for package in (pcpo_fast, pcpo_kernels):
        folder = Path(str(package.__file__)).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
