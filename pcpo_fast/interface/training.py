"""``train``: a training run."""

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
    """A finished run. It can be passed wherever a run directory is expected (``sample(..., runs=run)``).

    Attributes:
        folder: the run directory.
        summary: the content of summary.json (docs/metrics.md).
    """

    folder: Path
    summary: dict[str, Any]

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl in order; ``record["kind"]`` is "epoch", "update" or "evaluation"."""
        from pcpo_fast.reporting.metrics_file import read_metrics

        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def before_after(self) -> "Image | None":
        """Images of held-out prompts before and after training; None if the run has no held-out prompts."""
        from PIL import Image

        file = self.folder / "images" / "before_after.png"
        return Image.open(file) if file.is_file() else None

    @property
    def report(self) -> Path:
        """Path of the run's report.html."""
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
    """Train a policy in this process, and return the run.

    Args:
        config, settings, rewards: see :func:`pcpo_fast.interface.configuration.load_config`.
        resume: "auto", "accept-changes", "never", or a checkpoint or run to start from (docs/resuming.md).
        verify: read the files of model and rewards again, ignoring remembered hashes.
        profile: record where the time of an epoch goes (docs/profiling.md).
        profile_epoch: the epoch to record; None: the second that is trained.
        profile_updates: optimizer steps of the epoch to record; None: 1.
        console: where progress is shown; None: stdout. ``rich.console.Console(quiet=True)`` shows nothing.

    Raises:
        UserError: an error that the user can fix.
        pcpo_fast.distributed.preemption.Stopped: a signal stopped the run cleanly (``pcpo_fast.train`` raises
            KeyboardInterrupt or SystemExit instead).
    """
    from rich.console import Console

    run = load_config(config, settings, rewards=rewards)

    from pcpo_fast.distributed.launching import launcher_rank, launcher_world_size
    from pcpo_fast.rollout.epoch_plan import check_sizes

    check_sizes(run, launcher_world_size())  # before the libraries are loaded, which takes long

    from pcpo_fast.profiling.recording import ProfileRequest
    from pcpo_fast.reporting.progress import say
    from pcpo_fast.training.trainer import train as train_run

    console = Console() if console is None else console
    if launcher_rank() == 0:
        text = f"{run.algorithm} on {run.model.path}, run directory {run.output_dir}"
        say(console, text)
    wanted = profile or profile_epoch is not None or profile_updates is not None
    request = ProfileRequest(profile_epoch, profile_updates) if wanted else None
    return TrainedRun(Path(run.output_dir), train_run(run, os.fspath(resume), console, request, verify))
