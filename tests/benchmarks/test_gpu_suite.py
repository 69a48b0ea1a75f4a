"""The GPU suite, without a GPU: no part stops another, the time is kept, everything is written as it comes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import block_ops
import gpu_suite
import pytest
import suite_table
import torch
from gpu_suite import Part, Suite
from pcpo_kernels.dispatch import triton_installed

ROOT = Path(__file__).parents[2]
FILES = ["block_ops.json", "ceilings.json", "flux_step.json", "kernels.json", "suite.json", "suite.log", "table.txt"]
needs_interpreter = pytest.mark.skipif(not triton_installed(), reason="triton is not installed")


def part(name: str, code: str, **fields: Any) -> Part:
    return Part(name, ("-c", code), **{"limit": 60.0, "least": 0.0} | fields)


def run(folder: Path, chosen: list[Part], minutes: float = 9.0) -> dict[str, Any]:
    Suite(folder, {"device": "none", "dry": True}, minutes, dict(os.environ)).run(chosen)
    content: dict[str, Any] = json.loads((folder / "suite.json").read_text())
    return content


def test_no_part_stops_another(tmp_path: Path) -> None:
    endless = "import signal, subprocess, sys; signal.signal(15, signal.SIG_IGN); print('on', flush=True); "
    endless += "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']); signal.pause()"
    content = run(
        tmp_path,
        [
            part("fails", "import sys; print('error: no luck', file=sys.stderr); print('end'); sys.exit(3)"),
            part("raises", "raise ValueError('wrong')"),
            part("dies", "import os; os.abort()"),
            part("hangs", endless, limit=2.0),
            part("lacks", "", needs=("no_such_package",)),
            part("talks", f"print(('x' * 79 + chr(10)) * {3 * gpu_suite.LOG_BYTES // 80}); print('through')"),
            part("nothing collected", "raise SystemExit(5)", fine=(0, 5), limit=900.0),
        ],
    )
    found = {record["name"]: (record["status"], record["why"]) for record in content["parts"]}
    assert found == {
        "fails": ("failed", "error: no luck"),
        "raises": ("failed", "ValueError: wrong"),
        "dies": ("failed", "exit code -6, without a word"),
        "hangs": ("stopped", "its 2 s were up; what it had measured is kept"),
        "lacks": ("left out", "not installed: no_such_package (benchmarks/wheels.sh collects them)"),
        "talks": ("done", "through"),
        "nothing collected": ("done", ""),
    }
    assert not content["complete"]
    assert 1 < (tmp_path / "suite.log").stat().st_size / gpu_suite.LOG_BYTES < 1.01
    table = (tmp_path / "table.txt").read_text()
    assert "fails: error: no luck" in table and "hangs: its 2 s were up" in table


def test_a_part_ends_when_it_ends_and_no_later(tmp_path: Path) -> None:
    """Not when a worker that it left behind does; and one that never stops talking is stopped."""
    worker = "[sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True"
    leaves = f"import subprocess, sys; print(subprocess.Popen({worker}).pid)"
    talks_on = part("talks on", "while True: print('on')", limit=2.0)
    content = run(tmp_path, [part("leaves a worker", leaves), talks_on, part("ends", "", limit=900.0)])
    first, second, _ = content["parts"]
    os.kill(int(first["why"]), signal.SIGKILL)
    assert (first["status"], second["status"]) == ("done", "stopped")


def test_time_is_kept_for_what_comes_later(tmp_path: Path) -> None:
    """A minute: the first may take what the second, which is kept, leaves; the third is nobody's."""
    seconds = "import sys; print(sys.argv[1])"
    chosen = [
        Part("first", ("-c", seconds, "{seconds}"), limit=900.0, least=1.0),
        Part("second", ("-c", seconds, "{seconds}"), limit=270.0, least=180.0),
        Part("third", ("-c", seconds, "{seconds}"), limit=540.0, least=540.0, kept=False),
    ]
    first, second, third = run(tmp_path, chosen, minutes=1.0)["parts"]
    assert 20 < float(first["why"]) <= 0.85 * 40
    assert 0 < float(second["why"]) <= 26, "its own limit"
    assert third["status"] == "left out" and third["why"].endswith("s were left for it")


def test_no_time_is_kept_for_what_is_not_installed(tmp_path: Path) -> None:
    """What runs shares all of it, by the limits; what one leaves over is for the next."""
    seconds = "import sys; print(sys.argv[1])"
    chosen = [
        Part("first", ("-c", seconds, "{seconds}"), limit=90.0, least=1.0),
        Part("lacks", (), limit=900.0, least=300.0, needs=("no_such_package",)),
        Part("second", ("-c", seconds, "{seconds}"), limit=180.0, least=1.0),
    ]
    first, lacks, second = run(tmp_path, chosen)["parts"]
    assert 0.85 * 175 < float(first["why"]) <= 0.85 * 180
    assert lacks["status"] == "left out"
    assert 0.85 * 500 < float(second["why"]) <= 0.85 * 540


def test_nine_minutes_have_room_for_every_part_that_matters(tmp_path: Path) -> None:
    listed = gpu_suite.parts(tmp_path, dry=False, size="full")
    assert sum(one.least for one in listed if one.kept) < 9 * 60
    names = [one.name for one in listed]
    order = [
        "ceilings",
        "kernel tests",
        "our step and the strong one",
        "the public way, a quarter",
        "kernels",
        "blocks",
    ]
    assert names[: len(order)] == order
    assert all((ROOT / one.command[0]).exists() for one in listed if one.command[0] != "-m")


@pytest.mark.parametrize(("cores", "workers"), [(4, "4"), (16, "16"), (192, "16")])
def test_kernel_tests_take_the_cores_that_this_process_may_use(
    cores: int, workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    command = gpu_suite.parts(tmp_path, dry=False, size="full")[1].command
    assert command[command.index("-n") + 1] == workers


def test_the_table_fits_a_screen(tmp_path: Path) -> None:
    ours = {"op": "policy_loss", "way": "forward", "name": "ours", "milliseconds": 2.0, "graph_milliseconds": 1.0}
    records = [
        ours | {"size": f"size{i}", "rows": i, "form": "key", "launches": 2, "share_of_copy": 0.5} for i in range(90)
    ]
    records.append({"op": "guidance", "way": "forward", "size": "size0", "rows": 0, "name": "ours", "form": "cfg"})
    records[-1]["failed"] = "RuntimeError: long\nand longer " + 500 * "x"
    for name in ("kernels.json", "block_ops.json"):
        (tmp_path / name).write_text(json.dumps({"records": list(reversed(records))}))
    step = {
        "name": "ours",
        "rollout_s": 1.0,
        "update_s": 1.0,
        "tflops": 1.0,
        "mfu": None,
        "peak_gib": 1.0,
        "step_s": 2.0,
    }
    facts = {"images": 12, "micro_batch": 4, "finetune": "lora", "size": "full", "ours": step, "extras": 4 * [step]}
    (tmp_path / "flux_step.json").write_text(json.dumps(facts | {"ladder": 8 * [step]}))
    attention = [{"op": "attention", "name": "flash", "tflops": 1.0}] * 13
    (tmp_path / "ceilings.json").write_text(json.dumps({"copy_bytes_per_second": 1.0, "records": attention}))
    suite = {"device": "none", "minutes": 9.0, "parts": []}
    suite["parts"] = [{"status": "failed", "seconds": 1.0, "name": "kernel tests", "why": "y" * 500}]
    lines = suite_table.table(tmp_path, suite).splitlines()
    assert len(lines) <= 60 and all(len(line) <= 150 for line in lines)
    assert "The kernel tests did not pass: no time of our kernels below may be published." in lines
    first, second = (number for number, line in enumerate(lines) if line.startswith("ops:"))
    assert second - first > 10 and len(lines) - second > 10, "both have their share of the lines"
    assert lines[-1] == suite_table.CUT
    assert any("FAILED" in line and "guidance" in line for line in lines)


def test_what_an_earlier_run_left_is_marked(tmp_path: Path) -> None:
    old, new = ({"measured": f"2026-01-0{day}T00:00:00Z", "code": code} for day, code in ((1, "abc"), (3, "def")))
    path = {"rollout_s": 1.0, "update_s": 1.0, "tflops": 1.0, "mfu": None, "peak_gib": 1.0, "step_s": 2.0}
    step = {
        "images": 12,
        "micro_batch": 4,
        "finetune": "lora",
        "size": "full",
        "ladder": [],
        "extras": [],
        "ratio": 1.5,
    }
    step |= {"ours": path | new | {"name": "ours"}, "baseline": path | old | {"name": "baseline"}}
    step["strong"] = {"name": "strong", "failed": "RuntimeError: x"}
    (tmp_path / "flux_step.json").write_text(json.dumps(step))
    (tmp_path / "ceilings.json").write_text(json.dumps(new | {"copy_bytes_per_second": 1e9}))
    (tmp_path / "kernels.json").write_text(json.dumps(old | {"records": []}))
    suite = {"device": "none", "minutes": 9.0, "parts": [], "started": "2026-01-02T00:00:00Z"}
    lines = suite_table.table(tmp_path, suite).splitlines()
    mark = " (EARLIER: 2026-01-01T00:00:00Z, code abc)"
    assert [line.endswith(mark) for line in lines[1:]] == [False, False, False, False, True, True, True], lines
    assert "strong (EARLIER: date unknown, code unknown): FAILED, RuntimeError: x" in lines[4]


def dry_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PCPO_"))}
    environment |= {"PYTHON": sys.executable, "OUT": str(folder)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), "--dry-run", "--minutes", "30", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@needs_interpreter
def test_dry_run_of_parts(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "--parts", "1,2,5,6")
    assert done.returncode == 0, done.stdout + done.stderr
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert {one["status"] for one in suite["parts"]} == {"done"} and suite["complete"]
    names = ["ceilings", "kernels", "block_ops"]
    written = {f"{name}.json" for name in names} | {"suite.json", "suite.log", "table.txt"}
    assert {path.name for path in tmp_path.iterdir()} == written
    for name in names:
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert content["complete"] and all(record["milliseconds"] > 0 for record in content["records"])
    assert (tmp_path / "table.txt").read_text() in done.stdout
    assert "A dry run in Triton's interpreter" in done.stdout


def test_blocks_are_compiled_after_all_else_of_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that compiles slowly then has at least our times beside the eager ones."""
    monkeypatch.setattr(block_ops, "measure", lambda clock, kind, call, traffic, copy, **facts: facts | {"name": kind})
    clock: Any = SimpleNamespace(device=torch.device("cpu"), gpu=False)
    found = list(block_ops.of_shape(clock, block_ops.TINY[0], 1.0))
    ways = [(op, way) for op in block_ops.OPS for way in ("forward", "lora", "full")]
    first = [(op, way, name) for op, way in ways for name in ("ours", "eager")]
    assert [(one["op"], one["way"], one["name"]) for one in found] == [*first, *((*one, "compiled") for one in ways)]


@needs_interpreter
@pytest.mark.slow
def test_dry_run_of_everything(tmp_path: Path) -> None:
    done = dry_run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert [one["status"] for one in suite["parts"]] == ["done"] * 9
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    step = json.loads((tmp_path / "flux_step.json").read_text())
    assert all(step[name]["step_s"] > 0 for name in ("ours", "strong", "baseline"))
    assert {"compiled blocks", "block kernels"} <= {rung["name"] for rung in step["ladder"] if "step_s" in rung}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_a_machine_without_gpu() -> None:
    command = ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh")]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: PyTorch sees no GPU on this machine (--dry-run tries the suite without one)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "0"], "argument --parts: takes numbers from 1 to 9, not 0"),
        (["--parts", "1,x,12"], "argument --parts: takes numbers from 1 to 9, not 12, x"),
        (["--size", "huge"], "argument --size: invalid choice: 'huge'"),
        (["--minutes", "0"], "--minutes must be positive"),
    ],
)
def test_a_wrong_argument_costs_no_minute(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It is refused before the device is asked for, and before anything is written."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main(["--dry-run", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
