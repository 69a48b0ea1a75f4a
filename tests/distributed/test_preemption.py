"""Runs that a signal stops gracefully: immediately, at the end of the epoch, or at the end of the grace period."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing
from cli_runs import call, records, write_config
from stopping_ranks import one_of_two
from tiny_pipeline import redness

from pcpo_fast.distributed.preemption import SIGNALS, Polled, Stopped, StopRequest
from pcpo_fast.engine.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


def listening(grace: float = 60.0) -> StopRequest:
    return StopRequest(grace, timedelta(seconds=60), lambda _: None)


def ask(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


# ------------------------------------------------------------------------------------------ one process


def test_without_a_signal_nothing_happens_and_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with listening() as stop:
        stop.poll()
        with stop.interruptible():
            pass
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_where_nothing_is_lost(number: int, code: int) -> None:
    said: list[str] = []
    with StopRequest(60.0, timedelta(seconds=60), said.append) as stop:
        stop.whole = False
        ask(number)
        stop.poll()  # in the middle of an epoch's updates it goes on
        stop.whole = True
        with pytest.raises(Stopped, match=f"stopped by {signal.Signals(number).name}") as caught:
            Polled(torch.nn.Identity(), stop.poll)(torch.zeros(1))
        assert caught.value.exit_code == code
        end = time.monotonic() + 10
        while not said and time.monotonic() < end:
            time.sleep(0.01)
    assert len(said) == 1 and "stops gracefully, within 60 s (checkpoint.grace); a second signal" in said[0]


def test_the_end_of_the_grace_stops_in_the_middle_too() -> None:
    with listening() as stop:
        stop.whole, stop.reserve = False, 59.5  # a checkpoint takes most of the grace
        ask()
        stop.poll()
        time.sleep(0.6)
        with pytest.raises(Stopped):
            stop.poll()


def test_a_long_reward_is_left_at_once() -> None:
    with listening() as stop:
        started = time.monotonic()
        with pytest.raises(Stopped), stop.interruptible():
            ask()
            time.sleep(30)
        assert time.monotonic() - started < 10
        with pytest.raises(Stopped), stop.interruptible():  # asked before
            raise AssertionError("not reached")


STUCK = """
import ctypes, datetime, sys
from pcpo_fast.distributed.preemption import StopRequest
with StopRequest(float(sys.argv[1]), datetime.timedelta(seconds=60), lambda text: print(text, flush=True)):
    print("ready", flush=True)
    lock = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)  # never returns, and no signal interrupts it: as a collective whose peer is gone
"""


@pytest.mark.parametrize(
    ("grace", "number", "signals", "code"),
    [("1", signal.SIGINT, 1, 130), ("60", signal.SIGTERM, 2, 143)],
    ids=["grace", "second"],
)
def test_a_process_that_is_stuck_ends(grace: str, number: int, signals: int, code: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "LOCAL_RANK")}
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, grace], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    started = time.monotonic()
    for _ in range(signals):
        process.send_signal(number)
        assert signals == 1 or _ or "a second signal stops it immediately" in process.stdout.readline()
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.startswith("stopped immediately: ") and err.count("\n") == 1
    assert time.monotonic() - started < 20


# ------------------------------------------------------------------------------------------ whole runs

rollouts = 0
signal_in_rollout = 0


def stopping_redness(images: Any, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
    """The tiny pipeline's reward; asks the process to stop in one of the rollouts."""
    global rollouts
    rollouts += len(images) == 8
    if rollouts == signal_in_rollout and len(images) == 8:
        ask()
    return redness(images, prompts, metadata)


def outcome(run: Path) -> tuple[list[dict[str, Any]], str]:
    """Everything but what a clock measures, and a digest of the weights."""
    lines = [
        {key: value for key, value in line.items() if not key.startswith(("time", "throughput"))}
        for line in records(run)
        if line["kind"] != "evaluation"
    ]
    (file,) = (run / "export").rglob("*.safetensors")
    return lines, hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def train(
    tmp_path: Path, pipeline_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Train three epochs with running advantages, whose buffers an abandoned epoch must leave alone."""
    changes: dict[str, Any] = {
        "rewards": [{"name": "test_preemption:stopping_redness"}],
        "advantage": {"normalization": "running", "min_count": 1},
        "train__epochs": 3,
        "evaluation__every": 0,
        "checkpoint__every": 0,
    }
    config = write_config(tmp_path, pipeline_folder, **changes)
    module = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "test_preemption", module)

    def run(name: str, at: int = 0, *overrides: str) -> Any:
        monkeypatch.setattr(module, "rollouts", 0)
        monkeypatch.setattr(module, "signal_in_rollout", at)
        return call(capsys, "train", "--config", config, f"output_dir={tmp_path / name}", *overrides)

    return run


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


def test_a_stopped_run_resumes_bit_for_bit(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("straight").code == 0
    run = tmp_path / "run"

    answer = train("run", 1)
    assert answer.code == 75
    assert answer.err == "stopped by SIGTERM before the first checkpoint: the same command starts the run again\n"

    answer = train("run", 2)  # in the reward of the second epoch, whose rollout is thrown away
    assert answer.code == 75
    assert answer.err == "stopped by SIGTERM: the same command resumes the run after epoch 1\n"
    assert "SIGTERM: the run stops gracefully, within 30 s" in answer.out
    assert kept(run) == ["epoch_000001", "latest"]

    step, asked = Engine.step, 0

    def stepping(engine: Engine) -> None:
        nonlocal asked
        step(engine)
        if engine.updates % 2 == 1 and engine.updates != asked:  # the first of an epoch's two updates is done
            asked = engine.updates
            ask()

    with monkeypatch.context() as patch:  # in the updates of the second epoch, which is trained to its end
        patch.setattr(Engine, "step", stepping)
        answer = train("run")
    assert answer.code == 75
    assert answer.err == "stopped by SIGTERM: the same command resumes the run after epoch 2\n"
    assert kept(run) == ["epoch_000001", "epoch_000002", "latest"]

    with monkeypatch.context() as patch:  # the grace is over in the third epoch: it is lost, and nothing else
        patch.setattr(Engine, "step", stepping)
        patch.setattr(StopRequest, "reserve", property(lambda stop: 1e9, lambda stop, seconds: None), raising=False)
        answer = train("run")
    assert answer.code == 75 and "after epoch 2" in answer.err
    assert kept(run) == ["epoch_000001", "epoch_000002", "latest"]

    answer = train("run")
    assert answer.code == 0, answer.err
    assert outcome(run) == outcome(tmp_path / "straight")


# ------------------------------------------------------------------------------------------ several ranks


def test_ranks_stop_at_the_same_point_and_miss_one_that_died(tmp_path: Path) -> None:
    context = torch.multiprocessing.start_processes(
        one_of_two, (str(tmp_path),), nprocs=2, join=False, start_method="spawn"
    )
    started = time.monotonic()
    for process in context.processes:
        process.join(300)
    assert time.monotonic() - started < 300
    for number in range(2):
        assert json.loads((tmp_path / f"rank{number}.json").read_text()) == {"went_on": True, "code": 75}
    assert json.loads((tmp_path / "last.json").read_text()).startswith("another rank has died; its last output says")
