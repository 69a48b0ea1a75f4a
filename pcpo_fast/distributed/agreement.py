"""Checks, before anything is loaded, that all ranks have the same code, settings, libraries and files."""

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
from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.collectives import gather_objects, is_distributed
from pcpo_fast.distributed.rendezvous import by_host
from pcpo_fast.errors import shared

LIBRARIES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "numpy", "triton")
SHOWN = 4
"""Differences that the error lists; the rest are counted."""


def check_agreement(config: Config) -> None:
    """Fail if ranks run different code, settings or libraries. Collective; does nothing with one process.

    Raises:
        UserError: on every rank, with the ranks and hosts that differ from rank 0, and in what.
    """
    if is_distributed():
        check_alike(facts(config))


def check_alike(found: Mapping[str, str]) -> None:
    """Fail if any rank's values differ from those of rank 0. Collective.

    Raises:
        UserError: on every rank, with the ranks and hosts that differ from rank 0, and in what.
    """
    message = disagreement(gather_objects((socket.gethostname(), found)))
    if message is not None:
        raise shared(message)


def facts(config: Config) -> dict[str, str]:
    """Versions, code digest and settings that must be the same on all ranks, by a descriptive name."""
    found = {"Python": platform.python_version(), "pcpo_fast": pcpo_fast.__version__, "source code": _code_digest()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["CUDA"] = str(torch.version.cuda)
    for key, value in flattened(config.model_dump(mode="json")):
        if not role_of(Config, key).per_host:  # the model's path may differ between hosts; its files are compared later
            found[f"setting {key}"] = json.dumps(value)
    return found


def disagreement(everyone: Sequence[tuple[str, Mapping[str, str]]]) -> str | None:
    """The error message about ranks that differ from rank 0; None if all agree.

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
    # Libraries first: a different version may explain the other differences.
    order = {name: number for number, name in enumerate(first)}
    lines = [
        f"{by_host(ranks)}: {name} {mine}, not {theirs}"
        for (name, mine, theirs), ranks in sorted(different.items(), key=lambda item: order.get(item[0][0], len(order)))
    ]
    more = f"; and {counted(len(lines) - SHOWN, 'more difference')}" if len(lines) > SHOWN else ""
    return f"ranks differ from rank 0 on {first_host}: {'; '.join(lines[:SHOWN])}{more}"


def _code_digest() -> str:
    import pcpo_kernels

    digest = hashlib.sha256()
    for package in (pcpo_fast, pcpo_kernels):
        folder = Path(str(package.__file__)).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
