"""The published losses in float64, pair by pair, with autograd: what an update has to equal."""

import math

import torch
from tiny_runs import CPU, Bench
from torch import Tensor

from pcpo_fast.policies.families import load_policy


class Published:
    """Loss of an optimizer step; nothing of ours but the model's forward.

    ``stopped`` cuts the gradient of the unconditional half, to see that it matters.
    """

    def __init__(self, bench: Bench, *, stopped: bool = False) -> None:
        self.bench, config = bench, bench.config
        self.policy = load_policy(config, CPU)
        self.policy.module.double()
        self.times = bench.transitions.times.tolist()
        self.steps = config.sampler.steps
        self.noise, self.beta = config.sampler.noise, config.credit.kl_coefficient
        self.cfg_scale, self.stopped = config.model.cfg_scale, stopped
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2  # Stable Diffusion's
        self.alphas = torch.cumprod(1 - betas, dim=0).double().tolist()

    def load(self, weights: dict[str, Tensor]) -> None:
        double = {name: value.double() for name, value in weights.items() if ".start." not in name}
        missing, unexpected = self.policy.module.load_state_dict(double, strict=False)
        assert not unexpected and set(missing) <= {name for name, _ in self.policy.module.named_buffers()}

    def outputs(self, pairs: list[tuple[int, int]]) -> Tensor:
        rows, steps = (torch.tensor(column) for column in zip(*pairs, strict=True))
        latents = self.bench.rollout.trajectories.latents[rows, steps].double()
        times = torch.tensor(self.times)[steps]
        halves = self.policy.predict_halves(latents, times, self.bench.rollout.conditioning_of(rows))
        if halves.unconditional is None:
            return halves.conditional
        unconditional = halves.unconditional.detach() if self.stopped else halves.unconditional
        return unconditional + self.cfg_scale * (halves.conditional - unconditional)

    @property
    def diffusion(self) -> bool:
        return self.bench.config.sampler.name == "ddim"

    def alpha_pair(self, step: int) -> tuple[float, float]:
        """Cumulative alphas before and after a step of DDIM."""
        timestep = (self.steps - 1 - step) * (1000 // self.steps) + 1
        return self.alphas[timestep], self.alphas[max(timestep - 1000 // self.steps, 0)]

    def sigma(self, step: int) -> float:
        if self.bench.config.sampler.name == "dance":
            return self.noise
        t = self.times[step]
        return self.noise * math.sqrt(t / (1 - (self.times[1] if t == 1 else t)))

    def mean(self, x: Tensor, f: Tensor, step: int) -> Tensor:
        if self.diffusion:
            alpha, following = self.alpha_pair(step)
            epsilon, clean = f, (x - math.sqrt(1 - alpha) * f) / math.sqrt(alpha)
            if self.policy.schedule(self.steps).prediction == "v_prediction":  # type: ignore[union-attr]
                epsilon = math.sqrt(alpha) * f + math.sqrt(1 - alpha) * x
                clean = math.sqrt(alpha) * x - math.sqrt(1 - alpha) * f
            std = self.credit(step)[1]
            return math.sqrt(following) * clean + math.sqrt(1 - following - std**2) * epsilon
        t, dt, sigma = self.times[step], self.times[step] - self.times[step + 1], self.sigma(step)
        score = -(x - (1 - t) * (x - t * f)) / t**2
        return x - dt * f + 0.5 * sigma**2 * score * dt

    def credit(self, step: int) -> tuple[float, float]:
        """Signed native credit of a step (of epsilon for DDIM), and the standard deviation of its noise."""
        if self.diffusion:
            alpha, following = self.alpha_pair(step)
            std = self.noise * math.sqrt((1 - following) / (1 - alpha)) * math.sqrt(1 - alpha / following)
            change = math.sqrt(1 - alpha) / math.sqrt(alpha / following) - math.sqrt(1 - following - std**2)
            return -change / std, std
        t, dt, sigma = self.times[step], self.times[step] - self.times[step + 1], self.sigma(step)
        return -(dt + dt * (1 - t) * sigma**2 / (2 * t)) / (sigma * math.sqrt(dt)), sigma * math.sqrt(dt)

    def target(self, step: int) -> float:
        """PCPO's credit of a step: proportional to its length for flow models, the same for each for diffusion."""
        natives = [abs(self.credit(i)[0]) for i in range(self.steps)]
        if self.bench.config.credit.rule == "uniform":
            return sum(natives) / self.steps
        return sum(natives) / (self.times[0] - self.times[-1]) * (self.times[step] - self.times[step + 1])

    def log_ratio(self, f: Tensor, old: Tensor, x: Tensor, following: Tensor, step: int) -> Tensor:
        native, std = self.credit(step)
        if self.bench.config.credit.rule == "native":  # the difference of two log-densities, mean over elements
            new_p, old_p = (-((following - self.mean(x, g, step)) ** 2).mean() / (2 * std**2) for g in (f, old))
            return new_p - old_p
        weight = self.target(step)
        z = (following - self.mean(x, old, step)) / std
        return math.copysign(weight, native) * ((f - old) * z).mean() - 0.5 * weight**2 * ((f - old) ** 2).mean()

    def masked(self, f: Tensor, old: Tensor, x: Tensor, step: int, ratio: Tensor, advantage: float) -> bool:
        """Flow-DPPO's mask: too far, by the KL of the step's two Gaussians (mean over elements), and going on."""
        shift = self.mean(x, f.detach(), step) - self.mean(x, old, step)
        divergence = (shift**2).mean() / (2 * self.credit(step)[1] ** 2)
        self.divergences.append(float(divergence))
        onwards = (ratio.exp() > 1 and advantage > 0) or (ratio.exp() < 1 and advantage < 0)
        return bool(divergence >= self.bench.config.credit.divergence_threshold and onwards)

    def row(self, ratio: Tensor, advantage: float) -> Tensor:
        xi = self.bench.config.credit.clip_range
        if self.bench.config.credit.objective == "hinge":
            return torch.clamp(xi * abs(advantage) - advantage * ratio, min=0)
        rho = ratio.exp()
        return torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - xi, 1 + xi))

    def divergence(self, gap: Tensor, step: int) -> Tensor:
        dt = self.times[step] - self.times[step + 1]
        published = dt if self.bench.config.credit.kl == "published" else 1.0
        return published * self.credit(step)[0] ** 2 / 2 * (gap**2).mean()

    def metrics(
        self, update: int, weights: dict[str, Tensor], old_of: str
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Metrics and gradients of one optimizer step; ``old_of``: "itself", "stored", or the policy at the "start"."""
        plan, trajectories = self.bench.rollout.plan, self.bench.rollout.trajectories
        per_update = plan.images.shape[1]
        pairs = [
            (update * per_update + image, int(step))
            for image in range(per_update)
            for step in plan.steps[update, image]
        ]
        reference = self._reference(pairs)
        self.load(self.bench.weights[0])
        with torch.no_grad():
            start = self.outputs(pairs)
        self.load(weights)
        fresh = self.outputs(pairs)
        losses, ratios, kls, clipped = [], [], [], []
        self.divergences: list[float] = []
        for index, (row, step) in enumerate(pairs):
            x, following = (trajectories.latents[row, i].double() for i in (step, step + 1))
            f = fresh[index]
            olds = {"itself": f.detach(), "stored": trajectories.outputs[row, step].double(), "start": start[index]}
            old = olds[old_of]
            ratio = self.log_ratio(f, old, x, following, step)
            advantage = float(self.bench.advantages[row].float())
            kl = self.divergence(f - reference[index], step) if self.beta else torch.zeros(())
            ratios.append(ratio.detach())
            kls.append(kl.detach())
            if self.bench.config.credit.objective == "divergence_mask":
                clipped.append(float(self.masked(f, old, x, step, ratio, advantage)))
                losses.append((1 - clipped[-1]) * -advantage * ratio.exp() + self.beta * kl)
                continue
            losses.append(self.row(ratio, advantage) + self.beta * kl)
            change = ratio if self.bench.config.credit.objective == "hinge" else ratio.exp() - 1
            clipped.append(float(advantage * change > self.bench.config.credit.clip_range * abs(advantage)))
        loss = torch.stack(losses).mean()
        self.policy.module.zero_grad()
        loss.backward()
        values = torch.stack(ratios)
        taylor = torch.where(values == 0, 0.0, (values - torch.expm1(values)).abs() / torch.expm1(values).abs())
        metrics = {
            "policy/loss": float(loss.detach()),
            "policy/log_ratio_abs": float(values.abs().mean()),
            "policy/clip_fraction": sum(clipped) / len(clipped),
            "policy/taylor_error": float(taylor.nan_to_num(0.0).mean()),
        }
        if self.divergences:
            metrics["policy/divergence"] = sum(self.divergences) / len(pairs)
        if self.beta:
            metrics["policy/kl"] = float(torch.stack(kls).mean())
        gradients = {name: p.grad for name, p in self.policy.module.named_parameters() if p.grad is not None}
        metrics["policy/grad_norm"] = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        return metrics, gradients

    def _reference(self, pairs: list[tuple[int, int]]) -> Tensor:
        """The frozen reference: the weights before the first step, with adapters at zero unless they are part of it."""
        zeroed = "lora_B" if self.bench.config.credit.kl_reference == "base" else "none"
        start = self.bench.weights[0]
        self.load({name: torch.zeros_like(value) if zeroed in name else value for name, value in start.items()})
        with torch.no_grad():
            return self.outputs(pairs)


def distance(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert ours.keys() >= expected.keys()
    expected = {name: expected.get(name, torch.zeros_like(value).double()) for name, value in ours.items()}
    gap = torch.stack([(ours[name].double() - value).norm() for name, value in expected.items()]).norm()
    return float(gap / torch.stack([value.norm() for value in expected.values()]).norm())
