"""What two ranks do in the test of signals; in a file that a new process imports in no time."""

import json
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pcpo_fast.distributed.preemption import Stopped, StopRequest
from pcpo_fast.errors import UserError


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def one_of_two(number: int, folder: str) -> None:
    """What each of two processes does; its findings go to a file. The second one dies at the end."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    findings: dict[str, Any] = {}
    with StopRequest(60.0, timedelta(seconds=60), lambda _: None) as stop:
        stop.poll()
        stop.whole = False
        if number == 1:
            ask()
        stop.poll()
        stop.whole = True
        with stop.interruptible():  # its collectives need all ranks
            findings["went_on"] = True
        try:
            stop.poll()
        except Stopped as stopped:
            findings["code"] = stopped.exit_code
    (Path(folder) / f"rank{number}.json").write_text(json.dumps(findings))
    with StopRequest(60.0, timedelta(seconds=60), lambda _: None) as stop:
        stop.poll()
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            stop.poll()
        except UserError as error:
            (Path(folder) / "last.json").write_text(json.dumps(str(error)))
