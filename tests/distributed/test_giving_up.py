"""A rank that gives up is heard: once on each machine, with its number, and the others do not wait for it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST = socket.gethostname()

# Loads PyTorch once, and forks two ranks for every case; what a rank does is a word: it fails with a sentence before
# the meeting or after it, comes to the meeting, or waits after it for a rank that does not come.
DRIVER = """
import json, os, sys, time
from datetime import timedelta
import torch.distributed as dist
from pcpo_fast.distributed import rendezvous
from pcpo_fast.distributed import watchdog
from pcpo_fast.cli import main
from pcpo_fast.commands import train
from pcpo_fast.errors import UserError

SOON = timedelta(seconds=100)

def work(does, answer, environment):
    os.environ.update(environment)
    os.dup2(os.open(answer, os.O_CREAT | os.O_WRONLY), 2)
    when, _, sentence = does.partition(": ")
    rendezvous.EXIT_SECONDS = 0.3 if when == "alone_after" else 100
    if when == "alone":
        rendezvous.REPORT_TIMEOUT = timedelta(seconds=0.3)
    def run(arguments, default_of):
        if when not in ("before", "alone"):
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group("gloo", store=rendezvous.meet(SOON), rank=rank, world_size=size)
            if when == "waits":
                looking = watchdog.Watchdog(rendezvous.connect(SOON), rank, size, timedelta(seconds=900))
                looking.interval = 0.05
                looking.start()
                time.sleep(100)
        raise UserError(sentence)
    train.run = run
    code = 99
    try:
        code = main(["train"])
    finally:
        sys.stderr.flush()
        os._exit(code)

children = []
for case in json.loads(sys.argv[1]):
    for rank in case:
        child = os.fork()
        if child == 0:
            work(**rank)
        children.append(child)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""
# What each rank does, on one machine or on two.
CASES = {
    "all": (["before: no such key", "before: no such key"], 1),
    "one": (["meets", "before: no such file"], 1),
    "one_elsewhere": (["meets", "before: no such file"], 2),
    "two": (["before: no such file", "before: no such key"], 1),
    "alone": (["alone: no such key"], 1),
    "later": (["waits", "alone_after: the disk is full"], 1),
    "all_later": (["after: the disk is full", "after: the disk is full"], 1),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """Exit code and errors of every rank of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    cases: list[list[dict[str, Any]]] = []
    for name, (ranks, machines) in CASES.items():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        cases.append([])
        for rank, does in enumerate(ranks):
            local = str(rank if machines == 1 else 0)
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": local}
            cases[-1].append({"does": does, "answer": str(folder / f"{name}{rank}"), "environment": environment})
    # PyTorch's own warnings about a store whose process has left are not ours.
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-c", DRIVER, json.dumps(cases)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    codes = iter(json.loads(done.stdout))
    return {
        name: [(next(codes), (folder / f"{name}{rank}").read_text()) for rank in range(len(ranks))]
        for name, (ranks, _) in CASES.items()
    }


def test_what_all_ranks_meet_is_said_once_and_without_a_rank(said: dict[str, list[tuple[int, str]]]) -> None:
    assert said["all"] == [(2, "error: no such key\n"), (2, "")]


def test_what_one_rank_meets_is_said_by_the_first_of_each_machine(said: dict[str, list[tuple[int, str]]]) -> None:
    sentence = f"error: rank 1 on {HOST}: no such file\n"
    assert said["one"] == [(2, sentence), (2, "")]
    assert said["one_elsewhere"] == [(2, sentence), (2, sentence)]
    assert said["two"] == [(2, f"error: rank 0 on {HOST}: no such file\n"), (2, "")]


def test_a_rank_speaks_for_itself_where_the_others_do_not_come(said: dict[str, list[tuple[int, str]]]) -> None:
    assert said["alone"] == [(2, "error: no such key\n")]


def test_after_the_meeting_the_watchdogs_of_the_others_find_it(said: dict[str, list[tuple[int, str]]]) -> None:
    (code, words), other = said["later"]
    assert other == (2, f"error: rank 1 on {HOST}: the disk is full\n")
    assert (code, words) == (4, f"error: another rank has failed: rank 1 on {HOST}: the disk is full\n")


def test_after_the_meeting_the_first_of_a_machine_says_what_all_meet(said: dict[str, list[tuple[int, str]]]) -> None:
    (first, words), (second, others) = said["all_later"]
    assert (first, second) == (2, 2)
    assert words + others in ("error: the disk is full\n", f"error: rank 1 on {HOST}: the disk is full\n")
