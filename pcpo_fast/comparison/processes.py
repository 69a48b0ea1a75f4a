"""A training run in a process of its own: starting, watching and stopping it."""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pcpo_fast
from pcpo_fast.comparison.run_progress import RunProgress
from pcpo_fast.comparison.variants import PlannedRun
from pcpo_fast.errors import UserError

PATIENCE = 20.0
"""Seconds a run is given to stop after an interrupt, before SIGTERM."""

FIRST_PORT = 29_500
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


@dataclass
class RunningRun:
    """A running process.

    Attributes:
        run: the planned run.
        slot: its index among the runs in progress, from 0.
        process: the trainer, or the launcher above it.
    """

    run: PlannedRun
    slot: int
    process: "subprocess.Popen[bytes]"
    progress: RunProgress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = RunProgress(self.run.folder)


def command_of(run: PlannedRun, launcher: str | None, slot: int) -> list[str]:
    """The command line of a run.

    Args:
        run: the planned run.
        launcher: None for this interpreter, or a launcher with its options, to which script and settings are appended.
            ``{slot}`` and ``{port}`` are replaced by ``slot`` and a port of its own, so that simultaneous runs do not
            collide.
        slot: index among the runs in progress, from 0.

    Raises:
        UserError: no script was found for the launcher to start.
    """
    arguments = [*(["--config", run.config_file] if run.config_file else []), *run.overrides]
    if launcher is None:
        return [sys.executable, "-m", "pcpo_fast", "train", *arguments]
    words = [
        word.replace("{slot}", str(slot)).replace("{port}", str(FIRST_PORT + slot)) for word in shlex.split(launcher)
    ]
    return [*words, *_script(), *arguments]


def start_run(
    run: PlannedRun, slot: int, *, launcher: str | None, environment: Mapping[str, str], keep_open: int | None = None
) -> RunningRun:
    """Start a run; its output is appended to its log.

    Args:
        run: the planned run.
        slot: see :func:`command_of`.
        launcher: see :func:`command_of`.
        environment: its complete environment.
        keep_open: a file descriptor that the process inherits.

    Raises:
        UserError: the launcher cannot be started.
    """
    command = command_of(run, launcher, slot)
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "ab") as log:
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        log.write(f"--- {when}  {shlex.join(command)}\n".encode())
        log.flush()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=() if keep_open is None else (keep_open,),
                # Its own process group: Ctrl-C in the terminal reaches only this command, which passes it on.
                start_new_session=True,
                preexec_fn=_before_start(os.getpid()),
            )
        except OSError as error:
            raise UserError(f"--launcher: {command[0]} cannot be started: {error.strerror}") from None
    return RunningRun(run, slot, process)


def end_runs(running: Sequence[RunningRun]) -> None:
    """Interrupt runs as Ctrl-C would and wait for them; those that do not stop get SIGTERM, then SIGKILL."""
    for how, seconds in ((signal.SIGINT, PATIENCE), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        left = [job for job in running if job.process.poll() is None]
        for job in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(job.process.pid, how)
        end = time.monotonic() + seconds
        while any(job.process.poll() is None for job in left) and time.monotonic() < end:
            time.sleep(0.05)


def last_words(log: Path) -> str:
    """The last ``error:`` message of a failed run's log, or its last line if there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            lines = [line.strip() for line in file.read().decode("utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    lines = [line for line in lines if line]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


def _script() -> list[str]:
    """What a launcher starts: the checkout's train.py, or else the installed command."""
    package = Path(pcpo_fast.__file__).parent
    if (package.parent / "train.py").is_file():
        return [str(package.parent / "train.py")]
    installed = Path(sys.executable).with_name("pcpo-fast")
    if installed.is_file():
        return [str(installed), "train"]
    raise UserError("--launcher: found neither train.py next to pcpo_fast/ nor the pcpo-fast command to start with it")


def _before_start(parent: int) -> Callable[[], None]:
    """What a new process does first: restore SIGINT, and ask the kernel to end it if this command is killed.

    A process that a shell started in the background ignores SIGINT, and its children would inherit that.
    """
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):  # not Linux
        prctl = None

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if prctl is not None:
            prctl(_DEATH_SIGNAL, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

    return prepare
