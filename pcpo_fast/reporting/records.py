"""Recording a training run: metrics and images, on disk and in the loggers."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.reporting.grids import ImageLike, image_bytes, to_image
from pcpo_fast.reporting.loggers import Loggers, MetricLogger, TensorBoardLogger, TrackioLogger, WandbLogger
from pcpo_fast.reporting.metrics_file import MetricsFile, read_metrics

_RESERVED = ("kind", "epoch", "update", "time")
_IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunRecorder:
    """Writes metrics.jsonl and images/ in `output_dir`, and sends the same to TensorBoard and other trackers.

    `tensorboard` turns on event files in ``output_dir/tensorboard``; `wandb` and `trackio` are None or the options of a
    run there (see `pcpo_fast.reporting.loggers`). All of them show `about` as the run's configuration. With `enabled`
    False (all ranks but 0) all methods do nothing and no file is touched. An existing metrics.jsonl is continued,
    including its ``time``.

    Raises `UserError` if `output_dir` is not writable or a requested logger is not installed. A logger that fails later
    is dropped with one warning; training continues.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        tensorboard: bool,
        wandb: Mapping[str, Any] | None,
        trackio: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.enabled = enabled
        self._start = time.monotonic()
        self._earlier = 0.0
        self._updates = 0
        self._loggers = Loggers()
        if not enabled:
            return
        self._file = MetricsFile(self.output_dir / "metrics.jsonl")
        self._count(read_metrics(self._file.path))
        if tensorboard:
            folder = self.output_dir / "tensorboard"
            self._loggers.add("TensorBoard", lambda: TensorBoardLogger(folder, about or {}))
        if wandb is not None:
            wandb_options = dict(wandb)
            self._loggers.add("Weights & Biases", lambda: WandbLogger(self.output_dir, wandb_options, about or {}))
        if trackio is not None:
            trackio_options = dict(trackio)
            self._loggers.add("Trackio", lambda: TrackioLogger(self.output_dir, trackio_options, about or {}))

    def _count(self, records: list[dict[str, Any]]) -> None:
        """Continue the number of updates and the seconds from earlier records of the run."""
        self._updates = sum(record.get("kind") == "update" for record in records)
        self._earlier = max((float(record.get("time", 0.0)) for record in records), default=0.0)

    def seconds(self) -> float:
        """Seconds since the start of the run; a resumed run continues from its last recorded line."""
        return self._earlier + time.monotonic() - self._start

    def log(self, kind: str, metrics: Mapping[str, float], *, epoch: int, update: int | None = None) -> None:
        """Append one line: ``{"kind", "epoch", "update", "time", …metrics}`` (without "update" if it is None).

        `kind` is "update", "epoch" or "evaluation". Values are numbers or one-element tensors or arrays; NaN and
        infinities are written as null. Raises ValueError for a metric with the name of a fixed field.
        """
        if not self.enabled:
            return
        record: dict[str, Any] = {"kind": kind, "epoch": int(epoch)}
        if update is not None:
            record["update"] = int(update)
        record["time"] = round(self.seconds(), 3)
        values = {name: _number(name, value) for name, value in metrics.items()}
        self._file.append(record | values)
        step = self._updates if kind == "update" else epoch
        self._updates += kind == "update"
        self._loggers.each(lambda logger: logger.log(kind, values, epoch=epoch, step=step))

    def image(self, name: str, image: ImageLike, epoch: int) -> Path | None:
        """Write ``images/<name>.png`` and send the image to the loggers; returns the path (None if disabled).

        `image` is a PIL image or [3, H, W] in 0..1. Numbered names (``epoch_0010``) share one tag in the loggers, which
        show them over time. Raises ValueError unless `name` is a plain file name.
        """
        if not self.enabled:
            return None
        stem = name.removesuffix(".png")
        if not _IMAGE_NAME.fullmatch(stem):
            raise ValueError(f"image name {name!r} is not a plain file name of letters, digits, '.', '_' and '-'")
        picture = to_image(image)
        path = self.output_dir / "images" / f"{stem}.png"
        write_atomically(path, image_bytes(picture))
        tag = "images/" + re.sub(r"_?\d+$", "", stem)
        self._loggers.each(lambda logger: logger.image(tag, picture, epoch=epoch))
        return path

    def truncate_after(self, epoch: int, *, keep_evaluation: bool = False) -> None:
        """Before a run is resumed at `epoch`, drop the records of all epochs that will be run again.

        Lines of this or a later epoch and a partial last line are removed; the others are kept byte for byte. The
        evaluation *at* `epoch` used the same weights that the run resumes with; it is removed unless `keep_evaluation`
        says that it will not be repeated. The file is replaced atomically.
        """
        if not self.enabled:
            return

        def kept(record: dict[str, Any]) -> bool:
            evaluated = keep_evaluation and record.get("kind") == "evaluation" and record.get("epoch") == epoch
            return evaluated or record.get("epoch", -1) < epoch

        self._file.keep(kept)
        records = read_metrics(self._file.path)
        self._count(records)

        def rewind(logger: MetricLogger) -> None:
            logger.rewind(epoch=epoch, update_step=self._updates)
            for record in records:
                if record.get("epoch", -1) >= epoch:  # the kept evaluation, which the logger has just dropped
                    values = {name: value for name, value in record.items() if name not in _RESERVED}
                    logger.log(record["kind"], values, epoch=epoch, step=epoch)

        self._loggers.each(rewind)

    def close(self) -> None:
        """Close the file and the loggers; may be called twice."""
        if not self.enabled:
            return
        self._file.close()
        self._loggers.close()

    def __enter__(self) -> "RunRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _number(name: str, value: Any) -> float | int:
    if name in _RESERVED:
        raise ValueError(f"a metric cannot be named {name!r}: every record has a field of that name")
    if isinstance(value, int):
        return int(value)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name!r} is not a number: {value!r}") from error
