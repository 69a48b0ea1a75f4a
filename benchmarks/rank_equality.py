"""Checks that 1, 2 and 4 CPU ranks in every ZeRO stage give the same rollouts, rewards, gradients and weights.

    python benchmarks/rank_equality.py --json benchmarks/results/rank_equality.json

Each number of ranks is one launch of DeepSpeed's launcher, in which every case trains the tiny FLUX pipeline for two
epochs of two optimizer steps through the ordinary loop. What is recorded, by image and by step, is compared with one
rank in ZeRO 1. Exit code 1 where a difference is above the limits below.

To show that the differences are rounding, the float64 cases compute network, latents and losses in float64; there
everything must agree to 1e-5, however much it is magnified. (DeepSpeed accumulates and steps in float32.)
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
from json_files import read_json
from torch import Tensor

PROJECT = Path(__file__).resolve().parent.parent
STAGES, MODES = (1, 2, 3), ("full", "lora")
DTYPES = ("float32", "float64")
CASES = tuple(f"zero{stage}-{mode}-{dtype}" for dtype in DTYPES for stage in STAGES for mode in MODES)
KINDS = ("rollouts", "rewards", "gradients", "weights", "advantages", "log_ratios")
ROUNDING = 8 * float(torch.finfo(torch.float32).eps)
"""Rounding error of a float32 forward of this network from another order of summation, relative to its output."""

LIMITS = {
    "float32": {
        **dict.fromkeys(KINDS[:4], 1e-5),
        "advantages_over_terms": ROUNDING,
        "log_ratios_over_terms": ROUNDING,
    },
    "float64": dict.fromkeys((*KINDS, "movement"), 1e-5),
}
"""Largest allowed difference by the dtype of the network, in the Euclidean norm, relative to what is compared.

Advantages and log-ratios are differences themselves, so that rounding, relative to them, is magnified by how much
larger their terms are. In float32 they are held against those terms, to a few units in the last place of one term:

- an advantage (r - mean) / std against (|r| + |mean|) / std;
- a log-ratio L <d z> - Q <d d>, d = f - f_old (docs/method.md), against (|L| rms(z) + 2 |Q| rms(d)) (rms(f) +
  rms(f_old)): by Cauchy and Schwarz it changes by no more than this times the relative change of the two outputs.

``movement`` is the difference of the weights over how far they have moved in all steps.
"""
SETTINGS = (
    "model.dtype=float32",
    "model.max_sequence_length=8",
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


def record(case: str, folder: Path, pipeline: Path, *overrides: str) -> Record:
    """Train a case in this process, a rank of the process group if there is one; the record is whole on rank 0.

    Args:
        case: "zero2-lora-float32".
        folder: what the runs write goes here; shared by the ranks.
        pipeline: a FLUX pipeline that the settings suit.
        overrides: settings that win over :data:`SETTINGS`.
    """
    import pcpo_fast.training.trainer
    from pcpo_fast.config.loading import load_config
    from pcpo_fast.distributed.collectives import gather_objects, rank

    name, mode, dtype = case.split("-")
    stage = int(name.removeprefix("zero"))
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
            *(("model.lora.rank=4", "model.lora.alpha=8") if mode == "lora" else ()),
            f"model.embedding_cache={folder / 'embeddings'}",
            f"prompts.train={prompts}",
            "prompts.heldout=null",
            f"deepspeed={deepspeed}",
            f"output_dir={folder / case}",
            *SETTINGS,
            *overrides,
        ],
    )
    mine, start = _trained(pcpo_fast.training.trainer, config, getattr(torch, dtype))
    everyone = gather_objects(mine)
    if rank() != 0:
        return {}
    found: Record = {}
    for kind in ("rollouts", "rewards", "advantages", "log_ratios", "log_ratio_terms"):
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


def _trained(trainer: Any, config: Any, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """This rank's record of a run, and on rank 0 the initial weights."""
    from deepspeed.utils import safe_get_full_grad

    from pcpo_fast.rollout import rollout

    mine: dict[str, Any] = {"gradients": [], "log_ratio_terms": {}}
    mine |= {kind: {} for kind in KINDS if kind not in ("gradients", "weights")}
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
            self.batch_pairs = list(zip(batch.rows.tolist(), batch.steps.tolist(), strict=True))
            super()._train_on(batch, *others)

        def _loss(self, batch: Any, halves: Any, old_output: Any, noise: Any, reference: Any = None) -> Any:
            result = super()._loss(batch, halves, old_output, noise, reference)
            if torch.is_grad_enabled():
                terms = torch.zeros_like(result.log_ratio)
                if old_output is not None:
                    linear, quadratic = self.credit.linear[batch.steps], self.credit.quadratic[batch.steps]
                    terms = terms_of(halves.conditional.detach(), old_output, noise, linear, quadratic)
                rows = zip(self.batch_pairs, result.log_ratio.detach().tolist(), terms.tolist(), strict=True)
                for (row, step), value, size in rows:
                    mine["log_ratios"][self.epoch, self.numbers[row], step] = np.float64(value)
                    mine["log_ratio_terms"][self.epoch, self.numbers[row], step] = np.float64(size)
            return result

    class RecordingEngine(trainer.Engine):  # type: ignore[misc, name-defined]
        def step(self) -> None:
            if self.deepspeed.is_gradient_accumulation_boundary():
                trained = [p for p in self.deepspeed.module.parameters() if p.requires_grad]
                mine["gradients"].append(torch.cat([safe_get_full_grad(p).flatten() for p in trained]).numpy().copy())
            super().step()

    def prepared(config: Any, *others: Any) -> Any:
        policy = load_policy(config, *others)
        policy.module.to(dtype)
        policy.vae.to(dtype)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in policy.module.named_parameters():
            if "lora_" in name:  # the adapters start as the identity, through which half of them have no gradient
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        state = {name: p.detach().clone() for name, p in policy.module.named_parameters() if p.requires_grad}
        from pcpo_fast.distributed.collectives import rank

        if rank() == 0:
            policy.save_weights(Path(config.output_dir).parent / f"{Path(config.output_dir).name}-start", state)
            start.update(_exported(Path(config.output_dir).parent / f"{Path(config.output_dir).name}-start"))
        return policy

    def finish(folder: Path, policy: Any, engine: Any, *_: Any, **__: Any) -> dict[str, Any]:
        from pcpo_fast.distributed.collectives import barrier, rank

        weights = engine.full_state()
        if rank() == 0:
            policy.save_weights(folder / "export", weights)
        barrier()
        return {}

    assert callable(finish_run)
    patches = {
        "Update": RecordingUpdate,
        "Engine": RecordingEngine,
        "load_policy": prepared,
        "finish_run": finish,
        "save_checkpoint": lambda *_, **__: None,
        "stop_distributed": lambda: None,
    }
    initial = rollout.initial_latents
    with ExitStack() as stack:
        # The latents of a trajectory keep the dtype of its first ones.
        stack.enter_context(mock.patch.object(rollout, "initial_latents", lambda *given: initial(*given).to(dtype)))
        for name, replacement in patches.items():
            stack.enter_context(mock.patch.object(trainer, name, replacement))
        from rich.console import Console

        trainer.train(config, "never", Console(quiet=True))
    return mine, start


def _exported(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: value for file in sorted(folder.rglob("*.safetensors")) for name, value in load_file(file).items()}


def terms_of(output: Tensor, old_output: Tensor, noise: Any, linear: Tensor, quadratic: Tensor) -> Tensor:
    """Size of what log-ratios are the differences of (:data:`LIMITS`): [M], of outputs [M, ...], coefficients [M]."""
    from pcpo_kernels.ops.noise.reference import resolve_noise

    def rms(values: Tensor) -> Tensor:
        return values.flatten(1).double().square().mean(dim=1).sqrt()

    f, old = output.double(), old_output.double()
    coefficients = linear.abs() * rms(resolve_noise(noise, old)) + 2 * quadratic.abs() * rms(f - old)
    return coefficients * (rms(f) + rms(old))


def advantage_terms(found: Record, group: int) -> np.ndarray:
    """Size of what advantages are the differences of (:data:`LIMITS`), for groups of so many images; in their order."""
    rewards = found["rewards"].astype(np.float64).reshape(-1, group)  # by epoch and image: a group lies together
    means, spreads = rewards.mean(axis=1, keepdims=True), rewards.std(axis=1, keepdims=True)
    return ((np.abs(rewards) + np.abs(means)) / spreads).ravel()


def compare(one: Record, other: Record, group: int = 8) -> dict[str, float]:
    """The difference of two records of the same mode in each thing compared, over its size (see ``LIMITS``).

    Args:
        one, other: records; the sizes are those of ``one``.
        group: images of a prompt.
    """
    assert one["start"].shape == other["start"].shape and np.array_equal(one["start"], other["start"])
    differences = {}

    def add(name: str, kind: str, size: np.ndarray) -> None:
        assert np.linalg.norm(size) > 0, f"{kind}: nothing to compare"
        difference = one[kind].astype(np.float64) - other[kind].astype(np.float64)
        differences[name] = float(np.linalg.norm(difference) / np.linalg.norm(size))

    for kind in KINDS:
        if f"{kind}_of" in one:
            assert np.array_equal(one[f"{kind}_of"], other[f"{kind}_of"]), f"{kind} of other images"
        add(kind, kind, one[kind].astype(np.float64))
    add("movement", "weights", one["weights"].astype(np.float64) - one["start"])
    add("advantages_over_terms", "advantages", advantage_terms(one, group))
    add("log_ratios_over_terms", "log_ratios", one["log_ratio_terms"])
    return differences


def above(differences: dict[str, Any], dtype: str = "float32") -> list[str]:
    """What differs by more than the limits of a dtype, with how much; nothing is as it should be."""
    return [
        f"{kind} {differences[kind]:.1e} > {limit:.1e}"
        for kind, limit in LIMITS[dtype].items()
        if not differences[kind] <= limit
    ]


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
    from pcpo_fast.engine.engine import start_distributed, stop_distributed

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
            stage, mode, dtype = case.split("-")
            base = next(name for name in first if name.endswith(f"-{mode}-{dtype}"))
            line = {"ranks": ranks, "zero": int(stage[-1]), "mode": mode, "dtype": dtype}
            yield line | compare(first[base], found)


def render(table: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    kinds = (*KINDS, "movement", "advantages_over_terms", "log_ratios_over_terms")
    head = ["dtype", "ranks", "ZeRO", "mode", *(kind.replace("_", " ").replace("log r", "log-r") for kind in kinds)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in sorted(table, key=lambda line: DTYPES.index(line["dtype"])):
        numbers = ["0" if line[kind] == 0 else f"{line[kind]:.1e}" for kind in kinds]
        names = [line["dtype"], str(line["ranks"]), str(line["zero"]), line["mode"]]
        lines.append("| " + " | ".join([*names, *numbers]) + " |")
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
        print(render(read_json(arguments.json)["rows"]), end="")
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
    unequal = [line for line in table if above(line, line["dtype"])]
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
