"""Where processes meet: those that do not come are named. Threads stand for the processes: a store asks for no more."""

import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from pcpo_fast import rendezvous
from pcpo_fast.errors import UserError
from pcpo_fast.rendezvous import by_host, meet, own_connection

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
    assert own_connection(SECOND).get("from") == b"main"
    # A second rank that comes to the same store finds the first.
    found: list[Any] = []
    other = own_connection(SECOND)
    waiting = threading.Thread(target=lambda: found.append(rendezvous._wait_for_all(other, 1, 2, 5 * SECOND)))
    waiting.start()
    waiting.join(10)
    assert found == [None]


def test_a_rank_that_does_not_come_is_named(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("WORLD_SIZE", "6")
    launched.setattr(socket, "gethostname", lambda: "node1")

    def others_come() -> None:
        store = own_connection(SECOND)
        for rank, host in ((1, "node1"), (4, "node2")):
            store.set(f"present/{rank}", host)

    threading.Timer(0.3, others_come).start()
    with pytest.raises(UserError) as caught:
        meet(SECOND)
    text = str(caught.value)
    assert text.startswith("ranks 2-3, 5 of 6 did not come within 1 s (distributed.start_timeout); here are ")
    assert "ranks 0-1 on node1, rank 4 on node2:" in text


def test_a_rank_0_that_does_not_listen_is_one_sentence(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"^rank 1 on .* cannot meet the others at 127\.0\.0\.1:\d+ \(MASTER_ADDR") as e:
        meet(SECOND)
    assert "\n" not in str(e.value)


def test_ranks_are_told_by_host() -> None:
    ranks = [(0, "a"), (1, "a"), (2, "b"), (3, "a")]
    assert by_host(ranks) == "ranks 0-1, 3 on a, rank 2 on b"
    assert by_host([(7, "c")]) == "rank 7 on c"
