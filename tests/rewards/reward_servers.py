"""HTTP servers on free loopback ports, in a thread of the test or in a process of their own."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn

from pcpo_fast.rewards.serving.app import Limits, RewardServer
from pcpo_fast.rewards.serving.batching import BatchQueue

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-of-the-tests"


@contextmanager
def running(app: Any) -> Iterator[str]:
    """An ASGI application in a thread; gives its URL."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_keep_alive=30))
        bound.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(20)


@contextmanager
def reward_server(
    reward: Any, *, token: str | None = None, batch_size: int = 8, linger: float = 0.005, **limits: Any
) -> Iterator[tuple[str, RewardServer]]:
    """A reward server of a Python callable; gives its URL and the server."""
    work = BatchQueue("served", reward, device=torch.device("cpu"), most_images=batch_size, linger=linger)
    server = RewardServer("served", work, Limits(**limits), token)
    with running(server.app) as url:
        yield url, server
    work.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_server(folder: Path, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """``pcpo-fast serve-reward`` in a process of its own, in ``folder``; returns before it serves."""
    return subprocess.Popen(
        [sys.executable, "-m", "pcpo_fast", "serve-reward", *arguments, "--json"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def address_of(server: "subprocess.Popen[str]") -> dict[str, Any]:
    """What the server says once it serves."""
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line, server.stderr.read() if server.stderr is not None else ""
    return json.loads(line)  # type: ignore[no-any-return]


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    """Poll until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)
