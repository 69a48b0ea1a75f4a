"""A profile of a run: what the trace holds, what its summary says of it, and that the training does not notice."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import Output, call, records, write_config

from pcpo_fast.profiling import profiler_ranges
from pcpo_fast.profiling.recording import ProfileRequest, Recorder
from pcpo_fast.profiling.trace_summary import ranges_of, read_trace, summarize

Capture = pytest.CaptureFixture[str]


class Profiled:
    """A run with a profile, and what it said."""

    def __init__(self, run: Path, answer: Output) -> None:
        self.run, self.answer = run, answer
        self.events = read_trace(run / "profile" / "trace.json.gz")
        self.summary = json.loads((run / "profile" / "summary.json").read_text())

    def counts(self) -> dict[str, tuple[int, int]]:
        """How many were recorded, and how many there were."""
        return {"/".join(entry["path"]): (entry["count"], entry["happened"]) for entry in self.summary["ranges"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiled")


@pytest.fixture
def config(folder: Path, pipeline_folder: Path) -> Path:
    return write_config(folder, pipeline_folder, train__updates_per_epoch=2, rollout__batch_size=4)


@pytest.fixture
def profiled(folder: Path, config: Path, capsys: Capture) -> Profiled:
    """The second of two epochs, whole; made once."""
    if not (folder / "said.json").exists():
        answer = call(capsys, "train", "--config", config, "--profile")
        assert answer.code == 0, answer.err
        (folder / "said.json").write_text(json.dumps(answer))
    return Profiled(folder / "run", Output(*json.loads((folder / "said.json").read_text())))


def test_the_trace_is_chromes_format(profiled: Profiled) -> None:
    with gzip.open(profiled.run / "profile" / "trace.json.gz", "rt") as file:
        trace = json.load(file)
    assert isinstance(trace["traceEvents"], list) and len(profiled.events) > 1000
    for event in profiled.events:
        assert isinstance(event["name"], str)
        assert event["ts"] >= 0 and event["dur"] >= 0
        assert "pid" in event and "tid" in event


def test_ranges_lie_within_each_other(profiled: Profiled) -> None:
    around: list[Any] = []
    for event in ranges_of(profiled.events):
        end = event["ts"] + event["dur"]
        while around and event["ts"] >= around[-1]:
            around.pop()
        assert not around or end <= around[-1] + 1e-3, f"{event['name']} ends after what it began in"
        around.append(end)


def test_every_range_is_there_as_often_as_it_happens_or_as_its_limit(profiled: Profiled) -> None:
    """Four steps of two batches of four images; two updates of two micro-steps of six transitions of three steps."""
    assert profiled.counts() == {
        "epoch": (1, 1),
        "epoch/rollout": (1, 1),
        "epoch/rollout/batch": (1, 2),
        "epoch/rollout/batch/sampler step": (4, 8),
        "epoch/rollout/batch/decode": (1, 2),
        "epoch/reward": (1, 1),
        "epoch/update": (1, 2),
        "epoch/update/micro-step": (2, 4),
        "epoch/update/micro-step/forward": (2, 4),
        "epoch/update/micro-step/loss": (2, 4),
        "epoch/update/micro-step/backward": (2, 4),
        "epoch/update/micro-step/optimizer": (1, 2),
        "epoch/evaluation": (1, 1),
        "epoch/evaluation/batch": (1, 1),
        "epoch/evaluation/batch/sampler step": (4, 4),
        "epoch/evaluation/batch/decode": (1, 1),
        "epoch/checkpoint": (1, 1),
    }


def test_the_times_are_those_of_the_run(profiled: Profiled) -> None:
    epoch = [line for line in records(profiled.run) if line["kind"] == "epoch"][1]
    seconds = {"/".join(entry["path"]): entry["seconds"] for entry in profiled.summary["ranges"]}
    # The clock of the metrics begins a little before the range, and the second of two updates is not recorded.
    assert 0.5 * epoch["time/rollout"] < seconds["epoch/rollout"] <= epoch["time/rollout"]
    assert 0.1 * epoch["time/update"] < seconds["epoch/update"] <= 0.9 * epoch["time/update"]
    assert seconds["epoch"] == pytest.approx(profiled.summary["seconds"], rel=1e-3)
    assert seconds["epoch"] > sum(seconds[f"epoch/{phase}"] for phase in ("rollout", "reward", "update", "checkpoint"))
    summary = profiled.summary
    assert 0 < summary["python_ms"] < summary["micro_step_ms"]
    micro_steps = seconds["epoch/update/micro-step"] - seconds["epoch/update/micro-step/optimizer"]
    assert summary["micro_step_ms"] == pytest.approx(1e3 * micro_steps / 2, rel=1e-3)
    # Which take the most time depends on the CPU: of a network this small, not even its products on every one.
    assert any(entry["name"].startswith("aten::") for entry in summary["operations"])
    assert (summary["epoch"], summary["device_busy"], summary["kernels"]) == (2, None, [])


def test_it_is_shown_on_one_screen(profiled: Profiled) -> None:
    begin = next(i for i, line in enumerate(profiled.answer.out.splitlines()) if "Profile of epoch 2" in line)
    shown = profiled.answer.out.splitlines()[begin:]
    assert len(shown) < 60
    text = "\n".join(shown)
    assert "sampler step" in text and "A micro-step takes" in text and "trace.json.gz" in text


def test_the_training_does_not_notice(
    profiled: Profiled, folder: Path, pipeline_folder: Path, config: Path, capsys: Capture
) -> None:
    answer = call(capsys, "train", "--config", config, f"output_dir={folder / 'plain'}")
    assert answer.code == 0, answer.err
    assert not (folder / "plain" / "profile").exists()

    def numbers(run: Path) -> list[dict[str, Any]]:
        clock = ("time", "throughput", "memory")
        return [{key: value for key, value in line.items() if not key.startswith(clock)} for line in records(run)]

    assert numbers(profiled.run) == numbers(folder / "plain")


@pytest.mark.slow
def test_another_epoch_and_more_updates(folder: Path, config: Path, capsys: Capture) -> None:
    run = folder / "other"
    chosen = ("--profile-epoch", "1", "--profile-updates", "2", "train.epochs=1", f"output_dir={run}")
    answer = call(capsys, "train", "--config", config, *chosen)
    assert answer.code == 0, answer.err
    other = Profiled(run, answer)
    assert other.summary["epoch"] == 1
    assert other.counts()["epoch/update"] == (2, 2) and other.counts()["epoch/update/micro-step/optimizer"] == (2, 2)


# ----------------------------------------------------------------------------------------- what is recorded


def recorder(config: Path, folder: Path, *overrides: str, start: int = 0, **request: Any) -> Recorder:
    from pcpo_fast.config.loading import load_config

    return Recorder(ProfileRequest(**request), load_config(config, [f"output_dir={folder}", *overrides]), start)


def test_a_long_epoch_is_recorded_in_parts(config: Path, tmp_path: Path) -> None:
    """The first steps and micro-steps, every decode and the optimizer; what is behind the limits leaves no event."""
    listener = recorder(config, tmp_path, "train.epochs=1")
    tensor = torch.ones(2)
    with profiler_ranges.listening(listener), profiler_ranges.named("epoch"):
        with profiler_ranges.named("rollout"):
            for batch in profiler_ranges.each("batch", range(3)):
                for step in profiler_ranges.each("sampler step", range(40)):
                    torch.sub(tensor, 1) if batch == 0 and step < 8 else torch.mul(tensor, 2)
                with profiler_ranges.named("decode"):
                    torch.div(tensor, 3) if batch == 0 else torch.mul(tensor, 2)
        for update in range(2):
            with profiler_ranges.named("update"):
                for step in profiler_ranges.each("micro-step", range(30)):
                    torch.sub(tensor, 1) if step < 4 and update == 0 else torch.mul(tensor, 2)
                    if step == 29:
                        with profiler_ranges.named("optimizer"):
                            torch.div(tensor, 3) if update == 0 else torch.mul(tensor, 2)
    trace = tmp_path / "profile" / "trace.json.gz"
    entries = summarize(trace, listener.happened)["ranges"]
    assert {"/".join(e["path"]): (e["count"], e["happened"]) for e in entries} == {
        "epoch": (1, 1),
        "epoch/rollout": (1, 1),
        "epoch/rollout/batch": (1, 3),
        "epoch/rollout/batch/sampler step": (8, 120),
        "epoch/rollout/batch/decode": (1, 3),
        "epoch/update": (1, 2),
        "epoch/update/micro-step": (4, 60),
        "epoch/update/optimizer": (1, 2),
    }
    names = Counter(event["name"] for event in read_trace(trace) if event.get("cat") == "cpu_op")
    assert (names["aten::sub"], names["aten::div"], names["aten::mul"]) == (8 + 4, 1 + 1, 0)


def test_a_run_that_breaks_off_leaves_a_trace(config: Path, tmp_path: Path) -> None:
    listener = recorder(config, tmp_path, "train.epochs=1")
    with (
        pytest.raises(ZeroDivisionError),
        profiler_ranges.listening(listener),
        profiler_ranges.named("epoch"),
        profiler_ranges.named("rollout"),
    ):
        raise ZeroDivisionError
    own = ranges_of(read_trace(tmp_path / "profile" / "trace.json.gz"))
    assert [event["name"] for event in own] == ["epoch", "rollout"]
    with profiler_ranges.named("epoch"):  # nobody listens any more
        assert listener.happened["epoch",] == 1


def test_ranges_have_one_listener_and_cost_nothing_without(config: Path, tmp_path: Path) -> None:
    assert profiler_ranges.named("update") is profiler_ranges.named("loss")
    first, second = recorder(config, tmp_path), recorder(config, tmp_path)
    with (
        profiler_ranges.listening(first),
        pytest.raises(RuntimeError, match="listener"),
        profiler_ranges.listening(second),
    ):
        pass
    assert profiler_ranges.named("update") is profiler_ranges.NOTHING


def test_python_is_what_no_operation_of_any_thread_covers(tmp_path: Path) -> None:
    """By hand: micro-steps of 95 µs, 10 of them the optimizer's, 35 + 10 in operations of two threads that overlap."""

    def event(name: str, cat: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "pid": 1, "tid": tid}

    events = [
        event("update", "user_annotation", 0, 100),
        event("micro-step", "user_annotation", 0, 45),
        event("micro-step", "user_annotation", 50, 50),
        event("optimizer", "user_annotation", 90, 10),
        event("aten::linear", "cpu_op", 10, 40),
        event("aten::mm", "cpu_op", 15, 30),
        event("aten::mm", "cpu_op", 40, 20, tid=2),
        event("aten::add_", "cpu_op", 92, 6),
        event("elsewhere", "cpu_op", 200, 50),
        event("gemm", "kernel", 20, 25, tid=7),
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
    ]
    file = tmp_path / "trace.json.gz"
    with gzip.open(file, "wt") as text:
        json.dump({"traceEvents": events}, text)
    summary = summarize(file)
    assert summary["micro_step_ms"] == pytest.approx((95 - 10) / 2 / 1e3)
    assert summary["python_ms"] == pytest.approx((95 - 10 - 45) / 2 / 1e3)
    seconds = {entry["name"]: (entry["count"], entry["seconds"]) for entry in summary["operations"]}
    assert seconds["aten::mm"] == (2, pytest.approx(50e-6)) and seconds["aten::linear"] == (1, pytest.approx(10e-6))
    assert summary["kernels"] == [{"name": "gemm", "count": 1, "seconds": pytest.approx(25e-6)}]
    assert summary["device_busy"] == pytest.approx(25 / 95)


# ------------------------------------------------------------------------------------------------- bad input


def test_epochs_that_are_not_trained_and_folders_that_cannot_be_written(
    config: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = f"output_dir={tmp_path / 'run'}"
    for arguments, said in (
        (("--profile-epoch", "3"), "--profile-epoch: the run does not train epoch 3; allowed: 1 to 2 (train.epochs)"),
        (("--profile-epoch", "0"), "--profile-epoch: the run does not train epoch 0; allowed: 1 to 2 (train.epochs)"),
        (("--profile", "--profile-updates", "0"), "--profile-updates: must be at least 1, got 0"),
    ):
        answer = call(capsys, "train", "--config", config, output, *arguments)
        assert (answer.code, answer.err) == (2, f"error: {said}\n")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "profile").touch()
    answer = call(capsys, "train", "--config", config, output, "--profile")
    folder = tmp_path / "run" / "profile"
    assert (answer.code, answer.err) == (2, f"error: --profile: {folder} cannot be written: File exists\n")
    assert "Loading" not in answer.out


def test_a_trace_that_cannot_be_written_is_a_warning(config: Path, tmp_path: Path) -> None:
    listener = recorder(config, tmp_path, "train.epochs=1")
    with profiler_ranges.listening(listener), profiler_ranges.named("epoch"):
        listener.folder.rmdir()
        listener.folder.touch()
    assert listener.problem is not None
