"""One configuration on 1, 2 and 4 CPU ranks, in every ZeRO stage: the same rollouts, rewards, gradients and weights?

    python benchmarks/rank_equality.py --json benchmarks/results/rank_equality.json

Each number of ranks is one launch of DeepSpeed's launcher, in which every case trains the tiny FLUX pipeline for two
epochs of two optimiser steps through the ordinary loop. What is recorded, by image and by step, is compared with one
rank in ZeRO 1. Exit code 1 where a difference is above the limits below.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

PROJECT = Path(__file__).resolve().parent.parent
STAGES, MODES = (1, 2, 3), ("full", "lora")
CASES = tuple(f"zero{stage}-{mode}" for stage in STAGES for mode in MODES)
LIMITS = {
    "rollouts": 1e-5,
    "rewards": 1e-5,
    "advantages": 1e-4,
    "log_ratios": 5e-5,
    "gradients": 1e-5,
    "weights": 5e-5,
}
"""Largest allowed difference over the size of what is compared, each in the Euclidean norm.

Advantages divide by the spread of a group, which is small beside the rewards, and a log-ratio is made of the difference
of two outputs that agree to a thousandth: both magnify rounding errors. Weights are those exported; their difference is
taken over how far they have moved in four steps, which is a strict measure, and not over their size.
"""
SETTINGS = (
    "model.dtype=float32",
    "model.max_sequence_length=8",
    "model.lora.rank=4",
    "model.lora.alpha=8",
    "sampler.steps=4",
    "sampler.noise=0.7",
    "rollout.prompts_per_epoch=2",
    "rollout.images_per_prompt=8",  # at 4 ranks no rank has a whole group
    "rollout.batch_size=16",
    "rollout.same_initial_noise=false",
    "rewards=[{name: 'rank_equality:redness'}]",
    "credit.clip_range=10.0",  # nothing is clipped: a sample on the edge would be on either side of it
    "optimizer.lr=1e-2",
    "optimizer.eps=1e-2",  # far above the gradients: AdamW's step is then linear in them, and divides by no noise
    "optimizer.max_grad_norm=0.05",
    "train.epochs=2",
    "train.updates_per_epoch=2",
    "train.micro_batch_size=3",
    "logging.tensorboard=false",
)

Record = dict[str, np.ndarray]


def redness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """A reward that depends smoothly on the pixels."""
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def record(case: str, folder: Path, pipeline: Path) -> Record:
    """Train a case in this process, a rank of the process group if there is one; the record is whole on rank 0.

    Args:
        case: "zero2-lora".
        folder: what the runs write goes here; shared by the ranks.
        pipeline: a FLUX pipeline that the settings suit.
    """
    import pcpo_fast.trainer
    from pcpo_fast.config_loading import load_config
    from pcpo_fast.distributed import gather_objects, rank

    stage, mode = int(case[4]), case.partition("-")[2]
    prompts, deepspeed = folder / "prompts.txt", folder / f"zero{stage}.json"
    if rank() == 0:
        shutil.rmtree(folder / case, ignore_errors=True)  # of a launch that failed
        lines = (PROJECT / "assets" / "prompts" / "scenes_train.txt").read_text(encoding="utf-8").splitlines()
        prompts.write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
        # Parameters below the threshold stay whole on every rank: with 0 every one is scattered.
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 100_000}
        if stage == 3:
            zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 100_000}
        deepspeed.write_text(json.dumps({"zero_optimization": zero}))
    gather_objects(None)
    config = load_config(
        None,
        [
            f"model.path={pipeline}",
            f"model.finetune={mode}",
            f"model.embedding_cache={folder / 'embeddings'}",
            f"prompts.train={prompts}",
            "prompts.heldout=null",
            f"deepspeed={deepspeed}",
            f"output_dir={folder / case}",
            *SETTINGS,
        ],
    )
    mine, start = _trained(pcpo_fast.trainer, config)
    everyone = gather_objects(mine)
    if rank() != 0:
        return {}
    found: Record = {}
    for kind in ("rollouts", "rewards", "advantages", "log_ratios"):
        together = {key: value for part in everyone for key, value in part[kind].items()}
        assert sum(len(part[kind]) for part in everyone) == len(together), f"{kind}: an image was made twice"
        found[kind] = np.stack([together[key] for key in sorted(together)])
        found[f"{kind}_of"] = np.array(sorted(together))
    found["gradients"] = np.concatenate(mine["gradients"])
    exported = _exported(folder / case / "export")
    assert exported.keys() == start.keys(), "the export lacks weights, or has others"
    assert all(exported[name].size == value.size > 0 for name, value in start.items()), "an exported tensor is empty"
    found["start"], found["weights"] = (
        np.concatenate([part[name].ravel() for name in sorted(start)]) for part in (start, exported)
    )
    return found


def _trained(trainer: Any, config: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What this rank saw of a run, and the weights that it started from (on rank 0)."""
    from deepspeed.utils import safe_get_full_grad

    mine: dict[str, Any] = {"gradients": [], **{name: {} for name in LIMITS if name not in ("gradients", "weights")}}
    start: dict[str, np.ndarray] = {}
    load_policy, finish_run = trainer.load_policy, trainer.finish_run

    class RecordingUpdate(trainer.Update):  # type: ignore[misc, name-defined]
        def __init__(self, policy: Any, engine: Any, rollout: Any, advantages: Tensor, *others: Any) -> None:
            super().__init__(policy, engine, rollout, advantages, *others)
            self.numbers, self.epoch = rollout.plan.images.flatten().tolist(), rollout.plan.epoch
            rewards = redness(rollout.images, [], [])
            for row, image in enumerate(self.numbers):
                key = (self.epoch, image)
                mine["rollouts"][key] = rollout.trajectories.latents[row].flatten().numpy().copy()
                mine["rewards"][key] = rewards[row].numpy().copy()
                mine["advantages"][key] = advantages[row].numpy().copy()

        def _train_on(self, batch: Any, *others: Any) -> None:
            self.pairs = list(zip(batch.rows.tolist(), batch.steps.tolist(), strict=True))
            super()._train_on(batch, *others)

        def _loss(self, *arguments: Any) -> Any:
            result = super()._loss(*arguments)
            if torch.is_grad_enabled():
                for (row, step), value in zip(self.pairs, result.log_ratio.detach().tolist(), strict=True):
                    mine["log_ratios"][self.epoch, self.numbers[row], step] = np.float64(value)
            return result

    class RecordingEngine(trainer.Engine):  # type: ignore[misc, name-defined]
        def step(self) -> None:
            if self.deepspeed.is_gradient_accumulation_boundary():
                trained = [p for p in self.deepspeed.module.parameters() if p.requires_grad]
                mine["gradients"].append(torch.cat([safe_get_full_grad(p).flatten() for p in trained]).numpy().copy())
            super().step()

    def randomized(config: Any, *others: Any) -> Any:
        policy = load_policy(config, *others)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in policy.module.named_parameters():
            if "lora_" in name:  # the adapters start as the identity, through which half of them have no gradient
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        state = {name: p.detach().clone() for name, p in policy.module.named_parameters() if p.requires_grad}
        from pcpo_fast.distributed import rank

        if rank() == 0:
            policy.save_weights(Path(config.output_dir).parent / f"{Path(config.output_dir).name}-start", state)
            start.update(_exported(Path(config.output_dir).parent / f"{Path(config.output_dir).name}-start"))
        return policy

    def finish(folder: Path, policy: Any, engine: Any, *_: Any, **__: Any) -> dict[str, Any]:
        from pcpo_fast.distributed import barrier, rank

        weights = engine.full_state()
        if rank() == 0:
            policy.save_weights(folder / "export", weights)
        barrier()
        return {}

    assert callable(finish_run)
    patches = {
        "Update": RecordingUpdate,
        "Engine": RecordingEngine,
        "load_policy": randomized,
        "finish_run": finish,
        "save_checkpoint": lambda *_, **__: None,
        "stop_distributed": lambda: None,
    }
    with ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch.object(trainer, name, replacement))
        from rich.console import Console

        trainer.train(config, "never", Console(quiet=True))
    return mine, start


def _exported(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: value for file in sorted(folder.rglob("*.safetensors")) for name, value in load_file(file).items()}


def compare(one: Record, other: Record) -> dict[str, float]:
    """The difference of two records of the same mode in each thing compared, over its size (see ``LIMITS``)."""
    assert one["start"].shape == other["start"].shape and np.array_equal(one["start"], other["start"])
    differences = {}
    for kind in LIMITS:
        if f"{kind}_of" in one:
            assert np.array_equal(one[f"{kind}_of"], other[f"{kind}_of"]), f"{kind} of other images"
        a, b = (part[kind].astype(np.float64) for part in (one, other))
        size = a - one["start"] if kind == "weights" else a
        assert np.linalg.norm(size) > 0, f"{kind}: nothing to compare"
        differences[kind] = float(np.linalg.norm(a - b) / np.linalg.norm(size))
    return differences


def launch(ranks: int, cases: tuple[str, ...], folder: Path, pipeline: Path) -> dict[str, Record]:
    """The records of some cases on so many CPU ranks, by DeepSpeed's launcher; those in the folder are not made again.

    Raises:
        RuntimeError: the launch failed; with what it printed.
    """
    missing = [case for case in cases if not (folder / f"{case}.npz").exists()]
    if not missing:
        return {case: dict(np.load(folder / f"{case}.npz")) for case in cases}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port", str(port)]
    command += [
        str(Path(__file__).resolve()),
        "--worker",
        str(folder),
        "--pipeline",
        str(pipeline),
        "--cases",
        *missing,
    ]
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(PROJECT), str(PROJECT / "kernels"), *sys.path[1:]])
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{ranks} ranks ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return {case: dict(np.load(folder / f"{case}.npz")) for case in cases}


def work(folder: Path, cases: tuple[str, ...], pipeline: Path) -> None:
    """What each process of a launch does."""
    torch.set_num_threads(1)
    from pcpo_fast.engine import start_distributed, stop_distributed

    start_distributed()
    for case in cases:
        found = record(case, folder, pipeline)
        if found:
            np.savez(folder / "part.npz", **found)  # type: ignore[arg-type]
            (folder / "part.npz").rename(folder / f"{case}.npz")
    stop_distributed()


def rows(records: dict[int, dict[str, Record]]) -> Iterator[dict[str, Any]]:
    """A line for each number of ranks and case, against the fewest ranks in the first stage there is."""
    first = records[min(records)]
    for ranks, cases in records.items():
        for case, found in cases.items():
            mode = case.partition("-")[2]
            base = next(name for name in first if name.endswith(f"-{mode}"))
            yield {"ranks": ranks, "zero": int(case[4]), "mode": mode} | compare(first[base], found)


def render(table: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    head = ["ranks", "ZeRO", "mode", *(kind.replace("_", "-") for kind in LIMITS)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in table:
        numbers = ["0" if line[kind] == 0 else f"{line[kind]:.1e}" for kind in LIMITS]
        lines.append("| " + " | ".join([str(line["ranks"]), str(line["zero"]), line["mode"], *numbers]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Launch, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--pipeline", type=Path, default=PROJECT / "assets" / "tiny-flux")
    parser.add_argument("--records", type=Path, help="folder that keeps the records; those in it are not made again")
    parser.add_argument("--json", type=Path, default=PROJECT / "benchmarks" / "results" / "rank_equality.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--show", action="store_true", help="print the file's table in Markdown, and run nothing")
    arguments = parser.parse_args()
    if arguments.show:
        print(render(json.loads(arguments.json.read_text())["rows"]), end="")
        return 0
    if arguments.worker is not None:
        work(arguments.worker, tuple(arguments.cases), arguments.pipeline)
        return 0
    records = {}
    with tempfile.TemporaryDirectory() as temporary:
        for ranks in arguments.ranks:
            folder = (arguments.records or Path(temporary)).resolve() / str(ranks)
            folder.mkdir(parents=True, exist_ok=True)
            records[ranks] = launch(ranks, tuple(arguments.cases), folder, arguments.pipeline.resolve())
            print(f"{ranks} ranks done", flush=True)
    table = list(rows(records))
    unequal = [line for line in table if any(line[kind] > limit for kind, limit in LIMITS.items())]
    result = {
        "command": "python benchmarks/rank_equality.py " + " ".join(sys.argv[1:]),
        "machine": {"processors": os.cpu_count(), "architecture": platform.machine(), "torch": torch.__version__},
        "limits": LIMITS,
        "unequal": len(unequal),
        "rows": table,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(render(table), end="")
    return int(bool(unequal))


if __name__ == "__main__":
    raise SystemExit(main())
