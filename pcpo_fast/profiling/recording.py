"""Record one epoch of a run with PyTorch's profiler, with only a few ranges of each kind to keep the trace small."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, record_function

from pcpo_fast.config.arguments import check_least
from pcpo_fast.config.schema import Config
from pcpo_fast.distributed.collectives import rank, shared_errors
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.profiling import profiler_ranges
from pcpo_fast.profiling.profile_table import show_summary
from pcpo_fast.profiling.trace_summary import summarize

TRACE_FILE = "trace.json.gz"
SUMMARY_FILE = "summary.json"
LIMITS: dict[str, int] = {"batch": 1, "sampler step": 8, "update": 1, "micro-step": 4}
"""Maximum number of recorded ranges of a kind within their parent range; other kinds are all recorded.

The profiler pauses during the rest. A sampler step of a model as large as FLUX has tens of thousands of events, a
micro-step hundreds of thousands; these limits keep its trace at about two million.
"""
PHASES = ("rollout", "reward", "update", "evaluation", "checkpoint")


@dataclass(frozen=True)
class ProfileRequest:
    """What to record.

    Attributes:
        epoch: the epoch, counted from 1 as in the progress display; None: the second epoch that this process trains
            (the first is warm-up), or its only one.
        updates: optimizer steps to record; None: see :data:`LIMITS`.
    """

    epoch: int | None = None
    updates: int | None = None


@dataclass
class _Open:
    """An open range: the names of its parents and its own, its profiler record, and counts of its children by name."""

    path: tuple[str, ...]
    record: Any
    inside: Counter[str] = field(default_factory=Counter)


class Recorder:
    """Listens to the ranges of a run and runs the profiler during the selected ones of one epoch.

    Args:
        request: which epoch and how many updates.
        config: the run.
        start: number of epochs trained before.

    Attributes:
        happened: how often each range occurred, recorded or not, by its path of names.
        problem: why the trace could not be written; None otherwise.

    Raises:
        UserError: the run does not train that epoch, or its folder ``profile`` is not writable.
    """

    def __init__(self, request: ProfileRequest, config: Config, start: int) -> None:
        last = config.train.epochs
        wanted = min(start + 2, last) if request.epoch is None else request.epoch
        if not start < wanted <= last:
            raise UserError(
                f"--profile-epoch: the run does not train epoch {wanted}; allowed: {start + 1} to {last} (train.epochs)"
            )
        check_least(1, profile_updates=request.updates)
        self.limits = LIMITS | ({} if request.updates is None else {"update": request.updates})
        self.epoch, self._epochs = wanted, start
        self.folder = Path(config.output_dir) / "profile"
        self.problem: str | None = None
        self.happened: Counter[tuple[str, ...]] = Counter()
        self._open: list[_Open] = []
        self._profiler: torch.profiler.profile | None = None
        self._paused = False
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._activities = [ProfilerActivity.CPU, *cuda]
        probe = self.folder / f".{os.getpid()}.probe"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"--profile: {self.folder} cannot be written: {error.strerror}") from None

    def begin(self, name: profiler_ranges.Name) -> None:
        """Begin a range."""
        if name == "epoch":
            self._epochs += 1
            if self._epochs == self.epoch:
                self._profiler = torch.profiler.profile(activities=self._activities, acc_events=True)
                with _without_kinetos_notes():
                    self._profiler.prepare_trace()
                    self._profiler.start_trace()
        if self._profiler is None:
            return
        path = (*(self._open[-1].path if self._open else ()), name)
        self.happened[path] += 1
        wanted = self._is_wanted(name)
        self._pause(not wanted)
        record = record_function(name) if wanted else None
        if record is not None:
            record.__enter__()
        self._open.append(_Open(path, record))

    def end(self, name: profiler_ranges.Name) -> None:
        """End a range, and those inside it that an exception left open (a loop's range ends with its generator)."""
        while any(entry.path[-1] == name for entry in self._open):
            entry = self._open.pop()
            if entry.record is not None:
                self._pause(False)
                if entry.path[-1] in PHASES:
                    _wait_for_device()  # so that the phase includes its work on the device
                entry.record.__exit__(None, None, None)
            if entry.path[-1] == name:
                break
        if name == "epoch":
            self.stop()

    def stop(self) -> None:
        """End the recording, if there is one, and write the trace; a failure is kept in :attr:`problem`."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        with _without_kinetos_notes():
            profiler.stop_trace()
        unfinished = self.folder / f".{os.getpid()}.{TRACE_FILE}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(unfinished))
            os.replace(unfinished, self.folder / TRACE_FILE)
        except (OSError, RuntimeError) as error:  # kineto reports a full disk as a RuntimeError
            self.problem = reason_of(error)
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _is_wanted(self, name: profiler_ranges.Name) -> bool:
        """Whether to record a range that begins: its parent is recorded and the limit is not reached."""
        around = self._open[-1:]
        if name == "optimizer":  # its parent, the last micro-step, may be beyond the limit: the update decides
            around = self._open[-2:-1]
        if not around:
            return name == "epoch"
        around[0].inside[name] += 1
        return around[0].record is not None and around[0].inside[name] <= self.limits.get(name, 1 << 30)

    def _pause(self, pause: bool) -> None:
        if self._profiler is None or self._paused == pause:
            return
        _wait_for_device()
        with _without_kinetos_notes():
            self._profiler.toggle_collection_dynamic(not pause, self._activities)
        self._paused = pause


@contextmanager
def recorded(request: ProfileRequest | None, config: Config, start: int, console: Console) -> Iterator[None]:
    """Record the run within the block, on the first rank; afterwards write and print the summary.

    Args:
        request: None: record nothing, at no cost.
        config: the run.
        start: number of epochs trained before.
        console: console of the first rank.

    Raises:
        UserError: as :class:`Recorder`, on all ranks; all must enter the block.
    """
    recorder = None
    if request is not None:
        with shared_errors():
            recorder = Recorder(request, config, start) if rank() == 0 else None
    if recorder is None:
        yield
        return
    try:
        with profiler_ranges.listening(recorder):
            yield
    finally:
        recorder.stop()
        _report(recorder, console)


def _report(recorder: Recorder, console: Console) -> None:
    trace = recorder.folder / TRACE_FILE
    if recorder.problem is not None or not recorder.happened:
        why = recorder.problem or f"epoch {recorder.epoch} was not reached"
        text = f"warning: there is no profile in {recorder.folder}: {why}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    summary = {"epoch": recorder.epoch, "device": device} | summarize(trace, recorder.happened)
    write_atomically(recorder.folder / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
    show_summary(summary, trace, console)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _without_kinetos_notes() -> Iterator[None]:
    """Silence stderr: Kineto prints when it starts, pauses and stops, and has no setting to turn that off."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
