"""TensorBoard, Weights & Biases and Trackio: they mirror metrics.jsonl, and their failures never stop training."""

import importlib
import io
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pcpo_fast.config.messages import did_you_mean
from pcpo_fast.errors import UserError
from pcpo_fast.files.atomic import write_atomically

_LOG = logging.getLogger(__name__)

WANDB_OPTIONS = ("project", "entity", "name", "group", "job_type", "tags", "notes", "mode", "id")
WANDB_MODES = ("online", "offline", "disabled")
TRACKIO_OPTIONS = ("project", "name", "group", "space_id")


class MetricLogger(Protocol):
    """Receives metrics and images during a run.

    `step` is the number of the update since the start of the run for updates, and the epoch for everything else.
    """

    def log(self, kind: str, metrics: Mapping[str, float], *, epoch: int, step: int) -> None: ...
    def image(self, tag: str, image: Image.Image, *, epoch: int) -> None: ...
    def rewind(self, *, epoch: int, update_step: int) -> None: ...
    def close(self) -> None: ...


def tags(kind: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The names of metrics in a logger: updates have a different x axis, so their metrics get a prefix."""
    return {f"update/{name}" if kind == "update" else name: value for name, value in metrics.items()}


class Loggers:
    """The loggers of a run. One that fails is dropped with a warning; training continues.

    Only a `UserError` raised when a logger is created (not installed, wrong options) propagates.
    """

    def __init__(self) -> None:
        self._open: dict[str, MetricLogger] = {}

    def add(self, name: str, make: Callable[[], MetricLogger]) -> None:
        """Create a logger with `make` and register it under `name`."""
        with self._guarded(name):
            self._open[name] = make()

    def each(self, action: Callable[[MetricLogger], None]) -> None:
        """Call `action` with every logger."""
        for name, logger in list(self._open.items()):
            with self._guarded(name):
                action(logger)

    def close(self) -> None:
        """Close all loggers; may be called twice."""
        self.each(lambda logger: logger.close())
        self._open.clear()

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self._open.pop(name, None)
            _LOG.warning(
                "%s failed (%s: %s); training continues without it, metrics.jsonl remains complete",
                name,
                type(error).__name__,
                error,
            )


class TensorBoardLogger:
    """Event files under `folder`: ``epochs`` (axis: epoch) and ``updates`` (axis: number of the update).

    `about` is shown as a table among the texts, one for each start of the run.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "TensorBoard logging is on but the package tensorboard is not installed: "
                "run `pip install tensorboard`, or turn it off in the config"
            ) from error
        self._make = SummaryWriter
        self._folder = folder
        rows = [f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in about.items()]
        self._about = "\n".join(["| setting | value |", "|---|---|", *rows]) if rows else None
        self._writers: dict[str, SummaryWriter] = {}
        self._purge: dict[str, int] = {}

    def _writer(self, part: str) -> Any:
        if part not in self._writers:
            start = self._purge.pop(part, None)
            self._writers[part] = self._make(str(self._folder / part), purge_step=start, flush_secs=10)
            if part == "epochs" and self._about is not None:
                self._writers[part].add_text("run", self._about, start or 0)
        return self._writers[part]

    def log(self, kind: str, metrics: Mapping[str, float], *, epoch: int, step: int) -> None:
        writer = self._writer("updates" if kind == "update" else "epochs")
        for tag, value in tags(kind, metrics).items():
            writer.add_scalar(tag, value, step)

    def image(self, tag: str, image: Image.Image, *, epoch: int) -> None:
        self._writer("epochs").add_image(tag, np.asarray(image.convert("RGB")), epoch, dataformats="HWC")

    def rewind(self, *, epoch: int, update_step: int) -> None:
        """Hide everything recorded at these steps or later (TensorBoard's ``purge_step``, made for restarts)."""
        self.close()
        self._purge = {"epochs": epoch, "updates": update_step}

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


class WandbLogger:
    """A Weights & Biases run, in ``output_dir/wandb``, continued when the training run is resumed.

    `options` are those arguments of `wandb.init` that are listed in `WANDB_OPTIONS`; `about` is the run's config there.
    Besides these only metrics and images are sent: no environment, console output, code, git remote, package list or
    machine description. Authentication is left to W&B (`wandb login`); a key in `options` is an error. Without a
    network or a login the run is written to disk after at most 30 seconds, and `wandb sync` uploads it later.
    """

    def __init__(self, output_dir: Path, options: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        check_wandb_options(options)
        self._wandb = wandb = _imported("wandb", "Weights & Biases")
        arguments = {
            "project": "pcpo-fast",
            "id": _run_id(output_dir, "wandb"),
            "resume": "allow",
            **{key: value for key, value in options.items() if value is not None},
            "config": dict(about),
            "dir": str(output_dir),
            "settings": _wandb_settings(wandb),
        }
        try:
            self._run = wandb.init(**arguments)
        except Exception as error:
            _LOG.warning(
                "Weights & Biases cannot be reached (%s: %s); this run is recorded under %s for `wandb sync`",
                type(error).__name__,
                error,
                output_dir / "wandb",
            )
            # A new id, because the failed attempt may still hold the old one.
            again = {"mode": "offline", "resume": None, "id": _new_id(), "settings": _wandb_settings(wandb)}
            self._run = wandb.init(**{**arguments, **again})
        self._axes: dict[str, str] = {}

    def log(self, kind: str, metrics: Mapping[str, float], *, epoch: int, step: int) -> None:
        axis = "update_step" if kind == "update" else "epoch"
        values = tags(kind, metrics)
        for tag in values:
            self._on_axis(tag, axis)
        self._run.log({**values, "epoch": epoch, axis: step})

    def image(self, tag: str, image: Image.Image, *, epoch: int) -> None:
        self._on_axis(tag, "epoch")
        self._run.log({tag: self._wandb.Image(image), "epoch": epoch})

    def _on_axis(self, tag: str, axis: str) -> None:
        if self._axes.get(tag) != axis:
            self._run.define_metric(tag, step_metric=axis)
            self._axes[tag] = axis

    def rewind(self, *, epoch: int, update_step: int) -> None:
        """Does nothing, because W&B cannot delete points; repeated epochs and updates are drawn over the old ones."""

    def close(self) -> None:
        self._run.finish()


class TrackioLogger:
    """A Trackio run in the user's local store (`trackio show`), or on a Hugging Face Space if `space_id` names one.

    `options` are those arguments of `trackio.init` that are listed in `TRACKIO_OPTIONS`, and `about` is shown as the
    run's config. A resumed run is continued. Unless `options` names it, it is called after the run directory, with four
    letters that tell it from others of this name.
    """

    def __init__(self, output_dir: Path, options: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        check_trackio_options(options)
        self._trackio = trackio = _imported("trackio", "Trackio")
        arguments = {
            "project": "pcpo-fast",
            "name": f"{output_dir.resolve().name}-{_run_id(output_dir, 'trackio')[:4]}",
            "config": dict(about),
            "resume": "allow",
            "embed": False,
        }
        with redirect_stdout(io.StringIO()):  # it explains itself on stdout, which may belong to --json
            self._run = trackio.init(**arguments | {key: value for key, value in options.items() if value is not None})

    def log(self, kind: str, metrics: Mapping[str, float], *, epoch: int, step: int) -> None:
        self._run.log({**tags(kind, metrics), "epoch": epoch}, step=step)

    def image(self, tag: str, image: Image.Image, *, epoch: int) -> None:
        self._run.log({tag: self._trackio.Image(image), "epoch": epoch}, step=epoch)

    def rewind(self, *, epoch: int, update_step: int) -> None:
        """Does nothing, because Trackio cannot delete points; repeated epochs and updates are recorded again."""

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


def check_trackio_options(options: Mapping[str, Any]) -> None:
    """Raise `UserError` for an option that `TrackioLogger` does not accept."""
    _check_names("trackio", options, TRACKIO_OPTIONS)


def check_wandb_options(options: Mapping[str, Any]) -> None:
    """Raise `UserError` for an option that `WandbLogger` does not accept, such as an API key."""
    _check_names("wandb", options, WANDB_OPTIONS)
    mode = options.get("mode")
    if mode is not None and mode not in WANDB_MODES:
        raise UserError(f"wandb: mode is {mode!r} (allowed: {', '.join(WANDB_MODES)})")


def missing_package(error: ImportError, package: str) -> str:
    """The package that an import of ``package`` lacked: itself, or one that it needs."""
    return (error.name or package).partition(".")[0]


def _imported(package: str, title: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = missing_package(error, package)
        raise UserError(
            f"{title} logging is on but the package {missing} is not installed: "
            f"run `pip install {missing}`, or set logging.{package}=null"
        ) from error


def _check_names(tracker: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for name in options:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise UserError(f"{tracker}: unknown option {name!r}{hint} (allowed: {', '.join(allowed)})")


def _run_id(output_dir: Path, tracker: str) -> str:
    """One id per run directory, so that a resumed run continues the same run of a tracker."""
    path = output_dir / tracker / "run_id.txt"
    if not path.exists():
        write_atomically(path, _new_id() + "\n")
    return path.read_text(encoding="utf-8").strip()


def _new_id() -> str:
    return uuid.uuid4().hex[:12]


def _wandb_settings(wandb: Any) -> Any:
    """Settings for privacy and short timeouts, without those that the installed version lacks."""
    wanted = {
        "console": "off",
        "save_code": False,
        "disable_git": True,
        "disable_job_creation": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "silent": True,
        "init_timeout": 30.0,
        "login_timeout": 30.0,
        "finish_timeout": 60.0,
    }
    known = getattr(wandb.Settings, "model_fields", {})
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in known})
