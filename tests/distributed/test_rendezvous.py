"""Where processes meet: those that do not come are named. Threads stand for the processes: a store asks for no more."""

import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from pcpo_fast.distributed import rendezvous
from pcpo_fast.distributed.rendezvous import by_host, connect, expand_hosts, home_of, meet
from pcpo_fast.errors import UserError

SECOND = timedelta(seconds=1)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment of rank 0 of 2, at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    yield monkeypatch


def test_all_who_come_meet(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("WORLD_SIZE", "1")
    store = meet(SECOND)
    store.set("from", "main")
    assert connect(SECOND).get("from") == b"main"
    # A second rank that comes to the same store finds the first.
    found: list[Any] = []
    other = connect(SECOND)
    waiting = threading.Thread(target=lambda: found.append(rendezvous._wait_for_all(other, 1, 2, 5 * SECOND)))
    waiting.start()
    waiting.join(10)
    assert found == [None]


def test_a_rank_that_does_not_come_is_named(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("WORLD_SIZE", "6")
    launched.setenv("LOCAL_WORLD_SIZE", "2")
    launched.setenv("SLURM_JOB_NODELIST", "node[1-3]")
    launched.setattr(socket, "gethostname", lambda: "node1")

    def others_come() -> None:
        store = connect(SECOND)
        for rank, host in ((1, "node1"), (4, "node2")):
            store.set(f"present/{rank}", host)

    threading.Timer(0.3, others_come).start()
    with pytest.raises(UserError) as caught:
        meet(SECOND)
    text = str(caught.value)
    assert text.startswith("ranks 2-3, 5 of 6 did not connect within 1 s (distributed.start_timeout); they belong to ")
    assert (
        "they belong to machine 1 (node2), machine 2 (node3), counted from 0 with 2 ranks each; connected are " in text
    )
    assert "ranks 0-1 on node1, rank 4 on node2:" in text


def test_the_machine_of_a_missing_rank_is_as_far_as_the_launcher_tells() -> None:
    assert home_of([3], {}) == home_of([3], {"LOCAL_SIZE": "0"}) == home_of([3], {"LOCAL_WORLD_SIZE": "x"}) == ""
    assert home_of([8, 15], {"LOCAL_SIZE": "8"}) == "they belong to machine 1, counted from 0 with 8 ranks each; "
    short = {"LOCAL_SIZE": "4", "SLURM_JOB_NODELIST": "a"}
    assert home_of([1, 9], short) == "they belong to machine 0 (a), machine 2, counted from 0 with 4 ranks each; "


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("node1", ["node1"]),
        ("node1,gpu-2.here", ["node1", "gpu-2.here"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("n[08-10,12],m7", ["n08", "n09", "n10", "n12", "m7"]),
        ("rack[1-2]-a", ["rack1-a", "rack2-a"]),
        ("rack[1-2]node[1-2]", []),  # a product of two, which nothing here needs
        ("node[a-c]", []),
    ],
)
def test_host_names_of_slurm(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


def test_a_rank_0_that_does_not_listen_is_one_sentence(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("RANK", "1")
    with pytest.raises(
        UserError, match=r"^rank 1 on .* cannot connect to the others at 127\.0\.0\.1:\d+ \(MASTER_ADDR"
    ) as e:
        meet(SECOND)
    assert "\n" not in str(e.value)


def test_ranks_are_told_by_host() -> None:
    ranks = [(0, "a"), (1, "a"), (2, "b"), (3, "a")]
    assert by_host(ranks) == "ranks 0-1, 3 on a, rank 2 on b"
    assert by_host([(7, "c")]) == "rank 7 on c"
