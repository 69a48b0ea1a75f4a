"""Where the processes of a run meet: missing ranks are named in an error instead of waited for indefinitely.

A rank that fails before it has met the others reports its error here, so that they need not wait for it; the first rank
of each machine, whose output launchers show, prints which rank failed and why.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.collectives import ranks_per_machine
from pcpo_fast.distributed.watchdog import GAVE_UP
from pcpo_fast.errors import UserError, reason_of, shared

POLL_SECONDS = 0.2
"""Interval at which ranks check who has arrived."""

REPORT_TIMEOUT = timedelta(seconds=30)
"""How long a failed rank waits for the others to receive its error."""

EXIT_SECONDS = 5.0
"""How long failed ranks wait for each other before they exit."""

_store: dist.Store | None = None  # the store through which this process has met the others


def meet(patience: timedelta) -> dist.Store:
    """Wait for all processes of the launcher (MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE) and return their store.

    Args:
        patience: how long to wait for the last of them.

    Raises:
        UserError: rank 0 cannot be reached; some ranks are missing (says which, and which are present); or some have
            failed (says why).
    """
    global _store
    size = int(os.environ["WORLD_SIZE"])
    _store = connect(patience, may_host=int(os.environ["RANK"]) == 0)
    _wait_for_all(_store, int(os.environ["RANK"]), size, patience)
    problem = _problem_told(_store, size)
    if problem is not None:
        raise shared(problem)
    return _store


@contextmanager
def heard(error: UserError) -> Iterator[str | None]:
    """Report this rank's error to the others; within the block the caller prints what is yielded.

    Yields:
        The message to print, which names the rank unless all ranks have the same error; None if another process of
        this machine prints it.
    """
    global _store
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    own = f"rank {rank} on {socket.gethostname()}: {error}" if rank else str(error)
    if error.shared:
        yield str(error) if first_here else None
    elif dist.is_initialized() or _store is not None:
        yield own if _is_first_to_say(str(error), rank, own) else None
    else:
        try:
            _store = connect(REPORT_TIMEOUT, may_host=rank == 0)
            _store.set(f"problem/{rank}", str(error))
            _store.add("problems", 1)
            _wait_for_all(_store, rank, size, REPORT_TIMEOUT)
            told = _problem_told(_store, size)
        except (UserError, RuntimeError):  # the others cannot be reached, or do not answer in time
            yield own
            return
        yield told if first_here else None
    if _store is not None and not (error.shared and dist.is_initialized()):
        _leave_together(_store, rank, size)


def _problem_told(store: dist.Store, size: int) -> str | None:
    """The error of the ranks that have failed, once all ranks have arrived; None if none has."""
    if store.add("problems", 0) == 0:
        return None
    keys = {rank: f"problem/{rank}" for rank in range(size)}
    told = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
    rank, sentence = min(told.items())
    if len(told) == size and len(set(told.values())) == 1:
        return sentence
    return f"rank {rank} on {store.get(f'present/{rank}').decode()}: {sentence}"


def _leave_together(store: dist.Store, rank: int, size: int) -> None:
    """Exit only after all ranks have printed: launchers kill the others when one exits. Rank 0, which may host the
    store, exits last.
    """
    end = time.monotonic() + EXIT_SECONDS

    def wait_for(key: str, count: int) -> None:
        while store.add(key, 0) < count and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 4)

    with contextlib.suppress(RuntimeError):  # rank 0 has exited
        store.add("said all", 1)
        wait_for("said all", size)
        if rank:
            store.add("left", 1)
        else:
            wait_for("left", size - 1)


def _is_first_to_say(sentence: str, rank: int, named: str) -> bool:
    """Whether no other process of this machine has printed this error; also publishes it to all ranks' watchdogs."""
    if _store is None:
        return True
    digest = hashlib.sha256(sentence.encode()).hexdigest()
    try:
        _store.set(GAVE_UP, json.dumps([rank, named]))
        return _store.add(f"said/{socket.gethostname()}/{digest}", 1) == 1
    except RuntimeError:  # the process that hosts the store is gone
        return True


def connect(patience: timedelta, *, may_host: bool = False) -> dist.Store:
    """Connect to the store of the launcher's processes.

    A thread needs a connection of its own: on that of :func:`meet` it would wait for the main thread's requests.

    Args:
        patience: how long to wait for the store.
        may_host: whether this process hosts the store if the launcher does not.

    Raises:
        UserError: it cannot be reached.
    """
    rank = int(os.environ["RANK"])
    address, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "29500")
    # torchrun hosts a store at this address itself, and counts its restarts.
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store: dist.Store = dist.TCPStore(
            address, int(port), is_master=may_host and not of_agent, timeout=patience, wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:  # DistNetworkError and DistStoreError are RuntimeErrors
        reason = reason_of(error)
        raise UserError(
            f"rank {rank} on {socket.gethostname()} cannot connect to the others at {address}:{port} (MASTER_ADDR, "
            f"MASTER_PORT, where rank 0 listens): {reason}"
        ) from error
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_all(store: dist.Store, rank: int, world_size: int, patience: timedelta) -> None:
    missing, give_up = set(range(world_size)), time.monotonic() + patience.total_seconds()
    while missing:
        try:
            store.set(f"present/{rank}", socket.gethostname())
            missing -= {other for other in missing if store.check([f"present/{other}"])}
        except RuntimeError as error:
            raise UserError(f"the process of rank 0 has died; its last output says why ({reason_of(error)})") from error
        if not missing:
            return
        if time.monotonic() > give_up:
            here = [(r, store.get(f"present/{r}").decode()) for r in range(world_size) if r not in missing]
            raise UserError(
                f"{_ranks(missing)} of {world_size} did not connect within {patience.total_seconds():.0f} s "
                f"(distributed.start_timeout); {home_of(missing, os.environ)}connected are {by_host(here)}: check the "
                "output of the missing machine, and that every machine was started with the same number of processes"
            ) from TimeoutError()
        time.sleep(POLL_SECONDS)


def home_of(missing: Iterable[int], environment: Mapping[str, str]) -> str:
    """Which machines missing ranks belong to, as a clause of the error message; "" if the environment does not tell.

    Launchers number ranks machine by machine and set the number per machine (``LOCAL_WORLD_SIZE``, DeepSpeed's
    ``LOCAL_SIZE``); Slurm also lists the job's machines in order (``SLURM_JOB_NODELIST``).
    """
    per_machine = ranks_per_machine(environment)
    if per_machine is None:
        return ""
    hosts = expand_hosts(environment.get("SLURM_JOB_NODELIST", ""))
    machines = sorted({rank // per_machine for rank in missing})
    names = [f"machine {number}" + (f" ({hosts[number]})" if number < len(hosts) else "") for number in machines]
    return f"they belong to {', '.join(names)}, counted from 0 with {counted(per_machine, 'rank')} each; "


def expand_hosts(text: str) -> list[str]:
    """Expand Slurm's compressed host list, e.g. "node[01-03,7],gpu2"; an empty list if it cannot be parsed."""
    hosts: list[str] = []
    for entry in re.split(r",(?![^\[]*\])", text) if text else ():
        whole = re.fullmatch(r"([^\[\]]+)(?:\[([\d,-]+)\])?([^\[\]]*)", entry)
        if whole is None:
            return []
        name, numbers, rest = whole.groups()
        for part in numbers.split(",") if numbers else [""]:
            ends = re.fullmatch(r"(\d*)(?:-(\d+))?", part)
            if ends is None or (numbers and not ends[1]):
                return []
            first, last = ends[1], ends[2] or ends[1]
            run = range(int(first), int(last) + 1) if first else [""]
            hosts += [name + str(number).zfill(len(first)) + rest for number in run]
    return hosts


def by_host(ranks: Iterable[tuple[int, str]]) -> str:
    """ "ranks 0-3 on a, ranks 4-7 on b", in the order of the lowest rank."""
    hosts: dict[str, list[int]] = {}
    for rank, host in sorted(ranks):
        hosts.setdefault(host, []).append(rank)
    return ", ".join(f"{_ranks(numbers)} on {host}" for host, numbers in hosts.items())


def _ranks(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank {text}" if text.isdecimal() else f"ranks {text}"
