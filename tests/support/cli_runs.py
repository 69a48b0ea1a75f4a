"""Runs of the tiny pipeline through the command line, for the tests of the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from launched_ranks import free_port
from tiny_pipeline import HEIGHT, PROMPTS, WIDTH

import pcpo_fast.training.trainer
from pcpo_fast.cli import main
from pcpo_fast.config.loading import load_config
from pcpo_fast.method.samplers import build_transitions
from pcpo_fast.method.step_tables import StepTable
from pcpo_fast.method.transitions import euler_ode
from pcpo_fast.policies.embedding_cache import EmbeddingCache
from pcpo_fast.policies.flux import FluxPolicy
from pcpo_fast.rollout.generation import generate

ROOT = Path(__file__).resolve().parents[2]


def wait_for(
    condition: Callable[[], bool], process: "subprocess.Popen[str] | subprocess.Popen[bytes] | None" = None
) -> None:
    """Wait until the condition holds, for at most four minutes and only while the process lives."""
    end = time.monotonic() + 240
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


# A reward whose 2nd, 4th, ... call on a rank's share of a rollout (an evaluation has at most two images) can be made to
# wait: the test kills the run there, in the middle of an epoch that has a checkpoint before it.
WAITING_REWARD = """
import pathlib, time
calls = 0
def redness(images, prompts, metadata):
    global calls
    calls += len(images) > 2
    if len(images) > 2 and calls == int(pathlib.Path("wait_at").read_text()):
        pathlib.Path("waiting").touch()
        time.sleep(120)
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
"""


class Output(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def write_config(folder: Path, pipeline: Path, **changes: Any) -> Path:
    """A configuration file of two epochs on the pipeline; its files lie in ``folder``, the run goes to ``folder/run``.

    ``changes`` are keys with ``__`` for the dot.
    """
    (folder / "train.txt").write_text("\n".join(PROMPTS[:3]), encoding="utf-8")
    (folder / "heldout.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "metadata": {"n": n}}) + "\n" for n, prompt in enumerate(PROMPTS[2:])),
        encoding="utf-8",
    )
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model__path": str(pipeline),
        "model__height": HEIGHT,
        "model__width": WIDTH,
        "model__max_sequence_length": 12,
        "model__embedding_cache": str(pipeline.parent / "embeddings"),
        "prompts__train": str(folder / "train.txt"),
        "prompts__heldout": str(folder / "heldout.jsonl"),
        "sampler__steps": 4,
        "sampler__noise": 0.7,
        "rollout__prompts_per_epoch": 2,
        "rollout__images_per_prompt": 4,
        "rollout__batch_size": 8,
        "rewards": [{"name": "tiny_pipeline:redness"}],
        "optimizer__lr": 1e-3,
        "train__epochs": 2,
        "train__micro_batch_size": 6,
        "evaluation__every": 1,
        "evaluation__prompts": 2,
        "checkpoint__every": 1,
        "logging__tensorboard": False,
    } | changes
    if values["prompts__heldout"] is None:
        values = {name: value for name, value in values.items() if not name.startswith("evaluation__")}
    if values.get("sampler__name") == "ddim":
        del values["model__max_sequence_length"]  # T5's
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, key = name.split("__")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    path = folder / "run.yaml"
    path.write_text(json.dumps(nested, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Output:
    """Run a command in this process."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as left:  # argparse
        code = int(left.code or 0)
    return Output(code, *capsys.readouterr())


def start(
    folder: Path, *arguments: str | Path, launcher: str = sys.executable, **variables: str
) -> "subprocess.Popen[str]":
    """Start ``train.py`` in a process of its own, in ``folder``; ``launcher`` is what stands before its name.

    ``variables`` are added to its environment.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support"), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.Popen(
        [*launcher.split(), str(ROOT / "train.py"), *map(str, arguments)],
        cwd=folder,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # If a shell started the tests in the background, they ignore SIGINT, and so would child processes.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )


def start_ranks(
    count: int, folder: Path, *arguments: str | Path, launcher: str = sys.executable, **variables: str
) -> list["subprocess.Popen[str]"]:
    """As :func:`start`, with so many ranks; one is started without a launcher's variables."""
    if count == 1:
        return [start(folder, *arguments, launcher=launcher, **variables)]
    shared = variables | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    each = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared for rank in range(count)]
    return [start(folder, *arguments, launcher=launcher, **own) for own in each]


def outputs(processes: list["subprocess.Popen[str]"], timeout: float = 240) -> list[Output]:
    """What processes answer when they have ended."""
    said = [process.communicate(timeout=timeout) for process in processes]
    return [Output(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


class Run:
    """A finished run, and the policy as the training left it."""

    def __init__(self, config: Path, folder: Path, policy: Any, images: torch.Tensor) -> None:
        self.config, self.folder, self.policy, self.images = config, folder, policy, images


def finished_run(folder: Path, pipeline: Path, **changes: Any) -> Run:
    """Train in this process, and keep what is in memory at the end."""
    kept: dict[str, Any] = {}
    finish = pcpo_fast.training.trainer.finish_run

    def keep(run: Path, policy: Any, engine: Any, heldout: Any, *others: Any) -> dict[str, Any]:
        kept.update(policy=policy, images=heldout.last)
        return finish(run, policy, engine, heldout, *others)

    config = write_config(folder, pipeline, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pcpo_fast.training.trainer, "finish_run", keep)
        assert main(["train", "--config", str(config)]) == 0
    return Run(config, folder / "run", kept["policy"], kept["images"])


def euler_table(run: Run) -> StepTable:
    config = load_config(run.config)
    return StepTable.of(euler_ode(build_transitions(config.sampler).times), torch.device("cpu"))


def images_of(transformer: Any, pipeline: Any, run: Run) -> torch.Tensor:
    """The held-out images of a run, from a transformer that plain diffusers loaded."""
    config = load_config(run.config)
    policy = FluxPolicy(
        transformer,
        pipeline.vae,
        pipeline.scheduler,
        config.model,
        folder=Path(config.model.path),
        cache=EmbeddingCache(run.folder.parent / "cache", "test"),
    )
    with torch.no_grad():
        return generate(policy, list(PROMPTS[2:]), 1, euler_table(run), config.evaluation.seed, 2)
