"""A run directory as a real run leaves it, made up from smooth curves and random noise."""

import json
import math
from pathlib import Path

import numpy as np
import torch
import yaml

from pcpo_fast.reporting.grids import before_after, image_grid
from pcpo_fast.reporting.records import RunRecorder
from pcpo_fast.reporting.summary import write_summary

COLOURS = {"red": (0.85, 0.15, 0.15), "blue": (0.15, 0.3, 0.85), "green": (0.15, 0.65, 0.3), "yellow": (0.95, 0.8, 0.2)}
CAPTIONS = [f"a {shape} circle on a {ground} background" for shape in COLOURS for ground in COLOURS if ground != shape]


def scenes(skill: float, seed: int = 0, size: int = 32) -> torch.Tensor:
    """[12, 3, size, size]: the captions' circles, the right colours mixed with grey by 1 - skill, and noise."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size] / (size - 1) - 0.5
    images = []
    for caption in CAPTIONS:
        words = caption.split()
        inside = (rows**2 + columns**2 < 0.09)[None]
        shape, ground = (np.array(COLOURS[word])[:, None, None] for word in (words[1], words[5]))
        picture = np.where(inside, shape, ground) * skill + 0.5 * (1 - skill)
        images.append(picture + 0.15 * (1 - skill) * generator.standard_normal((3, size, size)))
    return torch.tensor(np.clip(np.stack(images), 0, 1), dtype=torch.float32)


def credit(steps: int = 16, noise: float = 0.3, shift: float = 3.0) -> dict:
    """credit.json of the Dance SDE (docs/method.md, section 1)."""
    u = np.linspace(1, 0, steps + 1)
    t = shift * u / (1 + (shift - 1) * u)
    dt, start = t[:-1] - t[1:], t[:-1]
    native = dt * (1 + (1 - start) * noise**2 / (2 * start)) / (noise * np.sqrt(dt))
    zeta = float(native.sum())
    return {
        "sampler": "dance",
        "rule": "proportionate",
        "times": t.tolist(),
        "native": native.tolist(),
        "proportionate": (zeta * dt).tolist(),
        "used": [*(zeta * dt[:-1]).tolist(), 0.0],
        "zeta": zeta,
        "trained_steps": list(range(steps - 1)),
    }


def make_run(
    folder: Path, epochs: int = 30, every: int = 10, *, finished: bool = True, tensorboard: bool = False
) -> Path:
    """Write a whole run of `epochs` epochs with two updates each, evaluated every `every` epochs."""
    generator = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "output_dir": "runs/demo",
        "seed": 0,
        "algorithm": "pcpo",
        "model": {"path": "assets/tiny-flux", "finetune": "full"},
        "credit": {"rule": "proportionate", "clip_range": 1e-4},
        "train": {"epochs": epochs, "updates_per_epoch": 2},
        "logging": {"tensorboard": True, "wandb": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "credit.json").write_text(json.dumps(credit()))
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "captions.json").write_text(json.dumps(CAPTIONS))
    with RunRecorder(folder, tensorboard=tensorboard, wandb=None) as recorder:
        for epoch in range(epochs + 1):
            skipped = float(epoch == 5)
            skill = 0.25 + 0.6 * (1 - math.exp(-2.5 * epoch / max(1, epochs)))
            level = 0.55 + 0.3 * skill
            if epoch % every == 0 or epoch == epochs:
                held = {"heldout/reward/mean": level, "heldout/reward/caption_match": level}
                recorder.log("evaluation", held, epoch=epoch)
                recorder.image(f"epoch_{epoch:04d}", image_grid(scenes(skill), 6, CAPTIONS), epoch)
            if epoch == epochs:
                break
            for update in range(2):
                clipped = {f"policy/clip_fraction_step_{i}": generator.uniform(0, 0.04 + 0.01 * i) for i in range(15)}
                numbers = {
                    "policy/loss": 1e-4 * generator.standard_normal(),
                    "policy/clip_fraction": float(np.mean(list(clipped.values()))),
                    "policy/grad_norm": float(generator.lognormal(-1, 0.3)),
                    "policy/skipped_updates": skipped * (update == 1),
                }
                recorder.log("update", numbers | clipped, epoch=epoch, update=update)
            numbers = {
                "reward/mean": level - 0.02 + 0.02 * generator.standard_normal(),
                "reward/std": 0.15,
                "reward/group_std": 0.12,
                "reward/caption_match": level - 0.02,
                "policy/skipped_updates": skipped,
                "rollout/mismatch_output": float(generator.lognormal(-14, 0.3)),
                "rollout/mismatch_log_ratio": float(generator.lognormal(-17, 0.5)),
                "time/rollout": 0.45 + 0.02 * generator.standard_normal(),
                "time/reward": 0.04,
                "time/update": 0.38 + 0.02 * generator.standard_normal(),
                "throughput/images_per_second": 96 / 0.9 + generator.standard_normal(),
                "memory/peak_gib": 1.3,
            }
            recorder.log("epoch", numbers, epoch=epoch)
        sheet = before_after(scenes(0.25), scenes(0.85), CAPTIONS, scores=([0.6] * 12, [0.8] * 12))
        recorder.image("before_after", sheet, epochs)
    if finished:
        write_summary(folder, {"seconds": 84.5})
    return folder
