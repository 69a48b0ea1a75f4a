"""Run directories with known curves, for the tests of comparisons."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pcpo_fast.comparison.reading import WORK
from pcpo_fast.comparison.variants import PlannedRun
from pcpo_fast.config.loading import dump_config, load_config
from pcpo_fast.reporting.records import RunRecorder
from pcpo_fast.reporting.summary import write_summary
from pcpo_fast.runs.manifest import write_manifest

STEPS = 5


def write_run(
    folder: Path,
    reward: Callable[[int], float],
    *,
    seed: int = 0,
    epochs: int = 30,
    planned: int | None = None,
    every: int = 10,
    clip: float = 0.1,
    slope: float = 0.0,
    norms: Callable[[int], float] = lambda update: 1.0,
    diversity: bool = False,
    work: float = 0.0,
    **settings: Any,
) -> Path:
    """Write a run of two updates per epoch.

    `reward` gives the training reward of an epoch, and the held-out reward (0.05 below) of an evaluation; step i is
    clipped `clip` + `slope` i of the time; `norms` gives the gradient norm of an update by its number; `work` are the
    trained passes of an epoch (0: not counted), beside a sixth as much of each other work. The run is finished unless
    `planned` epochs are more than `epochs`. `settings` are keys with ``__`` for the dot.
    """
    planned = epochs if planned is None else planned
    overrides = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in settings.items()]
    config = load_config(None, [f"output_dir={folder}", f"seed={seed}", f"train.epochs={planned}", *overrides])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    with RunRecorder(folder, tensorboard=False, wandb=None) as recorder:
        for epoch in range(epochs + 1):
            if epoch % every == 0 or epoch == epochs:
                held = {"heldout/reward/mean": reward(epoch) - 0.05}
                recorder.log("evaluation", held | ({"heldout/diversity": 0.3} if diversity else {}), epoch=epoch)
            if epoch == epochs:
                break
            clipped = {f"policy/clip_fraction_step_{i}": clip + slope * i for i in range(STEPS)}
            for update in range(2):
                numbers = {"policy/grad_norm": float(norms(2 * epoch + update)), "policy/skipped_updates": 0.0}
                recorder.log("update", numbers | clipped, epoch=epoch, update=update)
            times = {"time/rollout": 0.4, "time/reward": 0.1, "time/update": 0.5}
            if work:
                times |= {"compute/trained": work}
                times |= {f"compute/{name}": work / 6 for name in ("forwards", "decodes", "reward_calls")}
            numbers = {"reward/mean": reward(epoch), "policy/clip_fraction": float(np.mean(list(clipped.values())))}
            recorder.log("epoch", numbers | clipped | times, epoch=epoch)
    if planned <= epochs:
        write_summary(folder)
    return folder


def write_planned(run: PlannedRun, heldout: Callable[[int], float], every: int = 10) -> None:
    """Write a finished run of a plan, as if it had been trained: held-out rewards, and one pass of work an epoch."""
    epochs = run.config.train.epochs
    checkpoint = run.folder / "checkpoints" / f"epoch_{epochs:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"epoch": epochs, "updates": epochs, "engine": {}}))
    write_manifest(checkpoint)
    (run.folder / "config.yaml").write_text(dump_config(run.config))
    with RunRecorder(run.folder, tensorboard=False, wandb=None) as recorder:
        for epoch in range(epochs + 1):
            if epoch % every == 0:
                recorder.log("evaluation", {"heldout/reward/mean": heldout(epoch)}, epoch=epoch)
            if epoch < epochs:
                counted = {f"compute/{name}": float(name == "forwards") for name in WORK}
                times = {f"time/{phase}": 1.0 for phase in ("rollout", "reward", "update")}
                recorder.log("epoch", {"reward/mean": 0.5} | counted | times, epoch=epoch)
    write_summary(run.folder)


def noisy_rise(speed: float, seed: int, noise: float = 0.01, **saturation: float) -> Callable[[int], float]:
    """A reward that rises from 0.5 towards 0.9, with the noise of its seed."""
    generator = np.random.default_rng(seed)
    values = generator.normal(0, noise, size=2000)
    own = speed * float(np.exp(generator.normal(0, 0.1)))
    return lambda epoch: float(0.9 - 0.4 * np.exp(-own * epoch) + values[epoch])
