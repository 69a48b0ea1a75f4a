"""Two optimizer steps of the real configuration on a few images, in a separate process."""

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcpo_fast.config.loading import dump_config, merged
from pcpo_fast.config.schema import AUTO, Config
from pcpo_fast.planning.advice import GB
from pcpo_fast.planning.run_plan import make_plan
from pcpo_fast.planning.sizes import gpu_memory, is_auto, with_sizes
from pcpo_fast.preflight.checks import Status
from pcpo_fast.runs.run_directory import claim
from pcpo_fast.training.run_inputs import checked_prompts, doubts

OUTCOME_LINES = 3


def shrunk(config: Config, folder: Path, ranks: int) -> Config:
    """The run with one epoch of two optimizer steps, each with one micro-batch of images per rank.

    Model, sampler, rewards, batch sizes and ZeRO stage are unchanged, since they are what the dry run tests.
    """
    size, rollout, evaluation = config.train.micro_batch_size, config.rollout, config.evaluation
    own = config.images_per_epoch // config.train.updates_per_epoch // ranks
    images = 2 * ranks * (2 if size == AUTO else max(min(size, own), 2))  # a group needs two images, some three
    changes = {
        "output_dir": str(folder / "run"),
        "train": {"epochs": 1, "updates_per_epoch": 2, "inner_epochs": 1, "max_rollout_age": 2},
        "rollout": {
            "prompts_per_epoch": 1,
            "images_per_prompt": images,
            "candidates": None if rollout.candidates is None else images + 1,
        },
        # Diversity is that of two images.
        "evaluation": {"prompts": 1, "images_per_prompt": min(evaluation.images_per_prompt, 2)},
        "checkpoint": {"every": 0, "keep_best": 0},
        "logging": {"tensorboard": False, "wandb": None, "trackio": None},
        "model": {"embedding_cache": str(config.embedding_folder)},
    }
    return Config.model_validate(merged(config.model_dump(mode="json"), changes))


def with_planned_sizes(config: Config, plan: Mapping[str, Any]) -> Config:
    """The run with its automatic sizes as its plan for this GPU has them, to try what they need."""
    own = plan["configured"]
    return with_sizes(config, own["micro_batch_size"], own["rollout_batch_size"])


def dry_run_here(config: Config, timeout: float = 1800) -> tuple[Status, str]:
    """:func:`dry_run` in one process, on this machine's GPU if it has one, after the checks that a run begins with.

    Raises:
        UserError: one of these finds a problem.
    """
    claim(config, "auto")
    for doubt in doubts(config, *checked_prompts(config), ranks=1):
        warnings.warn(doubt, stacklevel=2)
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
            reason = reason or " / ".join(lines[-OUTCOME_LINES:]) or f"exit code {done.returncode}"
            return "failed", reason.replace(name, tempfile.gettempdir())  # the folder is gone
    return "ok", "two optimizer steps, an evaluation, a checkpoint and an export"
