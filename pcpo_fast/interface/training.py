"""Training, as one call."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcpo_fast.interface.configuration import Reward, Settings, Source, load_config

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console


@dataclass(frozen=True)
class TrainedRun:
    """A finished run. It stands for its folder wherever one is asked for (``sample(..., runs=run)``).

    Attributes:
        folder: the run directory.
        summary: what summary.json holds (docs/metrics.md).
    """

    folder: Path
    summary: dict[str, Any]

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, in their order; ``record["kind"]`` is "epoch", "update" or "evaluation"."""
        from pcpo_fast.reporting.metrics_file import read_metrics

        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def before_after(self) -> "Image | None":
        """Held-out prompts before and after the training; None where the run has no held-out prompts."""
        from PIL import Image

        file = self.folder / "images" / "before_after.png"
        return Image.open(file) if file.is_file() else None

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.folder / "report.html"

    @property
    def weights(self) -> Path:
        """Folder of the exported weights."""
        return self.folder / "export"


def train(
    config: Source | None = None,
    settings: Settings = (),
    *,
    rewards: Reward | Sequence[Reward] | None = None,
    resume: str | os.PathLike[str] = "auto",
    verify: bool = False,
    profile: bool = False,
    profile_epoch: int | None = None,
    profile_updates: int | None = None,
    console: "Console | None" = None,
) -> TrainedRun:
    """Train a policy in this process, and return its run.

    Args:
        config, settings, rewards: of the run; see :func:`pcpo_fast.interface.configuration.load_config`.
        resume: "auto", "accept-changes", "never", or a checkpoint or run to start from (docs/resuming.md).
        verify: read the files of model and rewards anew, whatever is remembered of their content.
        profile: record where the time of an epoch goes (docs/profiling.md).
        profile_epoch: the epoch to record, the second that is trained if None.
        profile_updates: optimiser steps of it to record, 1 if None.
        console: where the progress is shown; None: stdout. ``rich.console.Console(quiet=True)`` shows nothing.

    Raises:
        UserError: something the user can mend, in one sentence.
        pcpo_fast.distributed.preemption.Stopped: a signal ended the run in order (a KeyboardInterrupt or SystemExit
            where it is called as ``pcpo_fast.train``).
    """
    from rich.console import Console

    from pcpo_fast.distributed.collectives import launcher_rank
    from pcpo_fast.profiling.recording import ProfileRequest
    from pcpo_fast.training.trainer import train as train_run

    run = load_config(config, settings, rewards=rewards)
    console = Console() if console is None else console
    if launcher_rank() == 0:
        text = f"{run.algorithm} on {run.model.path}, run directory {run.output_dir}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    wanted = profile or profile_epoch is not None or profile_updates is not None
    request = ProfileRequest(profile_epoch, profile_updates) if wanted else None
    return TrainedRun(Path(run.output_dir), train_run(run, os.fspath(resume), console, request, verify))
