"""One training step, rollout and update, three ways: ours, the public trainers', and a strong plain PyTorch one.

All train the same model with the same optimizer on as many images, steps and trained steps, from random advantages.
The public way is that of DanceGRPO's FLUX script: one image at a time, eager, float32 weights under autocast, every
block recomputed, differences of log-probabilities, a wait for the device after every micro-step, a PNG for every image.
The strong way batches and compiles like ours, with the same engine; its sampler, noise and loss are plain PyTorch.
"""

import math
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from step_model import Size, random_embeddings, random_network, random_policy
from torch import Tensor

from pcpo_fast.config.schema import Config
from pcpo_fast.engine.eight_bit_adamw import EightBitAdamW
from pcpo_fast.engine.engine import Engine
from pcpo_fast.engine.optimizers import GuardedAdamW
from pcpo_fast.method.step_tables import EpochTables, RunTables
from pcpo_fast.policies.flux import FluxPolicy
from pcpo_fast.policies.pipeline_policy import DTYPES
from pcpo_fast.rollout.epoch_plan import EpochPlan, accumulation_steps, plan_epoch
from pcpo_fast.rollout.rollout import Rollout, collect_rollout
from pcpo_fast.training.update import Update


class StepPath(Protocol):
    """A way to make a training step."""

    policy: FluxPolicy

    def rollout(self) -> None:
        """Sample the group's images, and decode them."""

    def update(self) -> None:
        """Train on them: one optimizer step."""


class Parts:
    """What every path has: model, tables, the plan of an epoch, embeddings, advantages."""

    def __init__(self, size: Size, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.config, self.device = size, config, device
        network = random_network(size, device, dtype)
        self.policy = random_policy(size, config, device, network)
        with device:  # adapters are drawn where they are used
            FluxPolicy.prepare_network(network, config.model, device)
        self.tables = RunTables(config, self.policy.schedule(config.sampler.steps), device)
        self.at: EpochTables = self.tables.at(0)
        self.plan: EpochPlan = plan_epoch(config, 1, self.at.steps, 0, 0, 1)
        self.embeddings = random_embeddings(size, device, dtype)
        generator = torch.Generator().manual_seed(3)
        self.advantages = torch.randn(size.images, generator=generator).to(device)

    def conditioning(self, rows: int) -> dict[str, Tensor]:
        """The prompt's embeddings for some images."""
        return {name: value.expand(rows, *value.shape[1:]) for name, value in self.embeddings.items()}

    def column(self, values: Tensor, steps: Tensor) -> Tensor:
        """A table's values at the steps of some rows, to be multiplied with latents."""
        return values[steps].view(-1, 1, 1)


class WithEngine(Parts):
    """A path that trains through our engine."""

    def __init__(self, size: Size, config: Config, device: torch.device) -> None:
        super().__init__(size, config, device, DTYPES[config.model.dtype])
        self.engine = Engine(self.policy.module, config, accumulation_steps(config, self.tables.trained_count, 1))
        self.policy.forward_module = self.engine.module


class Ours(WithEngine):
    """The trainer's own loop, with the levers that the configuration has."""

    def __init__(self, size: Size, config: Config, device: torch.device) -> None:
        super().__init__(size, config, device)
        self.sampled: Rollout | None = None

    def rollout(self) -> None:
        settings = self.config.rollout
        with self.engine.offloaded(settings.offload_optimizer), self.policy.sampling(settings):
            self.sampled = collect_rollout(
                self.policy, lambda prompts: self.embeddings, self.plan, settings, self.at.sampler, self.config.seed
            )

    def update(self) -> None:
        assert self.sampled is not None, "roll out first"
        at = self.at
        update = Update(self.policy, self.engine, self.sampled, self.advantages, at.sampler, at.credit, self.config)
        list(update.run())


class Strong(WithEngine):
    """Batched and compiled, with our engine; sampler, noise and log-hinge loss in plain PyTorch."""

    def __init__(self, size: Size, config: Config, device: torch.device) -> None:
        super().__init__(size, config, device)
        self.loss = torch.compile(hinge_loss, dynamic=False) if config.model.compile else hinge_loss
        self.latents: Tensor | None = None
        self.outputs: Tensor | None = None

    @torch.no_grad()
    def rollout(self) -> None:
        size, table = self.size, self.at.sampler
        start = torch.randn(1, *self.policy.latent_shape, device=self.device)
        x = start.expand(size.images, *self.policy.latent_shape)
        given, latents, outputs = self.conditioning(size.images), [x], []
        for step in range(size.steps):
            f = self.policy.predict(x, table.times[step].expand(size.images), given)
            x = table.a[step] * x + table.b[step] * f.float()
            if table.noisy[step]:
                x = x + table.std[step] * torch.randn_like(x)
            latents.append(x)
            outputs.append(f)
        self.latents, self.outputs = torch.stack(latents, dim=1), torch.stack(outputs, dim=1)
        self.policy.decode(x)

    def update(self) -> None:
        assert self.latents is not None and self.outputs is not None, "roll out first"
        table, credit, clip = self.at.sampler, self.at.credit, self.config.credit.clip_range
        steps = self.plan.steps[0].flatten().to(self.device)
        rows = torch.arange(self.size.images, device=self.device).repeat_interleave(self.plan.steps.shape[2])
        size = self.config.train.micro_batch_size
        for image, step in zip(rows.split(size), steps.split(size), strict=True):
            x, old = self.latents[image, step], self.outputs[image, step]
            new = self.policy.predict(x, table.times[step], self.conditioning(len(image)))
            columns = [self.column(c, step) for c in (table.a, table.b, table.std)]
            rates = [c[step] for c in (credit.linear, credit.quadratic, credit.scale)]
            following = self.latents[image, step + 1]
            self.engine.backward(self.loss(new, old, x, following, *columns, *rates, self.advantages[image], clip))
            self.engine.step()


def hinge_loss(
    new: Tensor,
    old: Tensor,
    x: Tensor,
    following: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    scale: Tensor,
    advantage: Tensor,
    clip: float,
) -> Tensor:
    """PCPO's loss with the noise recovered from the step's two ends."""
    z = (following - a * x - b * old.float()) / std
    delta = new.float() - old.float()
    log_ratio = linear * (delta * z).mean(dim=(1, 2)) - quadratic * delta.square().mean(dim=(1, 2))
    return (scale * (clip * advantage.abs() - advantage * log_ratio).clamp_min(0)).mean()


class Public(Parts):
    """One image at a time, as DanceGRPO's script trains FLUX."""

    def __init__(self, size: Size, config: Config, device: torch.device) -> None:
        super().__init__(size, config, device, torch.float32)
        self.network = self.policy.module
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        settings = config.optimizer
        kind: Any = EightBitAdamW if settings.moments == "8bit" else GuardedAdamW
        self.optimizer = kind(
            self.trained, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        self.folder = tempfile.TemporaryDirectory()
        self.latents = self.log_probs = torch.empty(0)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 on GPUs. CPUs without bf16 units would only be slowed by it: everything is float32 there."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def step_of(self, x: Tensor, step: int, following: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(next latents, log-probability) of one image's step; the next latents are drawn where not given."""
        table = self.at.sampler
        with self.autocast():
            velocity = self.policy.predict(x, table.times[step].expand(1), self.conditioning(1)).float()
        mean, std = table.a[step] * x + table.b[step] * velocity, table.std[step]
        if following is None:
            following = mean + std * torch.randn_like(mean) if table.noisy[step] else mean
        if not table.noisy[step]:
            return following, torch.zeros(1, device=self.device)
        log_prob = -((following.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return following, log_prob.mean(dim=(1, 2))

    @torch.no_grad()
    def rollout(self) -> None:
        start = torch.randn(1, *self.policy.latent_shape, device=self.device)
        trajectories, log_probs = [], []
        for image in range(self.size.images):
            x, latents, logs = start, [start], []
            for step in range(self.size.steps):
                x, log_prob = self.step_of(x, step)
                latents.append(x)
                logs.append(log_prob)
            pixels = (self.policy.decode(x)[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
            Image.fromarray(pixels).save(Path(self.folder.name) / f"{image}.png")
            trajectories.append(torch.stack(latents, dim=1))
            log_probs.append(torch.stack(logs, dim=1))
        self.latents, self.log_probs = torch.cat(trajectories), torch.cat(log_probs)

    def update(self) -> None:
        clip, pairs = self.config.credit.clip_range, self.plan.steps[0].numel()
        total = 0.0
        for image in range(self.size.images):
            for step in self.plan.steps[0, image].tolist():
                ends = self.latents[image : image + 1, step], self.latents[image : image + 1, step + 1]
                _, log_prob = self.step_of(ends[0], step, ends[1])
                ratio = torch.exp(log_prob - self.log_probs[image, step])
                advantage = self.advantages[image]
                clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
                loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean() / pairs
                loss.backward()
                total += loss.detach().clone().item()
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
