"""Run the parts of the GPU suite within a time limit; started by benchmarks/gpu_suite.sh.

Every part is a process with its own limit: one that fails, hangs or loses the device does not stop the others. They
write their results as soon as they are measured, into seven files: ``table.txt`` (what was measured, what failed and
why), ``suite.json`` (the same for a script), ``suite.log`` (what the parts printed), and the parts' own JSON files.
"""

import argparse
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from revisions import now
from suite_table import table

BENCHMARKS = Path(__file__).parent
STEP_NEEDS = ("deepspeed", "diffusers", "peft", "pydantic", "transformers")
LOG_BYTES = 1 << 20
"""Log size limit of one part, so that all parts together stay below 16 MB."""
LAST_LINES = 40
POLL_SECONDS = 0.5
"""How often a silent part is asked whether it has ended."""
MOST_WORKERS = 16
"""Processes of the kernel tests, each with a context on the GPU."""
NO_TESTS = 5
"""pytest's exit code if every test file was skipped."""


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    Attributes:
        name: of the part.
        command: arguments of Python. ``{seconds}`` becomes the time after which it shall start nothing new.
        limit: seconds after which it is ended, in a suite of nine minutes. Where the limits of what is left to run do
            not fill the time, each grows in proportion.
        least: seconds without which it is not worth starting; kept for it while earlier parts run, if ``kept``.
        kept: its ``least`` is taken from no earlier part's limit otherwise.
        needs: packages; without one of them it is left out.
        fine: exit codes that mean success.
        environment: variables for it alone.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    least: float
    kept: bool = True
    needs: tuple[str, ...] = ()
    fine: tuple[int, ...] = (0,)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def parts(out: Path, *, dry: bool, size: str) -> list[Part]:
    """All parts, in their order: the most valuable first."""
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.failures_at_once")
    # xdist's own "auto" counts physical cores, or those of a container's host.
    workers = str(min(MOST_WORKERS, len(os.sched_getaffinity(0))))
    every_core = ("-n", workers, "--dist", "worksteal", "--maxfail", "5")
    tiny = ("--tiny", "--seconds", "0.01") if dry else ("--seconds", "0.1")
    kernels = {"PCPO_KERNELS": "triton"} if dry else {}  # on a CPU the interpreter, not the reference

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        return f"benchmarks/{name}.py", *arguments, "--out", str(out), "--budget", "{seconds}", *tiny

    def step(paths: str, *arguments: str) -> tuple[str, ...]:
        measured = ("--size", "dry" if dry else size, "--json", str(out / "flux_step.json"), "--add")
        return (
            "benchmarks/flux_step.py",
            *measured,
            "--repeats",
            "1" if dry else "3",
            "--only",
            paths,
            *arguments,
            "--budget-seconds",
            "{seconds}",
        )

    # In the interpreter a file takes seconds: enough to see that the tests are found and run.
    tests = ("tests/kernels/device/test_device_guidance.py",) if dry else (*every_core, "tests/kernels/device")
    trainer = ("tests/policies/test_attention_gpu.py", "tests/training/test_waiting.py", "-m", "gpu")
    quarter = ("--public-images", "2" if dry else "3")
    return [
        Part("ceilings", script("gpu_ceilings"), 45, 15),
        # A process per core: what they compile with Inductor needs no workers of its own.
        Part("kernel tests", (*pytest, *tests), 120, 30, environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"}),
        Part("our step and the strong one", step("ours,strong"), 270, 120, needs=STEP_NEEDS),
        Part("the public way, a quarter", step("baseline", *quarter), 90, 40, needs=STEP_NEEDS),
        Part("kernels", script("kernel_times"), 75, 20, environment=kernels),
        Part("blocks", script("block_ops"), 75, 20, environment=kernels),
        Part("levers no GPU has proved", step("unproved"), 150, 60, kept=False, needs=STEP_NEEDS),
        Part("attention and waiting", (*pytest, *trainer), 90, 20, kept=False, needs=STEP_NEEDS, fine=(0, NO_TESTS)),
        Part("the ladder", step("ladder,extras"), 600, 60, kept=False, needs=STEP_NEEDS),
    ]  # fmt: skip


def run_part(part: Part, seconds: float, environment: dict[str, str], log: Any) -> dict[str, Any]:
    """Run one part for at most so long; returns what became of it."""
    command = [sys.executable, *(word.replace("{seconds}", f"{0.85 * seconds:.0f}") for word in part.command)]
    log.write(f"\n===== {part.name}, {seconds:.0f} s: {' '.join(command)}\n".encode())
    began, last = time.monotonic(), deque[str](maxlen=LAST_LINES)
    process = subprocess.Popen(
        command,
        env=environment | part.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        in_time = _drain(process, began + seconds, log, last)
    finally:
        _end(process)
    record: dict[str, Any] = {
        "name": part.name,
        "seconds": round(time.monotonic() - began, 1),
        "rc": process.returncode,
    }
    if not in_time:
        return record | {"status": "stopped", "why": f"its {seconds:.0f} s were up; what it had measured is kept"}
    if process.returncode in part.fine:
        return record | {"status": "done", "why": last[-1] if last else ""}
    errors = [line for line in last if line.startswith(("error:", "FAILED", "ERROR")) or "Error: " in line]
    why = errors[0] if errors else last[-1] if last else f"exit code {process.returncode}, without a word"
    return record | {"status": "failed", "why": why}


def _drain(process: subprocess.Popen[bytes], until: float, log: Any, last: deque[str]) -> bool:
    """Copy output to the log as it arrives; returns whether the process ended in time.

    What it started may outlive it and hold its output open, as a compiler's workers do: that is not waited for.
    """
    assert process.stdout is not None
    written, rest = 0, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # asked first: all that it wrote is then there to be read
            left = until - time.monotonic()
            if left <= 0:
                return ended
            if selector.select(0.0 if ended else min(POLL_SECONDS, left)):
                data = os.read(process.stdout.fileno(), 1 << 16)
                log.write(data[: max(0, LOG_BYTES - written)])
                log.flush()
                written += len(data)
                *lines, rest = (rest + data).split(b"\n")
                last.extend(text for line in lines if (text := line.decode(errors="replace").strip()))
                if not data:
                    break
            elif ended:
                return True
    try:
        process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a part and all processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(3)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    process.wait()


class Suite:
    """The parts of one call, run one after the other; files are rewritten after each."""

    def __init__(self, out: Path, facts: dict[str, Any], minutes: float, environment: dict[str, str]) -> None:
        self.out, self.environment = out, environment
        self.scale, self.until = minutes / 9, time.monotonic() + 60 * minutes
        self.content: dict[str, Any] = facts | {"minutes": minutes, "started": now(), "complete": False, "parts": []}

    def run(self, chosen: list[Part]) -> None:
        """Run what there is time for."""
        with (self.out / "suite.log").open("wb") as log:
            for place, part in enumerate(chosen):
                record = self._turn(part, chosen[place + 1 :], log)
                self.content["parts"].append(record)
                print("{status:8} {name}: {why}".format(**record)[:200], flush=True)
                self.write()
        self.content["complete"] = all(record["status"] == "done" for record in self.content["parts"])
        self.write()

    def _turn(self, part: Part, following: list[Part], log: Any) -> dict[str, Any]:
        left_out = {"name": part.name, "seconds": 0.0, "rc": None, "status": "left out"}
        if missing := part.missing:
            return left_out | {"why": f"not installed: {', '.join(missing)} (benchmarks/wheels.sh collects them)"}
        following = [later for later in following if not later.missing]
        left = self.until - time.monotonic()
        kept = sum(later.least for later in following if later.kept) * min(1.0, self.scale)
        shares = self.scale * sum(one.limit for one in (part, *following))
        seconds = min(part.limit * self.scale * max(1.0, left / shares), left - kept)
        if seconds < part.least * min(1.0, self.scale):
            return left_out | {"why": f"{max(0.0, seconds):.0f} s were left for it"}
        return run_part(part, seconds, self.environment, log)

    def write(self) -> None:
        """Write the state and the table, each atomically."""
        texts = {"suite.json": json.dumps(self.content, indent=1), "table.txt": table(self.out, self.content)}
        for name, text in texts.items():
            temporary = self.out / f"{name}.tmp"
            temporary.write_text(f"{text}\n")
            os.replace(temporary, self.out / name)
        for left in self.out.glob("*.tmp"):
            left.unlink()  # of a part that was ended while it wrote


def gpu() -> dict[str, Any]:
    """Name and memory of the first GPU visible to PyTorch; empty if there is none."""
    code = (
        "import json, torch; p = torch.cuda.is_available() and torch.cuda.get_device_properties(0); "
        "print(json.dumps({'device': p.name, 'gib': p.total_memory / 2**30} if p else {}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def refused() -> str:
    """Why Triton's interpreter cannot be used here; empty if it can."""
    code = "from pcpo_kernels.dispatch import interpreter_lacks; print(interpreter_lacks())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def numbers(text: str) -> list[int]:
    """What ``--parts`` says."""
    count = len(parts(Path(), dry=True, size=""))
    known = {str(number): number for number in range(1, count + 1)}
    found = [one.strip() for one in text.split(",")]
    if unknown := set(found) - set(known):
        raise argparse.ArgumentTypeError(f"takes numbers from 1 to {count}, not {', '.join(sorted(unknown))}")
    return [known[one] for one in found]


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit status is 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_suite.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, on any machine")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT") or None, help="folder ($OUT, or by the device's name)"
    )
    parser.add_argument(
        "--size", choices=("full", "small"), help="of the training step (by the GPU's memory; a dry run has its own)"
    )
    parser.add_argument(
        "--parts", type=numbers, default=[], help="numbers of the parts to run, 1,2,5 for example (all)"
    )
    chosen = parser.parse_args(arguments)
    if not chosen.minutes > 0:
        parser.error("--minutes must be positive")
    os.chdir(BENCHMARKS.parent)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    for name in ("TRITON_INTERPRET", "PCPO_KERNELS"):
        environment.pop(name, None)
    if chosen.dry_run:
        if reason := refused():
            print(f"error: {reason}", file=sys.stderr)
            return 2
        facts: dict[str, Any] = {"device": "dry run", "gib": 0.0}
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        chosen.out = chosen.out or Path(tempfile.mkdtemp(prefix="gpu_suite_"))
    else:
        facts = gpu()
        if not facts:
            print("error: PyTorch sees no GPU on this machine (--dry-run tries the suite without one)", file=sys.stderr)
            return 2
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        folder = "_".join(facts["device"].lower().split())
        chosen.out = chosen.out or BENCHMARKS / "results" / folder
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{facts['device']} -> {out}", flush=True)
    listed = parts(out, dry=chosen.dry_run, size=chosen.size or ("full" if facts["gib"] > 44 else "small"))
    listed = [listed[number - 1] for number in chosen.parts] or listed
    suite = Suite(out, facts | {"dry": chosen.dry_run}, chosen.minutes, environment)
    suite.run(listed)
    print(table(out, suite.content))
    return int(any(record["status"] == "failed" for record in suite.content["parts"]))


if __name__ == "__main__":
    sys.exit(main())
