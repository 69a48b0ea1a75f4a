"""Two optimizer steps of the real configuration on a few images, in a separate process."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcpo_fast.config.loading import dump_config, load_config
from pcpo_fast.config.schema import AUTO, Config
from pcpo_fast.planning.advice import GB
from pcpo_fast.planning.run_plan import make_plan
from pcpo_fast.planning.sizes import gpu_memory, is_auto, with_sizes
from pcpo_fast.preflight.checks import Status

OUTCOME_LINES = 3


def shrunk(config: Config, folder: Path, ranks: int) -> Config:
    """The run with one epoch of two optimizer steps, each with one micro-batch of images per rank.

    Model, sampler, rewards, batch sizes and ZeRO stage are unchanged, since they are what the dry run tests.
    """
    size = config.train.micro_batch_size
    images = 2 * ranks * (2 if size == AUTO else max(size, 2))  # a group needs two images, some three
    changes = [
        f"output_dir={folder / 'run'}",
        "train.epochs=1",
        "train.updates_per_epoch=2",
        "train.inner_epochs=1",
        "rollout.prompts_per_epoch=1",
        f"rollout.images_per_prompt={images}",
        "checkpoint.every=0",
        "checkpoint.keep_best=0",
        "logging.tensorboard=false",
        "logging.wandb=null",
        "logging.trackio=null",
    ]
    if config.prompts.heldout is not None:
        changes += ["evaluation.prompts=1", "evaluation.images_per_prompt=1"]
    if config.model.embedding_cache is None:
        changes.append(f"model.embedding_cache={Path(config.output_dir).parent / 'embeddings'}")
    full = folder / "full.yaml"
    full.write_text(dump_config(config), encoding="utf-8")
    return load_config(full, changes)


def with_planned_sizes(config: Config, plan: Mapping[str, Any]) -> Config:
    """The run with its automatic sizes as its plan for this GPU has them, to try what they need."""
    own = plan["configured"]
    return with_sizes(config, own["micro_batch_size"], own["rollout_batch_size"])


def dry_run_here(config: Config, timeout: float = 1800) -> tuple[Status, str]:
    """:func:`dry_run` in one process, on this machine's GPU if it has one."""
    memory = gpu_memory()
    if is_auto(config) and memory is not None:
        config = with_planned_sizes(config, make_plan(config, 1, memory / GB))
    return dry_run(config, 1, timeout)


def dry_run(config: Config, gpus: int, timeout: float) -> tuple[Status, str]:
    """Train two steps, with DeepSpeed's launcher for several GPUs.

    Args:
        config: the run; its output_dir is not touched.
        gpus: ranks on this machine.
        timeout: seconds after which the dry run is stopped and fails.
    """
    with tempfile.TemporaryDirectory(prefix="pcpo-preflight-") as name:
        folder = Path(name)
        file = folder / "dry_run.yaml"
        file.write_text(dump_config(shrunk(config, folder, gpus)), encoding="utf-8")
        launcher = [sys.executable, "-m"]
        if gpus > 1:
            launcher += ["deepspeed.launcher.runner", "--num_gpus", str(gpus), "--module"]
        command = [*launcher, "pcpo_fast", "train", "--config", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return "failed", f"the dry run did not finish within {timeout:.0f} seconds (--timeout)"
        if done.returncode:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            reason = next((line for line in reversed(lines) if line.startswith("error:")), None)
            return "failed", reason or " / ".join(lines[-OUTCOME_LINES:]) or f"exit code {done.returncode}"
    return "ok", "two optimizer steps, an evaluation, a checkpoint and an export"
