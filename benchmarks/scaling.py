"""Weak and strong scaling over ranks: images per second, time in communication, efficiency against the fewest ranks.

    python benchmarks/scaling.py --ranks 1 2                                    # CPU ranks, the tiny pipeline
    python benchmarks/scaling.py --ranks 1 2 4 8 --config my_run.yaml           # the GPUs of one machine
    deepspeed --hostfile HOSTS benchmarks/scaling.py --worker FILE --config my_run.yaml    # one point, several machines

Weak: every rank samples and trains the configuration's images, so N ranks have N times as many. Strong: the ranks share
them. Each point is a separate run of the ordinary loop; its first epoch warms up and is not measured, and communication
is timed in a separate epoch, because on GPUs that requires synchronizing around every collective.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from json_files import read_json

PROJECT = Path(__file__).resolve().parent.parent
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "barrier",
)
TINY = (
    "model.max_sequence_length=8",
    "prompts.heldout=null",
    "sampler.steps=4",
    "sampler.noise=0.7",
    "rollout.prompts_per_epoch=4",
    "rollout.images_per_prompt=8",
    "train.updates_per_epoch=2",
    "train.micro_batch_size=8",
    "rewards=[{name: jpeg_compressibility}]",
    "logging.tensorboard=false",
)
"""Settings added to the demo's configuration if no other is given."""


class Communication:
    """Seconds spent in torch.distributed's collectives while it is on.

    A collective that returns a handle counts until the handle has been waited for. On GPUs the device is waited for
    before and after, so that what is timed is the collective and not what was queued before it.
    """

    def __init__(self) -> None:
        self.seconds, self.calls, self.depth = 0.0, 0, 0

    @contextmanager
    def on(self) -> Iterator[None]:
        """Time the collectives within the block."""
        import torch.distributed as dist
        from deepspeed.comm import comm

        kept = {name: getattr(comm.cdb, name) for name in ("all_gather_function", "reduce_scatter_function")}
        with (
            mock.patch.multiple(dist, **{name: self._timed(getattr(dist, name)) for name in COLLECTIVES}),
            # DeepSpeed has taken these two out of torch.distributed when it started.
            mock.patch.multiple(comm.cdb, **{name: self._timed(function) for name, function in kept.items()}),
        ):
            yield

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if self.depth:  # all_gather_object gathers tensors
                return function(*arguments, **options)
            self.depth += 1
            begin = _now()
            try:
                handle = function(*arguments, **options)
                if handle is not None and hasattr(handle, "wait"):
                    handle.wait()
            finally:
                self.depth -= 1
                self.seconds += _now() - begin
                self.calls += 1
            return handle

        return timed


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def work(arguments: argparse.Namespace) -> None:
    """Measure one point in each process of a launch; rank 0 writes the file."""
    import torch
    from rich.console import Console

    import pcpo_fast.training.trainer
    from pcpo_fast.config.loading import load_config
    from pcpo_fast.distributed.collectives import barrier, gather_objects, rank, world_size

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    settings = [*([] if arguments.config else TINY), *arguments.settings]
    with tempfile.TemporaryDirectory() as temporary:
        settings += [f"output_dir={arguments.folder or temporary}/run", f"train.epochs={arguments.epochs + 2}"]
        config = load_config(arguments.config or PROJECT / "configs" / "tiny_flux.yaml", settings)
        trained, seconds, communication = pcpo_fast.training.trainer.Trainer._epoch, [], Communication()
        found: dict[str, Any] = {}

        def timed(trainer: Any, epoch: int) -> dict[str, float]:
            barrier()
            begin = _now()
            if epoch == arguments.epochs + 1:
                with communication.on():
                    metrics = trained(trainer, epoch)
                barrier()
                found["share"] = communication.seconds / (_now() - begin)
            else:
                metrics = trained(trainer, epoch)
                barrier()
                seconds.append(_now() - begin)
            return metrics

        def finish(*_: Any, **__: Any) -> dict[str, Any]:
            found["ranks"], found["shares"] = world_size(), gather_objects(found["share"])
            found["rank"] = rank()
            return {}

        with (
            mock.patch.object(pcpo_fast.training.trainer.Trainer, "_epoch", timed),
            mock.patch.object(pcpo_fast.training.trainer, "finish_run", finish),
            mock.patch.object(pcpo_fast.training.trainer, "save_checkpoint", lambda *_, **__: None),
        ):
            pcpo_fast.training.trainer.train(config, "never", Console(quiet=True))
        if found["rank"] == 0:
            per_epoch = median(seconds[1:])
            point = {
                "ranks": found["ranks"],
                "images_per_epoch": config.images_per_epoch,
                "seconds_per_epoch": per_epoch,
                "images_per_second": config.images_per_epoch / per_epoch,
                "communication": sum(found["shares"]) / len(found["shares"]),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            }
            arguments.worker.write_text(json.dumps(point))


def launch(ranks: int, prompts: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure a point on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = folder / "point.json"
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port", str(port)]
    command += [str(Path(__file__).resolve()), "--worker", str(target), "--epochs", str(arguments.epochs)]
    command += ["--folder", str(folder), *(["--config", str(arguments.config)] if arguments.config else [])]
    command += ["--settings", *arguments.settings, f"rollout.prompts_per_epoch={prompts}"]
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{ranks} ranks ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return dict(json.loads(target.read_text()))


def with_efficiency(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of a kind with their efficiency: images per second and rank, over those of the fewest ranks."""
    first = min(points, key=lambda point: point["ranks"])
    base = first["images_per_second"] / first["ranks"]
    return [point | {"efficiency": point["images_per_second"] / point["ranks"] / base} for point in points]


def plot(result: dict[str, Any], file: Path) -> None:
    """Images per second over ranks, with the line that perfect scaling would follow."""
    from pcpo_fast.reporting.plots import save_figure
    from pcpo_fast.reporting.style import OTHERS, legend, new_figure, styled

    figure = new_figure(3.6, 6.4)
    title = f"Scaling on {result['machine']['device']}"
    axes = styled(figure.add_subplot(), title, "ranks", "images per second (sampled and trained)", with_legend=True)
    for kind, colour in zip(("weak", "strong"), OTHERS, strict=False):
        points = [point for point in result["points"] if point["kind"] == kind]
        ranks, rates = ([point[key] for point in points] for key in ("ranks", "images_per_second"))
        axes.plot(ranks, rates, color=colour, linewidth=1.8, marker="o", markersize=5, label=kind)
        ideal = [rates[0] / ranks[0] * rank for rank in ranks]
        axes.plot(ranks, ideal, color=colour, linewidth=1.2, linestyle=":", label=f"{kind}, ideal")
    axes.set_xticks(sorted({point["ranks"] for point in result["points"]}))
    axes.set_ylim(bottom=0)
    legend(axes)
    save_figure(figure, file)


def main() -> None:
    """Measure all points, write and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=5, help="epochs measured at each point")
    parser.add_argument("--config", type=Path, help="YAML configuration (default: the demo's, smaller)")
    parser.add_argument("--settings", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--json", type=Path, default=PROJECT / "benchmarks" / "results" / "scaling.json")
    parser.add_argument("--figure", type=Path, default=PROJECT / "docs" / "figures" / "scaling.png")
    parser.add_argument("--redraw", action="store_true", help="only the figure, from the numbers that are there")
    parser.add_argument("--worker", type=Path, metavar="FILE", help="measure one point in these processes, into FILE")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments)
        return
    sys.path[:0] = [str(PROJECT), str(PROJECT / "kernels")]
    if arguments.redraw:
        plot(read_json(arguments.json), arguments.figure)
        return
    from pcpo_fast.config.loading import load_config

    settings = [*([] if arguments.config else TINY), *arguments.settings]
    prompts = load_config(
        arguments.config or PROJECT / "configs" / "tiny_flux.yaml", settings
    ).rollout.prompts_per_epoch
    points: list[dict[str, Any]] = []
    for kind in ("weak", "strong"):
        measured = []
        for ranks in arguments.ranks:
            with tempfile.TemporaryDirectory() as folder:
                measured.append(launch(ranks, prompts * (ranks if kind == "weak" else 1), arguments, Path(folder)))
            print(json.dumps({"kind": kind} | measured[-1]), flush=True)
        points += [{"kind": kind} | point for point in with_efficiency(measured)]
    result = {
        "command": "python benchmarks/scaling.py " + " ".join(sys.argv[1:]),
        "machine": {
            "processors": os.cpu_count(),
            "architecture": platform.machine(),
            "device": points[0]["device"],
            "load_before": os.getloadavg()[0],
        },
        "points": points,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, arguments.figure)


if __name__ == "__main__":
    main()
