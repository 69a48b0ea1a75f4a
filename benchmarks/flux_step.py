"""Measure a training step of FLUX with random weights: seconds per phase, throughput, memory, gain of each setting.

    python benchmarks/flux_step.py --size cpu --json step.json
    python benchmarks/flux_step.py --size full --finetune lora --json step.json --budget-seconds 400

Sizes: ``full`` is FLUX.1-dev at 720 x 720 (DanceGRPO's 12 images x 16 steps x 9 trained), in micro-batches that the GPU
has memory for; ``small`` a fifth of its depth, ``cpu`` a miniature, ``dry`` two tiny blocks that try the script.
``ours`` has every lever up to compiled blocks, ``baseline`` is the public trainers' way, ``strong`` a batched and
compiled plain PyTorch loop (benchmarks/step_paths.py says what they do); the ladder goes from the public way to ours,
one lever at a time, and on a GPU beyond, to levers that no GPU has proved (``unproved``). Before a path is timed its
outputs and log-ratios are checked against plain eager PyTorch in a wider type; one that fails gets no time, and a path
that raises costs no other. On a GPU the file is written anew after each measurement, the most valuable first; on a CPU,
whose clock drifts, the paths take turns.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from kernel_times import device_facts, write
from revisions import now
from step_checking import Check
from step_measuring import Bare, Timed, launches, operations, seconds
from step_model import SIZES, Size
from step_paths import Ours, Public, StepPath, Strong, WithEngine

from pcpo_fast.config.schema import Config
from pcpo_fast.engine.engine import start_distributed, stop_distributed
from pcpo_fast.errors import UserError
from pcpo_fast.planning.cards import card_of
from pcpo_fast.policies.quiet import quiet_libraries
from pcpo_fast.rollout.epoch_plan import steps_per_image

PATHS = ("ours", "strong", "baseline", "unproved", "ladder", "extras")
"""What ``--only`` takes, in the order of measurement."""
APART = "unproved"
"""Measured in a process of its own on a GPU: as ``train`` does, block kernels in compiled blocks turn off fused
multiply-add for whatever Triton compiles, before the first kernel is called."""


@dataclass(frozen=True)
class Rung:
    """A rung of the ladder: everything before it, plus one optimization.

    Attributes:
        name: of the optimization.
        overrides: settings that enable it.
        gpu: for GPUs only.
        unproved: not yet tested on a GPU, so ``ours`` is measured without it.
    """

    name: str
    overrides: tuple[str, ...]
    gpu: bool = False
    unproved: bool = False


def ladder(size: Size) -> list[Rung]:
    """Our loop one image at a time with every block recomputed, then lever by lever."""
    return [
        Rung("our loop: fused step and loss, no waits", ("model.gradient_checkpointing=true",)),
        Rung("the group in one rollout batch", (f"rollout.batch_size={size.images}",)),
        Rung(f"{size.together} transitions in a micro-batch", (f"train.micro_batch_size={size.together}",)),
        Rung("nothing recomputed", ("model.gradient_checkpointing=false",)),
        Rung("equal first steps predicted once", ("rollout.share_first_steps=true",)),
        Rung("compiled blocks", ("model.compile=true",)),
        Rung("block kernels", ("model.block_kernels=true",), gpu=True, unproved=True),
        Rung("cuDNN attention", ("model.attention=_native_cudnn",), gpu=True, unproved=True),
    ]


EXTRAS = [
    Rung("half of the blocks recomputed", ("model.gradient_checkpointing=true", "model.checkpointed_share=0.5")),
    Rung("only what is cheap recomputed", ("model.gradient_checkpointing=selective",), gpu=True),
    Rung("adapters merged in rollouts", ("rollout.merge_lora=true",)),
    Rung("optimizer offloaded in rollouts", ("rollout.offload_optimizer=true",), gpu=True),
]
"""Levers that trade something else, each on top of all others."""


class Session:
    """Measurements of one size on one device, written to a file as they come."""

    def __init__(self, chosen: argparse.Namespace, device: torch.device) -> None:
        self.size, self.device, self.chosen = SIZES[chosen.size], device, chosen
        self.gpu = device.type == "cuda"
        if self.gpu:
            self.size = self.size.fitting(torch.cuda.get_device_properties(device).total_memory / 2**30)
        self.only = chosen.only.split(",") if chosen.only else PATHS
        self.apart = self.gpu and APART in self.only and set(self.only) != {APART}
        if self.apart:
            self.only = [path for path in self.only if path != APART]
        self.failed, self.left_out, self.late_for = list[str](), list[str](), list[str]()
        self.started = time.monotonic()
        self.waiting: list[tuple[str, dict[str, Any], Timed]] = []
        self.base = ("optimizer.moments=8bit",) * chosen.eight_bit
        if chosen.deepspeed:
            self.base = (*self.base, f"deepspeed={chosen.deepspeed}")
        config = self.config(())
        self.work = self._work(config)
        self.checker: Check | None = None
        self.content: dict[str, Any] = facts(device) | {
            "size": chosen.size,
            "finetune": chosen.finetune,
            "images": self.size.images,
            "steps": self.size.steps,
            "trained_pairs": self.work["pairs"],
            "resolution": self.size.image,
            "model_tflop": {name: self.work[name] / 1e12 for name in ("rollout", "update")},
            "peak_tflops": self.peak,
            "micro_batch": self.size.together,
            "complete": False,
            "ladder": [],
            "extras": [],
        }
        if chosen.add and chosen.json.exists():
            self.content |= self._measured_before()

    @property
    def peak(self) -> float | None:
        """Dense bf16 TFLOP/s of the data sheet; None for an unlisted device."""
        card = card_of(torch.cuda.get_device_name()) if self.gpu else None
        return None if card is None else card.peak_tflops

    def config(self, overrides: tuple[str, ...]) -> Config:
        return self.size.config(self.chosen.finetune, *self.base, *overrides)

    def rungs(self) -> list[tuple[Rung, tuple[str, ...]]]:
        """The rungs that run on this machine, each with all its settings."""
        settings: dict[str, str] = {}
        climbed = []
        for rung in ladder(self.size):
            tried = self.chosen.size == "dry" and "model.block_kernels=true" in rung.overrides
            if rung.gpu and not self.gpu and not tried:
                continue
            settings |= dict(override.split("=", 1) for override in rung.overrides)
            climbed.append((rung, tuple(f"{key}={value}" for key, value in settings.items())))
        return climbed

    def run(self) -> None:
        """Measure everything requested, the most valuable first, until the time is up."""
        rungs = self.rungs()
        proved = [climbed for climbed in rungs if not climbed[0].unproved]
        best = proved[-1][1]
        strong = tuple(setting for setting in best if not setting.startswith("rollout.share"))
        public = replace(self.size, images=self.chosen.public_images or self.size.images)
        self._record("ours", lambda: Ours(self.size, self.config(best), self.device), best)
        self._record("strong", lambda: Strong(self.size, self.config(strong), self.device), strong)
        first = proved[0][1]
        self._record(
            "baseline",
            lambda: Public(public, public.config(self.chosen.finetune, *self.base, *first), self.device),
            first,
        )
        if "ours" in self.only and (not self.gpu or self.chosen.size == "small"):
            self._overhead(best)
        for climbed in rungs:
            if climbed != proved[-1]:
                self._climb("unproved" if climbed[0].unproved else "ladder", "ladder", *climbed)
        for rung in EXTRAS:
            if (rung.gpu and not self.gpu) or ("merge" in rung.name and self.chosen.finetune != "lora"):
                continue
            self._climb("extras", "extras", rung, (*best, *rung.overrides))
        self._take_turns()
        self.content["complete"] = not self.left_out and not self.failed
        self.write()

    def _climb(self, group: str, key: str, rung: Rung, settings: tuple[str, ...]) -> None:
        self._record(group, lambda: Ours(self.size, self.config(settings), self.device), settings, rung.name, key)

    def check(self, config: Config) -> dict[str, Any]:
        """Whether a configuration matches eager PyTorch; the first call computes the references."""
        if self.checker is None:
            self.checker = Check(self.size, self.config(()), self.device)
        return self.checker(config)

    def late(self) -> bool:
        return time.monotonic() - self.started > self.chosen.budget_seconds

    def _record(
        self, group: str, build: Callable[[], StepPath], settings: tuple[str, ...], name: str = "", key: str = ""
    ) -> None:
        """Measure a path if requested; a failure is recorded and the next path continues."""
        key, name = key or group, name or group
        if group not in self.only or self.late():
            self.left_out += [name] * (not self._has(key, name))
            self.late_for += [name] * (group in self.only)
            return
        record = {"name": name, "settings": list(settings), "measured": now(), "code": self.content["code"]}
        with self._noting_failure(key, record):
            self._measure(key, build, settings, record)
        if self.gpu:
            free(self.device)
            torch._dynamo.reset()  # past a few shapes dynamo would silently stop compiling

    @contextmanager
    def _noting_failure(self, key: str, record: dict[str, Any]) -> Iterator[None]:
        """Record an exception and continue."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            print(f"error: {record['name']}: {' '.join(reason.split())[:300]}", file=sys.stderr, flush=True)
            self.failed.append(record["name"])
            self._keep(key, record | {"failed": reason[:2000]})

    def _measure(
        self, key: str, build: Callable[[], StepPath], settings: tuple[str, ...], record: dict[str, Any]
    ) -> None:
        """Check and build one path; time it now on a GPU, and later in turns with the others on a CPU."""
        if key != "baseline":  # that one is eager PyTorch itself
            record["numerics"] = self.check(self.config(settings))
            if not record["numerics"]["passed"]:
                why = f"its outputs are not those of eager PyTorch: {record['numerics']}"
                print(f"error: {record['name']}: not timed, {why}", file=sys.stderr, flush=True)
                self.failed.append(record["name"])
                self._keep(key, record | {"refused": True})
                return
        if self.gpu:
            free(self.device)
        timed = Timed(build(), self.device)
        if not self.gpu:
            self.waiting.append((key, record, timed))
            return
        left = self.chosen.budget_seconds - (time.monotonic() - self.started)
        timed.repeat()
        while len(timed.rollouts) < self.chosen.repeats and timed.spent() * (1 + 1 / len(timed.rollouts)) < left / 4:
            timed.repeat()
        self._finish(key, record, timed)

    def _take_turns(self) -> None:
        """Time the waiting paths alternately, because a CPU's clock drifts by more than the differences."""
        for _ in range(self.chosen.repeats):
            if self.late() and self.waiting and self.waiting[0][2].rollouts:
                break
            for waits in tuple(self.waiting):
                key, record, timed = waits
                with self._noting_failure(key, record):
                    timed.repeat()
                    continue
                self.waiting.remove(waits)
        for key, record, timed in self.waiting:
            with self._noting_failure(key, record):
                self._finish(key, record, timed)

    def _finish(self, key: str, record: dict[str, Any], timed: Timed) -> None:
        record |= timed.record()
        if key == "baseline" and self.chosen.public_images:  # one image at a time: twice the images take twice as long
            record["measured_images"] = self.chosen.public_images
            for phase in ("rollout_s", "update_s"):
                record[phase] *= self.size.images / self.chosen.public_images
        record |= self._rates(record)
        if key in ("ours", "baseline", "strong") and not self.gpu:
            record |= operations(timed.path)
        self._keep(key, record)
        line = f"rollout {record['rollout_s']:8.3f} s  update {record['update_s']:8.3f} s  "
        mfu = "" if record["mfu"] is None else f"  MFU {record['mfu']:.1%}"
        print(f"{line}{record['images_per_second']:7.2f} images/s{mfu}  {record['name']}", flush=True)
        if key in ("ours", "strong") and self.gpu and isinstance(timed.path, WithEngine):
            record |= launches(timed.path, self.device)
            self._keep(key, record)

    def _rates(self, record: dict[str, Any]) -> dict[str, Any]:
        total, work = record["rollout_s"] + record["update_s"], self.work
        rate = (work["rollout"] + work["update"]) / total / 1e12
        return {
            "step_s": total,
            "images_per_second": self.size.images / total,
            "updates_per_second": 1 / total,
            "rollout_tflops": work["rollout"] / record["rollout_s"] / 1e12,
            "update_tflops": work["update"] / record["update_s"] / 1e12,
            "tflops": rate,
            "mfu": None if self.peak is None else rate / self.peak,
        }

    def _keep(self, key: str, record: dict[str, Any]) -> None:
        if key in ("ladder", "extras"):
            self._insert(key, record)
        else:
            self.content[key] = record
        if key == "ours":
            self._insert("ladder", record | {"name": [rung.name for rung, _ in self.rungs() if not rung.unproved][-1]})
        ours = self.content.get("ours", {})
        for other, name in (("baseline", "ratio"), ("strong", "ratio_strong")):
            theirs = self.content.get(other, {})
            self.content.pop(name, None)
            if "step_s" in ours and "step_s" in theirs and ours.get("code") == theirs.get("code"):
                self.content[name] = theirs["step_s"] / ours["step_s"]
        self.write()

    def _insert(self, key: str, record: dict[str, Any]) -> None:
        """Add a record to one of the lists, in rung order, replacing one of the same name."""
        names = [rung.name for rung in (ladder(self.size) if key == "ladder" else EXTRAS)]
        others = [other for other in self.content[key] if other["name"] != record["name"]]
        self.content[key] = sorted([*others, record], key=lambda one: names.index(one["name"]))

    def _has(self, key: str, name: str) -> bool:
        """Whether the file has a time of a path, measured with this code by an earlier call."""
        records = self.content[key] if key in ("ladder", "extras") else [self.content.get(key, {})]
        of_code = [record for record in records if record.get("code") == self.content["code"]]
        return any(record["name"] == name and "step_s" in record for record in of_code)

    def _measured_before(self) -> dict[str, Any]:
        """The paths that a file has already.

        Raises:
            UserError: they were measured for another step or on another machine.
        """
        before = json.loads(self.chosen.json.read_text())
        for fact in ("device", "size", "finetune", "images", "micro_batch"):
            if before.get(fact) != self.content[fact]:
                raise UserError(
                    f"{self.chosen.json}: {fact} is {before.get(fact)!r} there and {self.content[fact]!r} here: "
                    "add to a file of the same step on the same machine"
                )
        kept = ("ours", "strong", "baseline", "ratio", "ratio_strong", "overhead", "ladder", "extras")
        return {key: before[key] for key in kept if key in before}

    def _overhead(self, settings: tuple[str, ...]) -> None:
        """The share of our step that is not the network's own forward and backward, from interleaved runs."""
        config = self.config(settings)
        ours, bare = Ours(self.size, config, self.device), Bare(self.size, config, self.device)
        shares, micro = [], self.work["pairs"] / config.train.micro_batch_size
        for repeat in range(self.chosen.repeats + 1):
            times = [seconds(call, self.device) for call in (ours.rollout, bare.rollout, ours.update, bare.update)]
            if repeat:
                shares.append((1 - (times[1] + times[3]) / (times[0] + times[2]), (times[2] - times[3]) / micro))
        self.content["overhead"] = {
            "share_of_step": median(share for share, _ in shares),
            "milliseconds_per_micro_step": 1e3 * median(each for _, each in shares),
            "repeats": len(shares),
            "measured": now(),
            "code": self.content["code"],
        }
        self.write()
        print(
            f"outside the network's own forward and backward: {self.content['overhead']['share_of_step']:.1%} of a step"
        )

    def _work(self, config: Config) -> dict[str, Any]:
        forward, training = self.size.operations(config)
        pairs = self.size.images * steps_per_image(config, self.size.steps - 1)
        return {"rollout": self.size.images * self.size.steps * forward, "update": pairs * training, "pairs": pairs}

    def write(self) -> None:
        self.content["seconds"] = time.monotonic() - self.started
        path: Path = self.chosen.json
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, self.content)


def free(device: torch.device) -> None:
    """Free the memory of the previous path."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def facts(device: torch.device) -> dict[str, Any]:
    """Where the numbers come from."""
    here = {"device": f"{platform.machine()}, {torch.get_num_threads()} threads"} if device.type == "cpu" else {}
    command = " ".join(["python", "benchmarks/flux_step.py", *sys.argv[1:]])
    return device_facts(device) | here | {"diffusers": diffusers.__version__, "command": command}


def measure_apart(arguments: list[str] | None, seconds: float) -> int:
    """Add the paths of :data:`APART` to the file; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    command = [sys.executable, __file__, *given, "--only", APART, "--add"]
    return subprocess.run([*command, "--budget-seconds", f"{max(seconds, 1e-3):.3f}"]).returncode


def main(arguments: list[str] | None = None) -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), required=True, help="of the model and the step")
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--finetune", choices=("lora", "full"), default="lora", help="what is trained (%(default)s)")
    parser.add_argument("--eight-bit", action="store_true", help="8-bit moments (bitsandbytes)")
    parser.add_argument("--deepspeed", help="DeepSpeed JSON of our path and the strong one, ZeRO stage 1 or 2")
    parser.add_argument("--only", default="", metavar="PATHS", help=f"some of {','.join(PATHS)} (all of them)")
    parser.add_argument("--add", action="store_true", help="keep the paths that the file has already")
    parser.add_argument(
        "--public-images", type=int, default=0, help="measure the public way on this many images, and scale its times"
    )
    parser.add_argument("--repeats", type=int, default=5, help="steps per median (%(default)s)")
    parser.add_argument(
        "--budget-seconds", type=float, default=900.0, help="time after which nothing new starts (%(default)s)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.repeats < 1 or not chosen.budget_seconds > 0:
        parser.error("--repeats and --budget-seconds must be positive")
    if unknown := set(filter(None, chosen.only.split(","))) - set(PATHS):
        parser.error(f"--only takes {', '.join(PATHS)}, not {', '.join(sorted(unknown))}")
    if chosen.size not in ("cpu", "dry") and not torch.cuda.is_available():
        print(f"error: --size {chosen.size} needs a GPU; --size cpu does not", file=sys.stderr)
        return 2
    try:
        device = start_distributed()
        # A dry run traces what is compiled, and leaves out the compiler, which takes a CPU minutes.
        traced = patch.object(torch, "compile", partial(torch.compile, backend="eager"))
        with quiet_libraries(), traced if chosen.size == "dry" else nullcontext():
            session = Session(chosen, device)
            session.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        stop_distributed()
    failed = bool(session.failed)
    if session.apart:
        left = chosen.budget_seconds - (time.monotonic() - session.started)
        del session.checker
        free(device)
        failed |= bool(measure_apart(arguments, left))
    late = f", no time was left for {', '.join(session.late_for)}" if session.late_for else ""
    print(f"wrote {chosen.json}{late}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
