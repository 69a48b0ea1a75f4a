"""Runs all runs of a comparison, several at a time; finished runs are kept, interrupted ones resume."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from pcpo_fast.comparison.lock import note_processes
from pcpo_fast.comparison.processes import RunningRun, end_runs, last_words, start_run
from pcpo_fast.comparison.run_progress import ComparisonProgress, RunProgress
from pcpo_fast.comparison.variants import PlannedRun
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError

POLL = 0.2
"""Seconds between checks of the processes."""

_RUN_FILES = ("config.yaml", "metrics.jsonl", "summary.json")


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error.

    Attributes:
        run: the run that failed.
        code: exit code of its process; 2 is a user error.
        sentence: the last message in its log.
    """

    run: PlannedRun
    code: int
    sentence: str


class Interrupted(Exception):
    """The runs were stopped from outside; the next call resumes them.

    Attributes:
        folder: the comparison's folder.
    """

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@dataclass(frozen=True)
class HowToRun:
    """How runs are started.

    Attributes:
        jobs: number of runs at a time.
        threads: CPU threads per run; None divides the machine's cores among the jobs, unless OMP_NUM_THREADS is set.
        launcher: command that starts a run on several GPUs; None starts a plain process.
        until: no run starts after this time (of ``time.monotonic``); infinity means no limit.
    """

    jobs: int = 1
    threads: int | None = None
    launcher: str | None = None
    until: float = math.inf


def check_folders(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs that have not finished; changes nothing on disk.

    Raises:
        UserError: a folder holds a run with a different configuration.
    """
    left = []
    for run in runs:
        # Only a folder that holds something needs the trainer's own check, which takes seconds to load.
        if any((run.folder / name).exists() for name in _RUN_FILES):
            from pcpo_fast.runs.run_directory import claim

            try:
                if claim(run.config, "auto").finished:
                    continue
            except UserError as error:
                raise UserError(f"{run.name}: {error}") from None
        left.append(run)
    return left


def run_all(
    runs: Sequence[PlannedRun],
    done: int,
    folder: Path,
    how: HowToRun,
    console: Console,
    lock: int | None = None,
    poll: float = POLL,
) -> list[Failure]:
    """Run the remaining runs of a comparison and return those that failed.

    Args:
        runs: the remaining runs, in the order in which they start.
        done: number of runs that have already finished.
        folder: the comparison's folder.
        how: number of runs at a time, and how they are started.
        console: where progress is shown.
        lock: descriptor of the folder's lock, which the runs inherit; None: there is none.
        poll: seconds between checks of the processes.

    Raises:
        UserError: the launcher cannot be started.
        Interrupted: on Ctrl-C or SIGTERM, after all child processes have ended.
    """
    queue, running, failures = list(runs), list[RunningRun](), list[Failure]()
    with _ending_is_an_interrupt():
        progress = ComparisonProgress(console, done + len(runs), sum(map(_epochs_left, runs)))
        progress.done = done
        try:
            with progress:
                while queue or running:
                    if queue and time.monotonic() >= how.until:
                        progress.message(f"time is up: {counted(len(queue), 'run')} left for the next call")
                        queue.clear()
                    while queue and len(running) < how.jobs:
                        slot = min(set(range(how.jobs)) - {job.slot for job in running})
                        environment = environment_of(how, slot, os.environ)
                        running.append(
                            start_run(
                                queue.pop(0), slot, launcher=how.launcher, environment=environment, keep_open=lock
                            )
                        )
                        progress.began(running[-1])
                    for job in [job for job in running if job.process.poll() is not None]:
                        running.remove(job)
                        failure = _failure(job)
                        progress.ended(job, None if failure is None else failure.sentence)
                        failures += [] if failure is None else [failure]
                    if lock is not None:
                        note_processes(lock, [job.process.pid for job in running])
                    progress.tick(running)
                    if running:
                        time.sleep(poll)
        except KeyboardInterrupt:
            finished = progress.done
            raise Interrupted(f"interrupted with {finished} of {counted(progress.total, 'run')} done", folder) from None
        finally:
            end_runs(running)
    return failures


def environment_of(how: HowToRun, slot: int, outside: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of a run: its thread count, and one GPU if several runs share a machine with several.

    A launcher chooses the GPUs itself. Without one, a run is a single process even if this command is itself one rank
    of a distributed job.
    """
    environment = dict(outside) | {"PYTHONUNBUFFERED": "1"}
    if how.launcher is None:
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
            environment.pop(name, None)
    if how.threads is not None:
        environment["OMP_NUM_THREADS"] = str(how.threads)
    elif "OMP_NUM_THREADS" not in outside and how.launcher is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment["OMP_NUM_THREADS"] = str(max(1, cores // how.jobs))
    if how.launcher is None and how.jobs > 1:
        gpus = _gpus(outside)
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def _failure(job: RunningRun) -> Failure | None:
    """A run has succeeded if its process exited with 0 and its summary exists."""
    code = job.process.returncode
    if code == 0 and (job.run.folder / "summary.json").is_file():
        return None
    if code < 0:
        return Failure(job.run, code, f"ended by signal {-code} ({signal.Signals(-code).name})")
    return Failure(job.run, code, last_words(job.run.log) or f"exit code {code}")


def _epochs_left(run: PlannedRun) -> int:
    progress = RunProgress(run.folder)
    progress.update()
    return max(0, run.config.train.epochs - progress.epochs)


def _gpus(outside: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = outside.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@contextmanager
def _ending_is_an_interrupt() -> Iterator[None]:
    """Treat SIGTERM (sent by job schedulers) like Ctrl-C, so that no child process is orphaned."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
