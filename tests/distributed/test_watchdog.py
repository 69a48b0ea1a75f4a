"""A run that stands still: the rank that the others wait for is named, and the processes end."""

import json
import subprocess
import sys
import threading
from datetime import timedelta

import torch.distributed as dist

from pcpo_fast.distributed.watchdog import EXIT_STALLED, Beat, Watchdog, explain, note, set_watchdog

NOW = 1000.0


def beat(rank: int, count: int, what: str, ago: float = 1.0) -> Beat:
    return Beat(rank, f"node{rank // 2}", count, what, 50.0, NOW - ago)


def test_the_late_rank_is_named() -> None:
    beats = [beat(0, 9, "update"), beat(1, 9, "update"), beat(2, 7, "reward"), beat(3, 8, "update")]
    text = explain(beats, [], NOW, 30)
    assert text == "the others wait for rank 2 on node1 (reward, for 50 s); the furthest is rank 0 (update)"


def test_a_process_that_has_stopped_is_named() -> None:
    beats = [beat(0, 9, "update"), beat(3, 9, "update", ago=60)]
    text = explain(beats, [2], NOW, 30)
    assert text == "rank 2 has sent no heartbeat; rank 3 on node1 has sent no heartbeat for 60 s (last: update)"


def test_no_rank_is_named_if_all_are_at_the_same_point() -> None:
    assert "so none is behind" in explain([beat(0, 3, "update"), beat(1, 3, "update")], [], NOW, 30)


def test_a_watchdog_gives_up_once_nothing_moves_and_says_who_is_late() -> None:
    store, told, done = dist.HashStore(), [], threading.Event()

    def give_up(message: str) -> None:
        told.append(message)
        done.set()

    late = Watchdog(store, 1, 2, timedelta(seconds=60))
    late.what = "reward"
    late.beat()
    watchdog = Watchdog(store, 0, 2, timedelta(seconds=0.4), give_up)
    set_watchdog(watchdog)
    try:
        for _ in range(5):  # while something moves, nothing is said, however long it takes together
            assert not done.wait(0.2)
            note("update")
        assert done.wait(20)
    finally:
        set_watchdog(None)
    assert told[0].startswith("no progress for 0 s (distributed.timeout) at rank 0 on ")
    assert "(update): the others wait for rank 1 on " in told[0] and "(reward, for " in told[0]
    assert json.loads(store.get("beat/0"))["count"] == 5
    note("without a watchdog, nothing")


def test_a_process_that_waits_for_ever_ends_with_a_code_of_its_own() -> None:
    code = (
        "import threading, torch.distributed as dist; from datetime import timedelta;"
        "from pcpo_fast.distributed.watchdog import Watchdog, set_watchdog;"
        "set_watchdog(Watchdog(dist.HashStore(), 0, 2, timedelta(seconds=0.2))); threading.Event().wait()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert ended.returncode == EXIT_STALLED
    assert ended.stderr.startswith("error: no progress for") and "rank 1 has sent no heartbeat" in ended.stderr
